"""Render the synthetic world into video files, lists and ground truth.

A world is a folder of splits. Each split has H.264 files, a list of `path label` lines
and the ground truth of every frame (`.npz`); `world.json`, written last, says that all
is there. Rendering is deterministic, skips files that exist, and may be interrupted.

The split `physics` holds matched pairs, a possible clip and an impossible one after the
other; their label says which is possible, and `physics.npz` holds `property` (a name),
`pair`, `possible` and `onset` (the first frame that differs) of every clip. The folder
`segmentation` holds videos with masks, see `masked_world`.

The splits `actions_train` and `actions_test` are clips of play, beside which there are
lists of what happens in them, `NAME_actions.csv`, see `play_actions`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import time
from fractions import Fraction

import av
import numpy as np
import tqdm

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.jobs.reencode import REPRODUCIBLE
from vjepa_jax.world import actions as play_actions
from vjepa_jax.world import labelled, motion, play, violations

MANIFEST = "world.json"
FPS = 12
PHYSICS = "physics"  # the split of matched pairs
ACTIONS = ("actions_train", "actions_test")  # clips of play with a list of events
PHYSICS_STREAM = 5  # of its random numbers, beside the seed
_CHUNK = 64  # clips per task of a rendering process
# Keys of `config.world` that came later, and what worlds without them are.
_ADDED = {
    "play_fraction": 0.0,
    "physics_pairs": 0,
    "segmentation_videos": 0,
    "action_clips": 0,
}
_MASKED = 7  # the last part of their seed: the same scenes as in actions_test


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of the world.

    Attributes:
      name: of its folder and list.
      num_videos: in it.
      seed: of its clips.
      classes: that its clips take in turn.
      play_fraction: share of the clips that are play instead, see `data.play`.
    """

    name: str
    num_videos: int
    seed: tuple[int, int]
    classes: tuple[str, ...] = motion.CLASSES
    play_fraction: float = 0.0

    def make_clip(self, looks: motion.World, index: int) -> motion.Clip:
        """Make a clip, whose ground truth is of the main object and the companions."""
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


def looks_of(config: ConfigDict) -> motion.World:
    """Return what the clips of a world look like."""
    return motion.World(size=config.size, num_frames=config.num_frames)


def splits(config: ConfigDict) -> list[Split]:
    """List the splits of a world; each has random numbers of its own."""
    count = config.action_clips
    actions = [
        Split(name, num_videos, (config.seed, part), play_fraction=1.0)
        for name, num_videos, part in zip(
            ACTIONS, (count, count // 2), (6, 7), strict=True
        )
    ]
    return [
        Split(
            "pretrain",
            config.pretrain_videos,
            (config.seed, 0),
            play_fraction=config.play_fraction,
        ),
        Split("probe_train", config.probe_train_videos, (config.seed, 1)),
        Split("probe_test", config.probe_test_videos, (config.seed, 2)),
        Split("hidden_train", config.hidden_train_videos, (config.seed, 3), ("hide",)),
        Split("hidden_test", config.hidden_test_videos, (config.seed, 4), ("hide",)),
        *(actions if count else ()),
    ]


def write_video(
    path: pathlib.Path, video: np.ndarray, fps: int = FPS, is_causal: bool = False
) -> None:
    """Write uint8 [T, H, W, 3] as H.264; the file appears under its name when whole.

    The same frames make the same bytes.

    Args:
      path: of the file.
      video: its frames.
      fps: frames per second.
      is_causal: no frame depends on a later one, so that videos which begin alike are
        decoded alike up to where they part; the file is a little larger.
    """
    options = {"crf": "12", "preset": "veryfast", **REPRODUCIBLE}
    if is_causal:
        options["tune"] = "zerolatency"  # neither B-frames nor a look ahead
    with (
        files.renamed_when_complete(path) as part,
        av.open(str(part), "w", format="mp4") as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The pool has a process per core already.
        stream.codec_context.thread_count = 1
        for pixels in video:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _render_chunk(
    folder: pathlib.Path, looks: motion.World, split: Split, indices: range
) -> dict[str, np.ndarray]:
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
    looks: motion.World,
    seed: tuple[int, int],
    pairs: list[tuple[str, int]],
) -> dict[str, np.ndarray]:
    """Render pairs, given as (property, index); return what `physics.npz` holds."""
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


def render_world(config: ConfigDict) -> bool:
    """Render what is missing of the world `config.world`.

    Returns:
      Whether anything was rendered; False where the world was complete.

    Raises:
      UserError: the folder holds another world, or is none.
    """
    root = pathlib.Path(config.path)
    looks = looks_of(config)
    described = {k: v for k, v in config.to_dict().items() if k != "path"}
    # Through JSON, as what it is compared with: tuples become lists.
    described = json.loads(json.dumps(described | dataclasses.asdict(looks)))
    manifest = root / MANIFEST
    started = root / f"{MANIFEST}.part"
    for path in (manifest, started):
        if path.exists() and _read_manifest(path) != described:
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
        started.write_text(json.dumps({"world": described}))
    pairs = [(n, i) for n in violations.PROPERTIES for i in range(config.physics_pairs)]
    total = sum(split.num_videos for split in splits(config)) + 2 * len(pairs)
    total += config.segmentation_videos
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool,
        tqdm.tqdm(total=total, desc="rendering", unit=" videos") as progress,
    ):
        for split in splits(config):
            _render_split(root, looks, split, pool, progress)
        if pairs:
            _render_physics(
                root, looks, (config.seed, PHYSICS_STREAM), pairs, pool, progress
            )
        if config.segmentation_videos:
            _render_masked(root, looks, config, pool, progress)
    seconds = time.perf_counter() - began
    started.write_text(json.dumps({"world": described, "seconds": seconds}))
    started.replace(manifest)
    return True


def _read_manifest(path: pathlib.Path) -> dict | None:
    """Return the settings in a manifest; None where there are none, or but half."""
    try:
        return _ADDED | json.loads(path.read_text())["world"]
    except (ValueError, KeyError, TypeError):
        return None


def render_seconds(path: str) -> float:
    """Return how long the last rendering of the complete world at `path` took."""
    return json.loads((pathlib.Path(path) / MANIFEST).read_text())["seconds"]


def _render_split(root, looks, split: Split, pool, progress) -> None:
    indices = range(split.num_videos)
    truth = _collect(root, split.name, indices, pool, progress, 1, looks, split)
    lines = [f"{split.name}/{i:06d}.mp4 {k}\n" for i, k in enumerate(truth["label"])]
    (root / f"{split.name}.csv").write_text("".join(lines))
    if split.name in ACTIONS:
        videos = [f"{split.name}/{i:06d}" for i in indices]
        action_of = functools.partial(play_actions.action_of, looks, split.seed)
        actions = pool.map(action_of, indices, chunksize=_CHUNK)
        path = root / f"{split.name}_actions.csv"
        play_actions.write_actions(path, actions, videos, FPS)


def _render_physics(root, looks, seed, pairs, pool, progress) -> None:
    truth = _collect(root, PHYSICS, pairs, pool, progress, 2, looks, seed)
    rows = zip(*(truth[k] for k in ("property", "pair", "possible")), strict=True)
    lines = [f"{PHYSICS}/{_pair_file(*row)} {row[-1]}\n" for row in rows]
    (root / f"{PHYSICS}.csv").write_text("".join(lines))


def _collect(root, name, items, pool, progress, videos_per_item, *what):
    """Render a split in chunks of its items; write and return the ground truth."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    task = _render_pairs if name == PHYSICS else _render_chunk
    futures = []
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        futures.append(pool.submit(task, folder, *what, chunk))
        count = len(chunk) * videos_per_item
        futures[-1].add_done_callback(lambda _, n=count: progress.update(n))
    parts = [future.result() for future in futures]
    truth = {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
    np.savez_compressed(root / f"{name}.npz", **truth)
    return truth


def _render_masked(root, looks, config: ConfigDict, pool, progress) -> None:
    folder = root / labelled.FOLDER
    seed = config.seed, _MASKED
    names = [f"{index:05d}" for index in range(config.segmentation_videos)]
    futures = []
    for index, name in enumerate(names):
        what = folder, name, looks, seed, index
        futures.append(pool.submit(_write_masked, *what))
        futures[-1].add_done_callback(lambda _: progress.update())
    for future in futures:
        future.result()
    labelled.write_lists(folder, names, looks.num_frames)


def _write_masked(folder, name, looks, seed, index) -> None:
    if not labelled.is_written(folder, name, looks.num_frames):
        clip = labelled.make_masked(looks, seed, index)
        labelled.write_clip(folder, name, clip)
