"""Render the synthetic world into video files, lists and ground truth.

A world is a folder of splits. Each split has H.264 files, a list of `path label` lines
and the ground truth of every frame (`.npz`). `world.json`, written last, marks a world
as complete. Rendering is deterministic, skips files that exist, and may be interrupted.

- `physics` holds matched pairs, a possible clip followed by an impossible one. The
  label is 1 for a possible clip; `physics.npz` holds `property` (a name), `pair`,
  `possible` and `onset` (the first frame that differs) of every clip.
- `actions_train` and `actions_test` are clips of play; `NAME_actions.csv` lists their
  events, see `actions`.
- `segmentation` holds videos with label maps, see `labelled`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import av
import numpy as np
import tqdm

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.jobs.reencode import REPRODUCIBLE
from vjepa_jax.world import actions, labelled, motion, play, violations
from vjepa_jax.world.scenes import Clip, World

MANIFEST = "world.json"
FPS = 12
PHYSICS = "physics"  # the split of matched pairs
ACTIONS = ("actions_train", "actions_test")  # clips of play with a list of events
PHYSICS_STREAM = 5  # number of its random stream, beside the seed
_LABELLED_STREAM = 7  # the same as of actions_test, hence the same scenes
_CHUNK = 64  # items per task of a rendering process

# A part of a split's ground truth: {field: array of one row per clip}.
Truth = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of the world.

    Attributes:
      name: of its folder and list.
      num_videos: number of its clips.
      seed: of its clips.
      classes: that its clips take in turn.
      play_fraction: share of the clips that are play instead, see `play`.
    """

    name: str
    num_videos: int
    seed: tuple[int, int]
    classes: tuple[str, ...] = motion.CLASSES
    play_fraction: float = 0.0

    def make_clip(self, looks: World, index: int) -> Clip:
        """Make a clip with the ground truth of the main object and the companions."""
        if not play.is_play(self.play_fraction, self.seed, index):
            return motion.make_clip(looks, self.seed, index, self.classes)
        clip = play.make_play(looks, self.seed, index)
        # As many objects as the other clips have, to be stored in one array with them.
        shown = slice(1 + looks.num_companions)
        return dataclasses.replace(
            clip,
            position=clip.position[:, shown],
            velocity=clip.velocity[:, shown],
            visibility=clip.visibility[:, shown],
        )


def looks_of(config: ConfigDict) -> World:
    """Return the look of the clips of `config.world`."""
    return World(size=config.size, num_frames=config.num_frames)


def splits(config: ConfigDict) -> list[Split]:
    """Return the splits of `config.world`; each has its own random numbers."""
    made = [
        Split("pretrain", config.pretrain_videos, (config.seed, 0)),
        Split("probe_train", config.probe_train_videos, (config.seed, 1)),
        Split("probe_test", config.probe_test_videos, (config.seed, 2)),
        Split("hidden_train", config.hidden_train_videos, (config.seed, 3), ("hide",)),
        Split("hidden_test", config.hidden_test_videos, (config.seed, 4), ("hide",)),
    ]
    made[0] = dataclasses.replace(made[0], play_fraction=config.play_fraction)
    if count := config.action_clips:
        sizes = zip(ACTIONS, (count, count // 2), (6, 7), strict=True)
        made += [
            Split(name, size, (config.seed, stream), play_fraction=1.0)
            for name, size, stream in sizes
        ]
    return made


def write_video(
    path: pathlib.Path,
    video: Iterable[np.ndarray],
    fps: int | Fraction = FPS,
    is_causal: bool = False,
) -> None:
    """Write H.264, with the same bytes each time; the file appears when complete.

    Args:
      path: of the file.
      video: frames uint8 [H, W, 3] of one even height and width, written as they come;
        at least one.
      fps: frames per second.
      is_causal: no frame depends on a later one. Videos with equal beginnings are then
        decoded equally up to their first difference; the file is a little larger.
    """
    options = {"crf": "12", "preset": "veryfast", **REPRODUCIBLE}
    if is_causal:
        options["tune"] = "zerolatency"  # neither B-frames nor lookahead
    with (
        files.renamed_when_complete(path) as temporary,
        av.open(str(temporary), "w", format="mp4") as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.pix_fmt = "yuv420p"
        # The pool has a process per core already.
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(video):
            if not number:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def render_world(config: ConfigDict) -> bool:
    """Render what is missing of the world `config.world`.

    Returns:
      Whether anything was rendered; False where the world was complete.

    Raises:
      UserError: `config.path` holds another world, or is not a folder.
    """
    root = pathlib.Path(config.path)
    looks = looks_of(config)
    settings = {k: v for k, v in config.to_dict().items() if k != "path"}
    # Through JSON, like the manifest that it is compared with: tuples become lists.
    settings = json.loads(json.dumps(settings | dataclasses.asdict(looks)))
    manifest = root / MANIFEST
    started = root / f"{MANIFEST}.part"
    for path in (manifest, started):
        if path.exists() and _read_settings(path) != settings:
            raise UserError(
                f"{root} holds a world rendered with other settings than config.world: "
                "give another world.path (and data.path), or remove the folder"
            )
    if manifest.exists():
        return False
    if config.physics_pairs and config.num_frames < violations.MIN_FRAMES:
        raise UserError(
            f"config.world.physics_pairs={config.physics_pairs}: pairs need "
            f"world.num_frames of {violations.MIN_FRAMES} or more"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"world.path={root} is not a folder") from None
    began = time.perf_counter()
    if not started.exists():
        started.write_text(json.dumps({"world": settings}))
    num_pairs = len(violations.PROPERTIES) * config.physics_pairs
    total = sum(split.num_videos for split in splits(config))
    total += 2 * num_pairs + config.segmentation_videos
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool,
        tqdm.tqdm(total=total, desc="rendering", unit=" videos") as progress,
    ):
        renderer = _Renderer(root, looks, pool, progress)
        for split in splits(config):
            renderer.render_split(split)
        if config.physics_pairs:
            renderer.render_physics(config)
        if config.segmentation_videos:
            renderer.render_labelled(config)
    seconds = time.perf_counter() - began
    started.write_text(json.dumps({"world": settings, "seconds": seconds}))
    started.replace(manifest)
    return True


def render_seconds(path: str) -> float | None:
    """Return how long the last rendering of the world at `path` took; None: unknown."""
    try:
        seconds = json.loads((pathlib.Path(path) / MANIFEST).read_text())["seconds"]
        return float(seconds)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_truth(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the truth of a split's clips; raise UserError if its file is damaged."""
    fix = (
        f"remove {path.parent} and render it again "
        "(python -m vjepa_jax.prepare --config=...)"
    )
    return files.read_arrays(path, fix)


def _read_settings(path: pathlib.Path) -> dict | None:
    """Return the settings in a manifest; None if it is damaged."""
    try:
        return json.loads(path.read_text())["world"]
    except (ValueError, KeyError, TypeError):
        return None


@dataclasses.dataclass(frozen=True)
class _Renderer:
    """Renders parts of a world in the processes of a pool."""

    root: pathlib.Path
    looks: World
    pool: concurrent.futures.ProcessPoolExecutor
    progress: tqdm.tqdm

    def render_split(self, split: Split) -> None:
        """Render clips, their list and, for clips of actions, the list of events."""
        indices = range(split.num_videos)
        task = functools.partial(_render_clips, self._folder(split.name), split)
        labels = self._collect(split.name, task, indices)["label"]
        self._write_list(split.name, [f"{i:06d}.mp4" for i in indices], labels)
        if split.name in ACTIONS:
            videos = [f"{split.name}/{i:06d}" for i in indices]
            action_of = functools.partial(actions.action_of, self.looks, split.seed)
            events = self.pool.map(action_of, indices, chunksize=_CHUNK)
            path = self.root / f"{split.name}_actions.csv"
            actions.write_actions(path, events, videos, FPS)

    def render_physics(self, config: ConfigDict) -> None:
        """Render matched pairs and their list."""
        names, count = violations.PROPERTIES, config.physics_pairs
        pairs = [(name, index) for name in names for index in range(count)]
        seed = config.seed, PHYSICS_STREAM
        task = functools.partial(_render_pairs, self._folder(PHYSICS), seed)
        truth = self._collect(PHYSICS, task, pairs)
        rows = zip(*(truth[k] for k in ("property", "pair", "possible")), strict=True)
        clips = [_pair_file(*row) for row in rows]
        self._write_list(PHYSICS, clips, truth["possible"])

    def render_labelled(self, config: ConfigDict) -> None:
        """Render videos with label maps and their lists."""
        folder, seed = self.root / labelled.FOLDER, (config.seed, _LABELLED_STREAM)
        task = functools.partial(_render_labelled, folder, self.looks, seed)
        indices = range(config.segmentation_videos)
        for _ in self.pool.map(task, indices):
            self.progress.update()
        names = [labelled.name_of(index) for index in indices]
        labelled.write_lists(folder, names, self.looks.num_frames)

    def _folder(self, name: str) -> pathlib.Path:
        (self.root / name).mkdir(exist_ok=True)
        return self.root / name

    def _collect(
        self, name: str, task: Callable[[World, Sequence], Truth], items: Sequence
    ) -> Truth:
        """Render a split in chunks of its items; write and return the ground truth."""
        starts = range(0, len(items), _CHUNK)
        chunks = [items[start : start + _CHUNK] for start in starts]
        parts = []
        for part in self.pool.map(functools.partial(task, self.looks), chunks):
            parts.append(part)
            self.progress.update(len(next(iter(part.values()))))
        truth = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        # mypy takes `**` for `allow_pickle` as well.
        np.savez_compressed(self.root / f"{name}.npz", **truth)  # type: ignore[arg-type]
        return truth

    def _write_list(self, name: str, clips: list[str], labels: np.ndarray) -> None:
        rows = zip(clips, labels, strict=True)
        lines = [f"{name}/{clip} {label}\n" for clip, label in rows]
        (self.root / f"{name}.csv").write_text("".join(lines))


def _render_clips(
    folder: pathlib.Path, split: Split, looks: World, indices: range
) -> Truth:
    """Render clips and return their ground truth, stacked."""
    clips = []
    for index in indices:
        clip = split.make_clip(looks, index)
        path = folder / f"{index:06d}.mp4"
        if not path.exists():
            write_video(path, clip.video)
        clips.append(clip)
    fields = ("position", "velocity", "visibility", "label")
    return {name: np.stack([getattr(c, name) for c in clips]) for name in fields}


def _render_pairs(
    folder: pathlib.Path,
    seed: tuple[int, int],
    looks: World,
    pairs: list[tuple[str, int]],
) -> Truth:
    """Render pairs, given as (property, index); return the rows of `physics.npz`."""
    rows = []
    for name, index in pairs:
        pair = violations.make_pair(looks, seed, name, index)
        for is_possible, clip in ((1, pair.possible), (0, pair.impossible)):
            path = folder / _pair_file(name, index, is_possible)
            if not path.exists():
                write_video(path, clip.video, is_causal=True)
            rows.append((name, index, is_possible, pair.onset))
    fields = zip(*rows, strict=True)
    names = "property", "pair", "possible", "onset"
    return {k: np.array(v) for k, v in zip(names, fields, strict=True)}


def _pair_file(name: str, index: int, is_possible: int) -> str:
    return f"{name}_{index:04d}_{'possible' if is_possible else 'impossible'}.mp4"


def _render_labelled(
    folder: pathlib.Path, looks: World, seed: tuple[int, int], index: int
) -> None:
    name = labelled.name_of(index)
    if not labelled.is_written(folder, name, looks.num_frames):
        clip = labelled.make_labelled(looks, seed, index)
        labelled.write_clip(folder, name, clip)
