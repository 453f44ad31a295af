"""Write small data sets of possible and impossible videos."""

import json
import pathlib

import numpy as np
from PIL import Image

from vjepa_jax.config.defaults import get_config
from vjepa_jax.world import render

SIZE = 16  # side of the frames in pixels


def write_frames(folder, frames):
    folder.mkdir(parents=True)
    for number, pixels in enumerate(frames, start=1):
        Image.fromarray(pixels).save(folder / f"scene_{number:03d}.png")


def quadruplet(rng, num_frames=12, parts_at=5):
    """Return four videos: 0 begins as `partner` does, the others as each other."""
    starts = [rng.integers(0, 256, (num_frames, SIZE, SIZE, 3), np.uint8) for _ in "ab"]
    ends = [rng.integers(0, 256, (num_frames, SIZE, SIZE, 3), np.uint8) for _ in "ab"]
    return [
        np.concatenate([start[:parts_at], end[parts_at:]])
        for start in starts
        for end in ends
    ]


def write_intphys(root, scenes, labels=(True, False, False, True)):
    """Write scenes of quadruplets; the labels are in the videos' order."""
    for name, videos in scenes.items():
        for number, (frames, label) in enumerate(zip(videos, labels, strict=True), 1):
            folder = root / name / str(number)
            write_frames(folder / "scene", frames)
            if label is not None:
                status = {"header": {"is_possible": label}, "frames": []}
                (folder / "status.json").write_text(json.dumps(status))


def render_pairs(root: pathlib.Path) -> None:
    """Render a world with two pairs of each property, of 12 frames."""
    config = get_config().world
    config.path = str(root)
    config.size, config.num_frames, config.physics_pairs = SIZE, 12, 2
    for key in config:
        if key.endswith("_videos"):
            config[key] = 1
    render.render_world(config)
