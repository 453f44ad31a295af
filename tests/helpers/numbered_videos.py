"""Short videos with a number in their frames, in a folder and in lists."""

import video_files

from vjepa_jax.data.sources.open import open_mixture

NUM_VIDEOS = 11


def write_folder(folder):
    """Write videos of two classes; return the folder."""
    for i in range(NUM_VIDEOS):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        video_files.write_video(
            folder / "ab"[i % 2] / f"{i:02}.mp4",
            video_files.moving_frames(12, height=32, width=32, seed=i),
        )
    return folder


def make_list(path, folder, *, bad=(), name="list.csv"):
    """List all videos by name, some of them replaced by broken files."""
    lines = []
    for i in range(NUM_VIDEOS):
        entry = folder / "ab"[i % 2] / f"{i:02}.mp4"
        if i in bad:
            entry = path / f"bad{i}.mp4"
            entry.write_text("not a video")
        lines.append(f"{entry} {i}\n")
    (path / name).write_text("".join(lines))
    return open_mixture(str(path / name))
