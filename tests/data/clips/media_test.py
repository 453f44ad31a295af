"""What cannot be read, and where bytes come from."""

import errno
import io
import os
import struct
import zlib

import numpy as np
import PIL.features
import PIL.Image
import pytest
import tiled_images
import video_files
from clip_files import Record, read, read_clips, whole_frame, write_files

from vjepa_jax.data.clips import media, reader
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.clips.sampling import Sampling


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def good_bytes(files):
    with open(files["h264.mp4"], "rb") as file:
        return file.read()


def overwrite(content, start, stop):
    noise = np.random.default_rng(0).bytes(stop - start)
    return content[:start] + noise + content[stop:]


def make_bad_file(path, kind, good_bytes):
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("this is not a video\n" * 100)
    elif kind == "sound":
        video_files.write_sound(path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "playlist":
        path.write_text("ffconcat version 1.0\nfile good.mp4\n")
        path.with_name("good.mp4").write_bytes(good_bytes)
    elif kind == "folder":
        path.mkdir()
    elif kind == "half":
        path.write_bytes(good_bytes[: len(good_bytes) // 2])
    elif kind == "noise":
        start = good_bytes.index(b"mdat") + 4
        path.write_bytes(overwrite(good_bytes, start, good_bytes.index(b"moov") - 4))


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("missing", "missing"),
        ("empty", "empty"),
        ("text", "not_a_video"),
        ("sound", "no_video_stream"),
        ("folder", "not_a_file"),
        ("pipe", "not_a_file"),
        ("device", "not_a_file"),
        ("playlist", "not_a_video"),
        ("half", "not_a_video"),
        ("noise", "undecodable"),
    ],
)
def test_bad_files_have_a_reason(tmp_path, good_bytes, kind, reason):
    path = tmp_path / "bad.mp4"
    make_bad_file(path, kind, good_bytes)
    with pytest.raises(media.DecodeError, match=r"bad\.mp4") as caught:
        read(path)
    assert caught.value.reason == reason
    assert caught.value.path == str(path)
    assert reason in media.REASONS


@pytest.mark.parametrize(
    "suffix, has_opacity",
    [(".gif", 0), (".png", 0), (".png", 1), (".apng", 0), (".avif", 0), (".avif", 1)],
)
def test_animated_images_are_videos(tmp_path, rng, suffix, has_opacity):
    if suffix == ".avif" and not PIL.features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    frames = video_files.moving_frames(12, 32, 32)
    # AVIF has a still image beside the video, and the colours of its frames are close.
    options = {"quality": 95, "subsampling": "4:4:4"} if suffix == ".avif" else {}
    # More bytes than the colours, so that FFmpeg prefers it.
    opacity = rng.integers(99, 256, (*frames.shape[:3], has_opacity), np.uint8)
    stored = np.concatenate([frames, opacity], axis=-1)
    path = video_files.write_animation(tmp_path / f"a{suffix}", stored, **options)
    with open(path, "rb") as file:
        records = [path, Record(f"a{suffix}", file.read())]
    for record in records:
        for deep in (False, True):
            info = reader.inspect(record, deep=deep)
            assert (info.frames, round(info.fps, 3)) == (12, 10)
        clip = read(record, num_frames=6, frame_step=2, size=32)
        assert video_files.psnr(clip, frames[::2][:6]) > 24


def test_images_of_tiles_are_named(tmp_path):
    if not PIL.features.check("avif"):
        pytest.skip("this Pillow cannot write AVIF")
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (200, 200, 10)]
    content = tiled_images.tiled_avif(colours)
    with PIL.Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    corners = pixels[[5, 5, -5, -5], [5, -5, 5, -5]]
    assert np.abs(corners - colours).max() < 20  # the file is a good one
    for record in (Record("a.avif", content), Record("a.heic", content)):
        for look in (read, reader.inspect):
            with pytest.raises(media.DecodeError, match="convert it to JPEG") as caught:
                look(record)
            assert caught.value.reason == "tiled_image"


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM"}])
def test_animated_webp_is_named(tmp_path, options):
    frames = video_files.moving_frames(3)
    path = video_files.write_animation(tmp_path / "a.webp", frames, **options)
    with open(path, "rb") as file:
        records = [path, Record(path, file.read())]
    for record in records:
        for look in (read, reader.inspect):
            with pytest.raises(media.DecodeError, match="convert it to MP4") as caught:
                look(record)
            assert caught.value.reason == "animated_webp"


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_truncated_files_give_the_frames_they_have(tmp_path, codec):
    path = video_files.write_video(
        tmp_path / "whole.mp4",
        video_files.moving_frames(40, height=128, width=128),
        codec=codec,
        codec_options={"bf": "0"},
        container_options={"movflags": "faststart"},
    )
    plain = video_files.decode_plainly(path)
    with open(path, "r+b") as file:
        file.truncate(len(file.read()) * 2 // 3)
    clip = read(path, num_frames=40, size=128)
    num_left = int((clip == plain).all((1, 2, 3)).argmin())
    assert 8 < num_left < 40
    assert (clip[num_left:] == plain[num_left - 1]).all()


def test_damage_in_the_middle_gives_a_clip(tmp_path, good_bytes):
    path = tmp_path / "damaged.mp4"
    start = good_bytes.index(b"mdat") + (len(good_bytes) // 2)
    path.write_bytes(overwrite(good_bytes, start, start + 300))
    first = read(path, rng=np.random.default_rng(0), num_frames=40)
    again = read(path, rng=np.random.default_rng(0), num_frames=40)
    np.testing.assert_array_equal(first, again)


def damaged(content, rng):
    """Flip bytes, cut off the end, zero a part, or double a part."""
    content = bytearray(content)
    start, stop = sorted(rng.integers(len(content), size=2).tolist())
    kind = rng.integers(4)
    if kind == 0:
        for position in rng.integers(len(content), size=rng.integers(1, 200)):
            content[position] = rng.integers(256)
    elif kind == 1:
        del content[start:]
    elif kind == 2:
        content[start:stop] = bytes(stop - start)
    else:
        content[start:start] = content[start:stop]
    return bytes(content)


@pytest.mark.parametrize("name", ["h264.mp4", "hevc.mp4", "vp9.webm", "stream.ts"])
def test_no_damage_escapes_as_another_error(files, name):
    rng = np.random.default_rng(len(name))
    with open(files[name], "rb") as file:
        content = file.read()
    outcomes, square = set(), {"size": 32, "crop": whole_frame}
    for _ in range(40):
        record = Record("x" + name[-4:], damaged(content, rng))
        sampling = Sampling(8, fps=float(rng.integers(1, 9)), num_clips=2)
        for look, options in (
            (reader.inspect, {"deep": True}),
            (read_clips, {"sampling": sampling, "rng": rng, **square}),
        ):
            try:
                look(record, **options)
                outcomes.add("fine")
            except media.DecodeError as error:
                assert error.reason in media.REASONS
                outcomes.add(error.reason)
    assert "fine" in outcomes and len(outcomes) > 1


def test_hostile_sizes_are_refused(tmp_path):
    side = 272
    path = video_files.write_video(
        tmp_path / "x.webm", video_files.moving_frames(2, side, side), codec="libvpx"
    )
    with open(path, "rb") as file:
        content = file.read()
    start_code = b"\x9d\x01\x2a"  # of a key frame of VP8; width and height follow
    size = struct.pack("<2H", side, side)
    assert start_code + size in content
    lying = content.replace(
        start_code + size, start_code + struct.pack("<2H", 16383, 16383)
    )
    # The width and height that Matroska states, of two bytes each.
    stated = struct.pack(">4H", 0xB082, side, 0xBA82, side)
    assert stated in content
    hostile = lying.replace(stated, struct.pack(">4H", 0xB082, 16383, 0xBA82, 16383))
    for look in (read, reader.inspect):
        with pytest.raises(media.DecodeError, match="16383 x 16383") as caught:
            look(Record("x.webm", hostile))
        assert caught.value.reason == "too_large"
        # Where the container states less, the decoder refuses what the frames state.
        with pytest.raises(media.DecodeError) as caught:
            look(Record("x.webm", lying))
        assert caught.value.reason == "undecodable"
        look(Record("x.webm", content), limits=Limits(side * side))
        with pytest.raises(media.DecodeError) as caught:
            look(Record("x.webm", content), limits=Limits(side * side - 1))
        assert caught.value.reason == "too_large"


def one_png():
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_picture_that_is_too_large_is_refused():
    png = bytearray(one_png())
    png[16:24] = struct.pack(">2I", 100_000, 100_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    with pytest.raises(media.DecodeError):
        read(Record("x.png", bytes(png)))


def test_slow_decoding_is_stopped(files):
    for look in (reader.inspect, read):
        with pytest.raises(media.DecodeError, match=r"over 0 s") as caught:
            look(files["h264.mp4"], limits=Limits(time_limit_secs=0))
        assert caught.value.reason == "too_slow"


def test_videos_without_duration_are_refused(tmp_path, monkeypatch):
    path = video_files.write_video(tmp_path / "x.mkv", video_files.moving_frames(8))

    class Packet:
        is_discard = is_keyframe = is_corrupt = False
        pts, dts, size = 5, None, 1

    monkeypatch.setattr(
        media.VideoStream, "packets", lambda *_: iter([Packet(), Packet(), Packet()])
    )
    with pytest.raises(media.DecodeError) as caught:
        read(path)
    assert caught.value.reason == "zero_duration"


def test_bytes_and_urls_give_the_clips_of_the_file(files, monkeypatch, good_bytes):
    expected = read(files["h264.mp4"])
    np.testing.assert_array_equal(read(Record("x", good_bytes)), expected)
    asked = []

    class Remote:
        def __init__(self, url):
            self.url = url

        def open(self, mode):
            asked.append((self.url, mode))
            if "nothing" in self.url:
                raise FileNotFoundError(self.url)
            return io.BytesIO(good_bytes)

    monkeypatch.setattr(media.epath, "Path", Remote)
    np.testing.assert_array_equal(read("gs://videos/x.mp4"), expected)
    assert asked == [("gs://videos/x.mp4", "rb")]
    with pytest.raises(media.DecodeError) as caught:
        read("gs://videos/nothing.mp4")
    assert caught.value.reason == "missing"


class Failing(io.BytesIO):
    """A file that fails where the frames are, if there is an error to fail with."""

    def __init__(self, content, error):
        super().__init__(content)
        self.error = error

    def read(self, *args):
        if self.error and self.tell() > 1000:
            raise self.error
        return super().read(*args)


def fail_with(monkeypatch, content, errors):
    """Make reading fail once with each error; return the waits in seconds."""
    waits = []
    monkeypatch.setattr(
        media,
        "_open_file",
        lambda *_: Failing(content, errors.pop() if errors else None),
    )
    monkeypatch.setattr(media, "_READ_BYTES", 1000)
    monkeypatch.setattr(media.time, "sleep", waits.append)
    return waits


def test_transient_io_errors_do_not_change_the_clip(monkeypatch, good_bytes):
    record = Record("x.mp4", good_bytes)
    options = {"sampling": Sampling(8, frame_step=1), "size": 48, "crop": whole_frame}
    expected = read_clips(record, rng=np.random.default_rng(3), **options)
    errors = [OSError(errno.ESTALE, "stale"), ConnectionError("reset"), KeyError("x")]
    waits = fail_with(monkeypatch, good_bytes, errors)
    clips = read_clips("x.mp4", rng=np.random.default_rng(3), **options)
    np.testing.assert_array_equal(clips, expected)
    assert waits == [0.5, 2.0, 8.0]


@pytest.mark.parametrize("code, num_waits", [(errno.EIO, 3), (errno.EACCES, 0)])
def test_permanent_io_errors_make_a_bad_file(monkeypatch, good_bytes, code, num_waits):
    waits = fail_with(monkeypatch, good_bytes, [OSError(code, "no")] * 99)
    with pytest.raises(media.DecodeError) as caught:
        read("x.mp4")
    assert caught.value.reason == "unreadable"
    assert len(waits) == num_waits
