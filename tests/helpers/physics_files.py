"""Write small data sets of possible and impossible videos."""

import json
import pathlib

import numpy as np
from PIL import Image
from video_files import decode_plainly, moving_frames, write_video

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


INTPHYS2_HEADER = (
    "SceneIndex,name,file_name,game_name,condition,env,type,occluder,Difficulty,Camera"
)


def write_intphys2(root, scenes, num_frames=12):
    """Write a split with its metadata.csv; return {file name: frames as decoded}.

    Args:
      root: folder of the split.
      scenes: {scene: condition}, two pairs each.
      num_frames: of every video.
    """
    (root / "Videos").mkdir(parents=True)
    rows, decoded = [INTPHYS2_HEADER], {}
    types = [f"{n}_{kind}" for n in (1, 2) for kind in ("Possible", "Impossible")]
    for scene, condition in scenes.items():
        for number, kind in enumerate(types):
            name = f"{scene}_{number}"  # says nothing about the label
            path = root / "Videos" / f"{name}.mp4"
            seed = len(rows)
            write_video(path, moving_frames(num_frames, SIZE, SIZE, seed=seed))
            decoded[path.name] = decode_plainly(str(path))
            rows.append(
                f"{scene},{name},Videos/{name}.mp4,Game,{condition},Env_0,{kind},"
                f"None,{'Easy' if scene == '0' else 'Hard'},Fixed"
            )
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return decoded
