"""Render the synthetic world into video files, lists and ground truth.

A world is a folder of splits. Each split has H.264 files, a list of `path label` lines
and the ground truth of every frame (`.npz`); `world.json`, written last, says that all
is there. Rendering is deterministic, skips files that exist, and may be interrupted.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import time
from fractions import Fraction

import av
import numpy as np
import tqdm

from vjepa_jax.data import world
from vjepa_jax.default_config import ConfigDict, UserError

MANIFEST = "world.json"
FPS = 12
_CHUNK = 64  # clips per task of a rendering process


@dataclasses.dataclass(frozen=True)
class Split:
    """A part of the world: its name, its clips and the classes they take in turn."""

    name: str
    num_videos: int
    seed: tuple[int, int]
    classes: tuple[str, ...] = world.CLASSES


def splits(config: ConfigDict) -> list[Split]:
    """List the splits of a world; each has random numbers of its own."""
    return [
        Split("pretrain", config.pretrain_videos, (config.seed, 0)),
        Split("probe_train", config.probe_train_videos, (config.seed, 1)),
        Split("probe_test", config.probe_test_videos, (config.seed, 2)),
        Split("hidden_train", config.hidden_train_videos, (config.seed, 3), ("hide",)),
        Split("hidden_test", config.hidden_test_videos, (config.seed, 4), ("hide",)),
    ]


def write_video(path: pathlib.Path, video: np.ndarray, fps: int = FPS) -> None:
    """Write uint8 [T, H, W, 3] as H.264; the file appears under its name when whole."""
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps), options={"crf": "12", "preset": "veryfast"}
        )
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # The pool has a process per core already.
        stream.codec_context.thread_count = 1
        for pixels in video:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.replace(path)


def _render_chunk(
    folder: pathlib.Path, looks: world.World, split: Split, indices: range
) -> dict[str, np.ndarray]:
    """Render clips and return their ground truth, stacked."""
    clips = []
    for index in indices:
        clip = world.make_clip(looks, split.seed, index, split.classes)
        path = folder / f"{index:06d}.mp4"
        if not path.exists():
            write_video(path, clip.video)
        clips.append(clip)
    fields = ("position", "velocity", "visibility", "label")
    return {name: np.stack([getattr(c, name) for c in clips]) for name in fields}


def render_world(config: ConfigDict) -> bool:
    """Render what is missing of the world `config.world`.

    Returns:
      Whether anything was rendered; False where the world was complete.

    Raises:
      UserError: the folder holds another world, or is none.
    """
    root = pathlib.Path(config.path)
    looks = world.World(size=config.size, num_frames=config.num_frames)
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
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"world.path={root} is not a folder") from None
    began = time.perf_counter()
    if not started.exists():
        started.write_text(json.dumps({"world": described}))
    total = sum(split.num_videos for split in splits(config))
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool,
        tqdm.tqdm(total=total, desc="rendering", unit=" videos") as progress,
    ):
        for split in splits(config):
            _render_split(root, looks, split, pool, progress)
    seconds = time.perf_counter() - began
    started.write_text(json.dumps({"world": described, "seconds": seconds}))
    started.replace(manifest)
    return True


def _read_manifest(path: pathlib.Path) -> dict | None:
    """Return the settings in a manifest; None where a kill left half of one."""
    try:
        return json.loads(path.read_text())["world"]
    except ValueError:
        return None


def render_seconds(path: str) -> float:
    """Return how long the last rendering of the complete world at `path` took."""
    return json.loads((pathlib.Path(path) / MANIFEST).read_text())["seconds"]


def _render_split(root, looks, split: Split, pool, progress) -> None:
    folder = root / split.name
    folder.mkdir(exist_ok=True)
    chunks = [
        range(i, min(i + _CHUNK, split.num_videos))
        for i in range(0, split.num_videos, _CHUNK)
    ]
    futures = [pool.submit(_render_chunk, folder, looks, split, c) for c in chunks]
    for future, chunk in zip(futures, chunks, strict=True):
        count = len(chunk)
        future.add_done_callback(lambda _, n=count: progress.update(n))
    parts = [future.result() for future in futures]
    truth = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    np.savez_compressed(root / f"{split.name}.npz", **truth)
    lines = [f"{split.name}/{i:06d}.mp4 {k}\n" for i, k in enumerate(truth["label"])]
    (root / f"{split.name}.csv").write_text("".join(lines))
