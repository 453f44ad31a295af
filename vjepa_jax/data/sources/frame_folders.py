"""Folders of the extracted frames of videos, whose names end in numbers.

VIDEO/img_00001.jpg
VIDEO/img_00002.jpg

They are read where every frame has a label image. As videos to learn from they are not
read, but pointed out.
"""

import math
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence

_NUMBERED = re.compile(r"(.*?)([0-9]+)(\.\w+)", re.DOTALL)
_MIN_FRAMES = 3
_MAX_GAPS = 0.25  # missing numbers per image


def in_order(name: str) -> list[str | int]:
    """Return the key by which names of frames are sorted: 9 comes before 10."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def find(images: Iterable[str]) -> list[list[str]]:
    """Return images that are numbered in a row, like the frames of one video.

    Args:
      images: paths with `/`.

    Returns:
      The paths of each such group in the order of their numbers, which may have a
      constant step and some gaps; the group's paths differ by the number only.
    """
    found: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for path in images:
        folder, slash, name = path.rpartition("/")
        if match := _NUMBERED.fullmatch(name):
            prefix, number, suffix = match.groups()
            found[folder + slash + prefix, suffix][int(number)] = path
    groups = []
    for numbered in found.values():
        numbers = sorted(numbered)
        span, step = (
            numbers[-1] - numbers[0],
            math.gcd(*(n - numbers[0] for n in numbers)),
        )
        if len(numbers) >= _MIN_FRAMES and span < (1 + _MAX_GAPS) * len(numbers) * step:
            groups.append([numbered[number] for number in numbers])
    return groups


def command(folder: str, images: Sequence[str]) -> str:
    """Return the command that makes a video of a folder's images.

    Args:
      folder: of the images.
      images: their names, in order.
    """
    order = ["-pattern_type", "glob"]
    prefix, number, suffix = "", "", os.path.splitext(images[0])[1]
    if match := _NUMBERED.fullmatch(images[0]):
        prefix, number, suffix = match.groups()
    pattern = f"{prefix}*{suffix}"
    if number and list(images) != sorted(images):  # 9 comes before 10
        order, pattern = ["-start_number", number], f"{prefix}%d{suffix}"
    frames, video = os.path.join(folder, pattern), folder.rstrip("/") + ".mp4"
    words = ["ffmpeg", "-framerate", "FPS", *order, "-i", frames]
    return shlex.join([*words, "-pix_fmt", "yuv420p", video])
