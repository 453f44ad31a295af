"""Every kind of bad and of odd video file, with what a reader must make of it.

    python tests/bad_files.py FOLDER

fills FOLDER, which may be shown to `python -m vjepa_jax.check`, and writes
FOLDER/list.csv, which has the entries that a walk over the folder does not find.
"""

import dataclasses
import os
import pathlib
import struct
import sys
from collections.abc import Callable

import av
import numpy as np
import video_files
from hostile_sizes import png, sample_entry, with_frame_side

GOOD = "good"

# Sides of a picture in pixels: the one of the fable, and about the largest that
# FFmpeg's own check of sizes lets through.
_REFUSED_SIDE, _ACCEPTED_SIDE = 20_000, 16_000


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of file.

    Attributes:
      name: of the file; surrogates stand for bytes that are not UTF-8.
      outcomes: `GOOD`, or reasons of `decode.REASONS`: what reading one clip may come
        to. More than one where it depends on the clip, or on FFmpeg's version.
      deep_outcomes: the same where every frame is decoded; None: as `outcomes`.
      is_found: a walk over the folder finds it, being a file with a video's suffix.
    """

    name: str
    outcomes: frozenset[str]
    deep_outcomes: frozenset[str] | None = None
    is_found: bool = True


Maker = Callable[[pathlib.Path], None]
_MAKERS: dict[str, Maker] = {}
CASES: dict[str, Case] = {}


def _case(name: str, *outcomes: str, deep: tuple[str, ...] = (), is_found=True):
    """Register the function that makes a file."""

    def register(make: Maker) -> Maker:
        deep_outcomes = frozenset(deep) if deep else None
        CASES[name] = Case(name, frozenset(outcomes), deep_outcomes, is_found)
        _MAKERS[name] = make
        return make

    return register


def make_all(folder: str | os.PathLike) -> dict[str, Case]:
    """Make all files that this system and this user can have.

    Returns:
      The case of each path, in the order of `list.csv`.
    """
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, case in CASES.items():
        # A super user may read everything; other systems want names in UTF-8.
        if name == _FORBIDDEN and os.geteuid() == 0:
            continue
        if name == _NOT_UTF8 and sys.platform != "linux":
            continue
        _MAKERS[name](folder / name)
        made[str(folder / name)] = case
    with open(folder / "list.csv", "wb") as file:
        for case in made.values():
            file.write(b'"' + os.fsencode(case.name) + b'" 0\n')
    return made


# Good ones, though some are odd.


def _write(path, num_frames=40, height=48, width=64, **options) -> bytes:
    """Write a video of 12 frames per second and return its bytes."""
    frames = video_files.moving_frames(num_frames, height, width)
    # A key frame twice a second: clips from the middle do not need the start.
    options = {"codec_options": {"g": "6"}} | options
    video_files.write_video(path, frames, **options)
    return pathlib.Path(path).read_bytes()


@_case("plain.mp4", GOOD)
def _plain(path):
    _write(path)


@_case("spaces in the name.mp4", GOOD)
def _spaces(path):
    _write(path)


_NOT_UTF8 = os.fsdecode(b"caf\xe9.mp4")


@_case(_NOT_UTF8, GOOD)
def _not_utf8(path):
    _write(path.with_name("tmp.mp4"))
    path.with_name("tmp.mp4").rename(path)  # FFmpeg would write the name as UTF-8


@_case("capitals.MP4", GOOD)
def _capitals(path):
    _write(path.with_name("tmp.mp4"))
    path.with_name("tmp.mp4").rename(path)


@_case("one_frame.mp4", GOOD)
def _one_frame(path):
    _write(path, num_frames=1)


@_case("tiny.mp4", GOOD)
def _tiny(path):
    _write(path, height=2, width=2)


@_case("odd_sides.mp4", GOOD)
def _odd_sides(path):
    _write(path, height=37, width=51, pix_fmt="yuv444p")


@_case("ten_bit.mp4", GOOD)
def _ten_bit(path):
    _write(path, pix_fmt="yuv420p10le")


@_case("variable_rate.mp4", GOOD)
def _variable_rate(path):
    steps = np.random.default_rng(0).integers(20, 200, size=40)
    _write(path, stamps=np.cumsum(steps).tolist())


@_case("rotated.mp4", GOOD)
def _rotated(path):
    video_files.write_rotated_video(path, video_files.moving_frames(40, 48, 64))


@_case("mirrored.mp4", GOOD)
def _mirrored(path):
    frames = video_files.moving_frames(40, 48, 64)
    video_files.write_rotated_video(path, frames, ((-1, 0), (0, 1)))


@_case("late_start.mp4", GOOD)
def _late_start(path):
    _write(path, stamps=[5000 + 80 * i for i in range(40)])


@_case("hidden_start.mp4", GOOD)
def _hidden_start(path):
    video_files.write_trimmed_video(path, video_files.moving_frames(40), num_hidden=5)


@_case("no_frame_count.mkv", GOOD)
def _no_frame_count(path):
    _write(path)


@_case("no_frame_count.ts", GOOD)
def _transport_stream(path):
    _write(path)


@_case("other_suffix.avi", GOOD)
def _other_suffix(path):
    _write(path.with_name("tmp.mp4"))
    path.with_name("tmp.mp4").rename(path)


@_case("animation.gif", GOOD)
def _animation(path):
    _write(path, codec="gif", pix_fmt="rgb8", codec_options={})


@_case("link.mp4", GOOD)
def _link(path):
    _write(path.with_name("tmp.mp4"))
    target = path.with_name("target_of_link")
    path.with_name("tmp.mp4").rename(target)
    _relink(path, target.name)


@_case("cut_at_two_thirds.mp4", GOOD)
def _cut(path):
    content = _write(path, container_options={"movflags": "faststart"})
    path.write_bytes(content[: len(content) * 2 // 3])


@_case("no_duration_in_header.mp4", GOOD)
def _no_duration_in_header(path):
    content = bytearray(_write(path))
    _clear_durations(content)
    path.write_bytes(content)


def _clear_durations(content: bytearray) -> None:
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        struct.pack_into(">I", content, content.index(box) + offset, 0)


# Damage.


def _noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def _media(content: bytes) -> tuple[int, int]:
    """Return start and end of the coded frames in an MP4 with `moov` at its end."""
    return content.index(b"mdat") + 4, content.index(b"moov") - 4


@_case("zeroed_hole.mp4", GOOD, "undecodable", deep=("undecodable",))
def _zeroed_hole(path):
    content = bytearray(_write(path))
    start, end = _media(content)
    third = (end - start) // 3
    content[start + third : end - third] = bytes(end - start - 2 * third)
    path.write_bytes(content)


@_case("flipped_bits.mp4", GOOD, "undecodable", deep=("undecodable",))
def _flipped_bits(path):
    content = bytearray(_write(path))
    start, end = _media(content)
    rng = np.random.default_rng(0)
    for position in rng.integers(start, end, size=(end - start) // 50):
        content[position] ^= 1 << rng.integers(8)
    path.write_bytes(content)


@_case("nothing_but_noise_in_it.mp4", "undecodable", "no_frames")
def _noise_inside(path):
    content = _write(path)
    start, end = _media(content)
    path.write_bytes(content[:start] + _noise(end - start) + content[end:])


@_case("missing.mp4", "missing", is_found=False)
def _missing(path):
    path.unlink(missing_ok=True)


@_case("empty.mp4", "empty")
def _empty(path):
    path.write_bytes(b"")


@_case("index_lost.mp4", "not_a_video")
def _index_lost(path):
    content = _write(path)
    path.write_bytes(content[: content.index(b"moov") - 4])


@_case("frames_lost.mp4", "no_frames", "undecodable", "not_a_video")
def _frames_lost(path):
    content = _write(path, container_options={"movflags": "faststart"})
    path.write_bytes(content[: content.index(b"mdat") + 4])


@_case("text.mp4", "not_a_video")
def _text(path):
    path.write_text("this is not a video\n" * 100)


@_case("web_page.mp4", "not_a_video")
def _web_page(path):
    path.write_text("<!DOCTYPE html><html><title>404 Not Found</title></html>\n")


@_case("playlist.mp4", "not_a_video", "undecodable", "no_video_stream", "unreadable")
def _playlist(path):
    path.write_text("#EXTM3U\n#EXTINF:9,\n/dev/zero\n#EXT-X-ENDLIST\n")


@_case("random.mp4", "not_a_video", "no_video_stream", "no_frames", "undecodable")
def _random(path):
    path.write_bytes(_noise(100_000))


@_case("animated.webp", "animated_webp")
def _animated_webp(path):
    video_files.write_animation(path, video_files.moving_frames(6))


@_case("sound.mp4", "no_video_stream")
def _sound(path):
    video_files.write_sound(path)


@_case("no_frames.mp4", "no_frames", "no_video_stream")
def _no_frames(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()


@_case("no_sample_times.mp4", GOOD, "zero_duration")
def _no_sample_times(path):
    content = bytearray(_write(path, codec_options={"g": "6", "bf": "0"}))
    _clear_durations(content)
    # Times to samples: flags, number of entries, then count and duration of each.
    start = content.index(b"stts") + 8
    (num_entries,) = struct.unpack_from(">I", content, start)
    for i in range(num_entries):
        struct.pack_into(">I", content, start + 8 + 8 * i, 0)
    path.write_bytes(content)


@_case("zero_duration.mkv", "zero_duration")
def _zero_duration(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in video_files.moving_frames(10, 48, 64):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            for packet in stream.encode(frame):
                packet.pts = packet.dts = packet.duration = 0
                container.mux(packet)


@_case("endless_index.mp4", GOOD, "not_a_video", "undecodable", "no_frames")
def _endless_index(path):
    content = bytearray(_write(path))
    # Sizes of samples: flags, the one size of all, their number.
    struct.pack_into(">II", content, content.index(b"stsz") + 8, 1, (1 << 31) - 1)
    path.write_bytes(content)


# Hostile sizes.


@_case("huge_in_container.mp4", GOOD, "too_large")
def _huge_in_container(path):
    content = bytearray(_write(path))
    # Width and height of the sample entry; the frames themselves are as before.
    side = _REFUSED_SIDE
    struct.pack_into(">HH", content, sample_entry(content) + 28, side, side)
    path.write_bytes(content)


@_case("huge_in_stream.mp4", "too_large", "undecodable")
def _huge_in_stream(path):
    path.write_bytes(with_frame_side(_write_baseline(path), _REFUSED_SIDE))


@_case("as_huge_as_accepted.mp4", "too_large", "undecodable")
def _as_huge_as_accepted(path):
    path.write_bytes(with_frame_side(_write_baseline(path), _ACCEPTED_SIDE))


@_case("bomb.png", "too_large", "undecodable", is_found=False)
def _bomb_png(path):
    path.write_bytes(png(_ACCEPTED_SIDE))


@_case("bomb.gif", "too_large", "undecodable")
def _bomb_gif(path):
    _write(path, codec="gif", pix_fmt="rgb8", codec_options={})
    content = bytearray(path.read_bytes())
    struct.pack_into("<2H", content, 6, _ACCEPTED_SIDE, _ACCEPTED_SIDE)
    path.write_bytes(content)


def _write_baseline(path) -> bytes:
    """Write H.264 whose parameters have none of the later profiles' fields."""
    return _write(path, codec_options={"profile": "baseline", "g": "6"})


# Not files.


@_case("pipe.mp4", "not_a_file")
def _pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@_case("folder.mp4", "unreadable", "not_a_file", is_found=False)
def _folder(path):
    path.mkdir(exist_ok=True)


_FORBIDDEN = "forbidden.mp4"


@_case(_FORBIDDEN, "unreadable")
def _forbidden(path):
    path.unlink(missing_ok=True)
    _write(path)
    path.chmod(0)


def _relink(path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@_case("link_to_nothing.mp4", "missing")
def _link_to_nothing(path):
    _relink(path, "nothing")


@_case("link_to_itself.mp4", "missing", "unreadable")
def _link_to_itself(path):
    _relink(path, path.name)


@_case("plain.mp4/inside.mp4", "missing", is_found=False)
def _inside_a_file(path):
    del path


@_case("n" * 300 + ".mp4", "missing", "unreadable", is_found=False)
def _long_name(path):
    del path


def main() -> None:
    """Fill the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    made = make_all(sys.argv[1])
    for case in made.values():
        print(f"{case.name!a:30.30} {' or '.join(sorted(case.outcomes))}")


if __name__ == "__main__":
    main()
