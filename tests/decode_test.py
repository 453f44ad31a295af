import dataclasses
import errno
import io
import os

import numpy as np
import pytest
import video_files

from vjepa_jax.data import decode, media, packets
from vjepa_jax.data.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Record:
    path: str
    media: bytes | np.ndarray | None = None
    fps: float | None = None


def whole_frame(height, width):
    return 0, 0, height, width


def read(path, *, rng=None, num_frames=8, frame_step=1, size=48, crop=whole_frame):
    return decode.read_clip(
        str(path),
        num_frames=num_frames,
        frame_step=frame_step,
        rng=rng,
        size=size,
        crop=crop,
    )


VFR_STAMPS = np.cumsum([40, 40, 200, 33, 67, 40, 10, 90] * 5).tolist()
LATE_STAMPS = [5000 + 80 * i for i in range(40)]

X265 = "keyint=10:log-level=error:pools=none"

FILES = {
    "h264.mp4": {},
    "b_frames.mp4": {"codec_options": {"bf": "3", "g": "12", "sc_threshold": "0"}},
    "open_gop.mkv": {
        "codec_options": {"x264-params": "keyint=10:open-gop=1:bframes=3"}
    },
    "vfr.mp4": {"stamps": VFR_STAMPS, "codec_options": {"g": "10"}},
    "late.mkv": {"stamps": LATE_STAMPS, "codec_options": {"g": "10"}},
    "stream.ts": {"codec_options": {"g": "10"}},
    "hevc.mp4": {
        "codec": "libx265",
        "codec_options": {"x265-params": X265 + ":bframes=3"},
    },
    "hevc_open_gop.mkv": {
        "codec": "libx265",
        "codec_options": {"x265-params": X265 + ":open-gop=1"},
    },
    "av1.mp4": {"codec": "libsvtav1", "codec_options": {"preset": "12", "g": "10"}},
    "ten_bits.mp4": {"pix_fmt": "yuv420p10le", "codec_options": {"g": "10"}},
    "full_range.mp4": {"pix_fmt": "yuvj420p", "codec_options": {"g": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"cpu-used": "8", "g": "10"}},
    "vp8.webm": {
        "codec": "libvpx",
        "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "10"},
    },
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "10"}},
    "mpeg4.mp4": {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "10"}},
    "mpeg1.mpg": {"codec": "mpeg1video", "fps": 25},
    "picture.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    # x265 writes beyond its memory where frames are smaller than its largest block.
    frames = {side: video_files.moving_frames(40, side, side) for side in (48, 64)}
    return {
        name: video_files.write_video(
            folder / name, frames[64 if "hevc" in name else 48], **options
        )
        for name, options in FILES.items()
    }


def assert_clips_match_plain_decode(path):
    plain = video_files.decode_plainly(path)
    for seed in range(6):
        sampling = Sampling(8, frame_step=1 + 2 * seed)
        clips = decode.read_clips(
            path,
            sampling=sampling,
            rng=np.random.default_rng(seed),
            size=plain.shape[1],
            crop=whole_frame,
        )
        wanted = sampling.frames(
            np.arange(len(plain)), None, np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(clips, plain[wanted], err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_plain_decode(files, name):
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_large_files_are_sought_in(files, name, monkeypatch):
    monkeypatch.setattr(packets, "_MAX_HELD_BYTES", 0)
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_files_whose_index_fails_are_counted(files, name, monkeypatch):
    monkeypatch.setattr(packets, "decode_indexed", lambda *args: False)
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", sorted(set(FILES) - {"mpeg4.avi", "vp8.webm"}))
def test_no_file_is_decoded_from_the_start_without_need(files, name, monkeypatch):
    monkeypatch.setattr(packets, "decode_counted", None)
    assert_clips_match_plain_decode(files[name])


def test_only_packets_on_the_way_to_a_frame_are_decoded(tmp_path, monkeypatch):
    path = video_files.write_video(
        tmp_path / "x.mp4",
        video_files.moving_frames(60),
        codec_options={"g": "10", "bf": "0", "sc_threshold": "0"},
    )
    ways = []
    decode_indexed = packets.decode_indexed

    def recorded(media, container, stream, index, wanted, on_frame):
        ways.append([(s.start, s.stop) for s in packets._spans(index, wanted)])
        return decode_indexed(media, container, stream, index, wanted, on_frame)

    monkeypatch.setattr(packets, "decode_indexed", recorded)
    # The middle windows start at frames 0, 10, 29 and 2.
    for num_frames, step, expected in [
        (60, 1, [(0, 59)]),
        (40, 1, [(10, 49)]),
        (2, 1, [(20, 30)]),
        (4, 18, [(0, 2), (20, 20), (30, 38), (50, 56)]),
    ]:
        read(path, num_frames=num_frames, frame_step=step)
        assert ways.pop() == expected


def test_frames_are_chosen_by_their_time(files):
    plain = video_files.decode_plainly(files["vfr.mp4"])
    times = (np.array(VFR_STAMPS) - VFR_STAMPS[0]) / 1000
    sampling = Sampling(6, fps=5.0)
    clip = decode.read_clips(
        files["vfr.mp4"], sampling=sampling, size=48, crop=whole_frame
    )
    wanted = sampling.frames(times)
    np.testing.assert_array_equal(clip, plain[wanted])
    assert (np.abs(np.diff(times[wanted[0]]) - 0.2) < 0.2).all()


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "stream.ts"])
def test_the_official_rule_steps_by_the_stated_frame_rate(files, name):
    plain = video_files.decode_plainly(files[name])
    clip = decode.read_clips(
        files[name],
        sampling=Sampling(6, fps=5, rule="official"),
        size=48,
        crop=whole_frame,
    )
    # ceil(12) // 5 = 2
    np.testing.assert_array_equal(clip[0], plain[[0, 2, 4, 7, 9, 11]])
    with pytest.raises(decode.DecodeError) as caught:
        decode.read_clips(
            files[name],
            sampling=Sampling(6, fps=13, rule="official"),
            size=48,
            crop=whole_frame,
        )
    assert caught.value.reason == "low_frame_rate"


@pytest.mark.parametrize("held_bytes", [packets._MAX_HELD_BYTES, 0])
def test_several_clips_come_from_one_pass(files, monkeypatch, held_bytes):
    monkeypatch.setattr(packets, "_MAX_HELD_BYTES", held_bytes)
    plain = video_files.decode_plainly(files["b_frames.mp4"])
    sampling = Sampling(5, frame_step=2, num_clips=3)
    corners = iter([(0, 0), (3, 5), (8, 8)])
    clips = decode.read_clips(
        files["b_frames.mp4"],
        sampling=sampling,
        rng=np.random.default_rng(7),
        size=40,
        crop=lambda *_: (*next(corners), 40, 40),
    )
    wanted = sampling.frames(np.arange(40), None, np.random.default_rng(7))
    for clip, numbers, (top, left) in zip(
        clips, wanted, [(0, 0), (3, 5), (8, 8)], strict=True
    ):
        expected = plain[numbers, top : top + 40, left : left + 40]
        np.testing.assert_array_equal(clip, expected)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_short_videos_end_in_their_last_frame(tmp_path, num_frames):
    path = video_files.write_video(
        tmp_path / "short.mp4", video_files.moving_frames(num_frames)
    )
    plain = video_files.decode_plainly(path)
    clip = read(path, rng=np.random.default_rng(0), num_frames=8)
    np.testing.assert_array_equal(clip[:num_frames], plain)
    assert (clip[num_frames:] == plain[-1]).all()


def test_rotation_is_applied(tmp_path):
    path = video_files.write_rotated_video(
        tmp_path / "rotated.mp4", video_files.moving_frames(8, height=32, width=48)
    )
    shown = np.rot90(video_files.decode_plainly(path), -1, axes=(1, 2))
    asked = []

    def crop(height, width):
        asked.append((height, width))
        return 10, 4, 24, 24

    np.testing.assert_array_equal(read(path, size=24, crop=crop), shown[:, 10:34, 4:28])
    assert asked == [(48, 32)]
    # Resizing takes another way through the memory of a turned frame.
    halved = read(path, size=12, crop=crop).astype(float)
    means = shown[:, 10:34, 4:28].reshape(8, 12, 2, 12, 2, 3).mean((2, 4))
    assert np.abs(halved - means).mean() < 6


@pytest.mark.parametrize("held_bytes", [packets._MAX_HELD_BYTES, 0])
def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path, monkeypatch, held_bytes):
    path = video_files.write_trimmed_video(
        tmp_path / "trimmed.mp4", video_files.moving_frames(40), num_hidden=5
    )
    assert len(video_files.decode_plainly(path)) == 35
    monkeypatch.setattr(packets, "_MAX_HELD_BYTES", held_bytes)
    monkeypatch.setattr(packets, "decode_counted", None)
    assert_clips_match_plain_decode(path)


@pytest.mark.parametrize("top, left, side", [(0, 0, 24), (7, 13, 24), (24, 24, 24)])
def test_crop_is_exact(files, top, left, side):
    plain = video_files.decode_plainly(files["h264.mp4"])[16:24]
    clip = read(files["h264.mp4"], size=side, crop=lambda *_: (top, left, side, side))
    np.testing.assert_array_equal(clip, plain[:, top : top + side, left : left + side])


def test_odd_sizes_and_enlarging(tmp_path):
    path = video_files.write_video(
        tmp_path / "odd.mkv",
        video_files.moving_frames(8, height=37, width=51),
        pix_fmt="yuv444p",
    )
    plain = video_files.decode_plainly(path)
    clip = read(path, size=74, crop=lambda h, w: (0, 14, 37, 37)).astype(float)
    means = clip.reshape(8, 37, 2, 37, 2, 3).mean((2, 4))
    assert np.abs(means - plain[:, :, 14:]).mean() < 3


def test_shrinking_is_antialiased(tmp_path):
    board = np.indices((48, 48)).sum(0) % 2 * 255
    frames = np.tile(board[None, ..., None], (4, 1, 1, 3)).astype(np.uint8)
    path = video_files.write_video(
        tmp_path / "board.mp4", frames, codec_options={"qp": "0"}
    )
    assert read(path, num_frames=4).std() > 100
    assert read(path, num_frames=4, size=16).std() < 20


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
def test_bad_files_say_why(tmp_path, good_bytes, kind, reason):
    path = tmp_path / "bad.mp4"
    make_bad_file(path, kind, good_bytes)
    with pytest.raises(decode.DecodeError, match=r"bad\.mp4") as caught:
        read(path)
    assert caught.value.reason == reason
    assert caught.value.path == str(path)
    assert reason in decode.REASONS


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


def test_no_mutation_escapes_as_another_error(tmp_path, good_bytes):
    rng = np.random.default_rng(0)
    path = tmp_path / "mutated.mp4"
    outcomes = set()
    for _ in range(60):
        content = bytearray(good_bytes)
        for position in rng.integers(len(content), size=rng.integers(1, 200)):
            content[position] = rng.integers(256)
        path.write_bytes(content)
        try:
            assert read(path, rng=rng).shape == (8, 48, 48, 3)
            outcomes.add("clip")
        except decode.DecodeError as error:
            outcomes.add(error.reason)
    assert "clip" in outcomes and len(outcomes) > 1


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
    """Makes reading fail once with each error; returns how long was waited."""
    waits = []
    monkeypatch.setattr(
        media,
        "_open_file",
        lambda *_: Failing(content, errors.pop() if errors else None),
    )
    monkeypatch.setattr(media, "_READ_BYTES", 1000)
    monkeypatch.setattr(media.time, "sleep", waits.append)
    return waits


def test_passing_io_errors_do_not_change_the_clip(monkeypatch, good_bytes):
    record = Record("x.mp4", good_bytes)
    options = {"sampling": Sampling(8, frame_step=1), "size": 48, "crop": whole_frame}
    expected = decode.read_clips(record, rng=np.random.default_rng(3), **options)
    errors = [OSError(errno.ESTALE, "stale"), ConnectionError("reset"), KeyError("x")]
    waits = fail_with(monkeypatch, good_bytes, errors)
    clips = decode.read_clips("x.mp4", rng=np.random.default_rng(3), **options)
    np.testing.assert_array_equal(clips, expected)
    assert waits == [0.5, 2.0, 8.0]


@pytest.mark.parametrize("code, num_waits", [(errno.EIO, 3), (errno.EACCES, 0)])
def test_lasting_io_errors_make_a_bad_file(monkeypatch, good_bytes, code, num_waits):
    waits = fail_with(monkeypatch, good_bytes, [OSError(code, "no")] * 99)
    with pytest.raises(decode.DecodeError) as caught:
        read("x.mp4")
    assert caught.value.reason == "unreadable"
    assert len(waits) == num_waits
