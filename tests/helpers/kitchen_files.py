"""Write a tiny EPIC-KITCHENS-100."""

import csv

import numpy as np
import video_files

FPS = 10  # of the videos
SIDE = 16  # of the frames in pixels
COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "narration_timestamp",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "narration",
    "verb",
    "verb_class",
    "noun",
    "noun_class",
)


def stamp(secs):
    """Format a time as in the data set, to hundredths of a second."""
    hours, rest = divmod(round(secs * 100), 360000)
    minutes, rest = divmod(rest, 6000)
    return f"{hours:02d}:{minutes:02d}:{rest / 100:05.2f}"


def write_annotations(path, rows):
    """Write rows of (video, start, stop in seconds, verb, noun) as released."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (video, start, stop, verb, noun) in enumerate(rows):
            values = {
                "narration_id": f"{video}_{number}",
                "participant_id": video.split("_")[0],
                "video_id": video,
                "start_timestamp": stamp(start),
                "stop_timestamp": stamp(stop),
                "start_frame": int(start * FPS),
                "stop_frame": int(stop * FPS),
                "narration": 'take, then "put"',
                "verb_class": verb,
                "noun_class": noun,
            }
            writer.writerow({key: values.get(key, "x") for key in COLUMNS})
    return str(path)


VERBS, NOUNS = (0, 5, 9), (2, 3, 7)


def write_kitchen(root, num_videos, seed=0):
    """Write videos in which colours foretell actions, and both lists.

    Every 3 s, half a second of a colour is followed, after 1.2 s, by an action that
    takes 0.6 s: the verb is which colour it is, the noun how bright. All else is noise.

    Args:
      root: folder to fill.
      num_videos: of six actions each; the last quarter is for the test.
      seed: of all that is drawn.
    """
    rng = np.random.default_rng(seed)
    lists = {"train": [], "test": []}
    (root / "P01" / "videos").mkdir(parents=True)
    for number in range(num_videos):
        video = f"P01_{number:02d}"
        frames = rng.integers(0, 40, (6 * 3 * FPS, SIDE, SIDE, 3), dtype=np.uint8)
        for action in range(6):
            verb, noun = rng.integers(0, 3, 2)
            begin = action * 3 * FPS + 5
            frames[begin : begin + 5, ..., verb] += np.uint8(50 + 80 * noun)
            start = (begin + 5) / FPS + 1.2
            row = (video, start, start + 0.6, VERBS[verb], NOUNS[noun])
            lists["test" if number >= 3 * num_videos // 4 else "train"].append(row)
        options = {"codec_options": {"g": "5", "crf": "12"}, "fps": FPS}
        path = root / "P01" / "videos" / f"{video}.MP4"
        video_files.write_video(path, frames, **options)
    for name, rows in lists.items():
        write_annotations(root / f"EPIC_100_{name}.csv", rows)
    return lists
