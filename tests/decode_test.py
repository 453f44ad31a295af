import dataclasses
import errno

import numpy as np
import pytest
import video_files
from hypothesis import given
from hypothesis import strategies as st

from vjepa_jax.data import decode
from vjepa_jax.default_config import UserError


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


sampling_cases = st.fixed_dictionaries(
    {
        "num_video_frames": st.integers(1, 400),
        "video_fps": st.floats(1, 120),
        "num_frames": st.integers(1, 64),
        "seed": st.none() | st.integers(0, 2**32),
    }
)


def rng_of(seed):
    return None if seed is None else np.random.default_rng(seed)


@given(sampling_cases, st.integers(1, 8))
def test_frames_are_a_step_apart_until_the_video_ends(case, step):
    n, num_frames = case["num_video_frames"], case["num_frames"]
    indices = decode.clip_indices(
        n,
        case["video_fps"],
        num_frames=num_frames,
        frame_step=step,
        rng=rng_of(case["seed"]),
    )
    assert indices.shape == (num_frames,) and indices.dtype == np.int64
    assert indices[0] >= 0 and indices[-1] < n
    span = (num_frames - 1) * step + 1
    if n >= span:
        assert (np.diff(indices) == step).all()
        if case["seed"] is None:
            assert abs(indices[0] - (n - 1 - indices[-1])) <= 1
    else:
        np.testing.assert_array_equal(
            indices, np.minimum(np.arange(num_frames) * step, n - 1)
        )


@given(sampling_cases, st.floats(0.5, 60))
def test_frame_rate_is_kept_to_half_a_frame(case, fps):
    n = case["num_video_frames"]
    indices = decode.clip_indices(
        n,
        case["video_fps"],
        num_frames=case["num_frames"],
        fps=fps,
        rng=rng_of(case["seed"]),
    )
    assert indices[0] >= 0 and indices[-1] < n
    assert (np.diff(indices) >= 0).all()
    exact = indices[0] + np.arange(case["num_frames"]) * case["video_fps"] / fps
    inside = indices < n - 1
    assert np.abs(indices - exact)[inside].max(initial=0) <= 0.5 + 1e-6


def test_every_window_is_drawn():
    rng = np.random.default_rng(0)
    starts = {
        int(decode.clip_indices(10, 30.0, num_frames=4, frame_step=2, rng=rng)[0])
        for _ in range(200)
    }
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("step, fps", [(0, 0.0), (2, 4.0), (-1, 0.0), (0, -4.0)])
def test_step_and_rate_exclude_each_other(files, step, fps):
    with pytest.raises(UserError, match=r"one of data\.frame_step and data\.fps"):
        decode.clip_indices(10, 30.0, num_frames=4, frame_step=step, fps=fps)
    # Bad numbers must not pass for a bad file.
    with pytest.raises(UserError):
        decode.read_clip(
            files["h264.mp4"],
            num_frames=4,
            frame_step=step,
            fps=fps,
            size=48,
            crop=whole_frame,
        )


VFR_STAMPS = np.cumsum([40, 40, 200, 33, 67, 40, 10, 90] * 5).tolist()
LATE_STAMPS = [5000 + 80 * i for i in range(40)]

FILES = {
    "h264.mp4": {},
    "b_frames.mp4": {"codec_options": {"bf": "3", "g": "12", "sc_threshold": "0"}},
    "open_gop.mkv": {
        "codec_options": {"x264-params": "keyint=10:open-gop=1:bframes=3"}
    },
    "vfr.mp4": {"stamps": VFR_STAMPS, "codec_options": {"g": "10"}},
    "late.mkv": {"stamps": LATE_STAMPS, "codec_options": {"g": "10"}},
    "stream.ts": {"codec_options": {"g": "10"}},
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
    frames = video_files.moving_frames(40)
    return {
        name: video_files.write_video(folder / name, frames, **options)
        for name, options in FILES.items()
    }


def assert_clips_match_plain_decode(path):
    plain = video_files.decode_plainly(path)
    for seed in range(6):
        step = 1 + seed % 4
        clip = read(path, rng=np.random.default_rng(seed), frame_step=step)
        wanted = decode.clip_indices(
            len(plain),
            None,
            num_frames=8,
            frame_step=step,
            rng=np.random.default_rng(seed),
        )
        np.testing.assert_array_equal(clip, plain[wanted], err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", FILES)
def test_frames_are_those_of_a_plain_decode(files, name):
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_large_files_are_sought_in(files, name, monkeypatch):
    monkeypatch.setattr(decode, "_MAX_HELD_BYTES", 0)
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_files_whose_index_fails_are_counted(files, name, monkeypatch):
    monkeypatch.setattr(decode, "_decode_indexed", lambda *args: False)
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", sorted(set(FILES) - {"mpeg4.avi", "vp8.webm"}))
def test_no_file_is_decoded_from_the_start_without_need(files, name, monkeypatch):
    monkeypatch.setattr(decode, "_decode_counted", None)
    assert_clips_match_plain_decode(files[name])


def test_decoding_starts_at_the_last_key_frame_before_the_clip(tmp_path, monkeypatch):
    path = video_files.write_video(
        tmp_path / "x.mp4",
        video_files.moving_frames(60),
        codec_options={"g": "10", "bf": "3", "sc_threshold": "0"},
    )
    starts = []

    class Packets(list):
        def __getitem__(self, part):
            starts.append(part.start)
            return super().__getitem__(part)

    index = decode._index

    def recorded(*args):
        found = index(*args)
        return dataclasses.replace(found, packets=Packets(found.packets))

    monkeypatch.setattr(decode, "_index", recorded)
    for num_frames, first in [(60, 0), (22, 10), (20, 20), (2, 20)]:
        read(path, num_frames=num_frames)
        assert starts.pop() == first


def test_frame_rate_comes_from_the_time_stamps(files):
    plain = video_files.decode_plainly(files["vfr.mp4"])
    mean_fps = 39 / (VFR_STAMPS[-1] - VFR_STAMPS[0]) * 1000
    clip = decode.read_clip(
        files["vfr.mp4"], num_frames=6, fps=5.0, size=48, crop=whole_frame
    )
    wanted = decode.clip_indices(40, mean_fps, num_frames=6, fps=5.0)
    np.testing.assert_array_equal(clip, plain[wanted])


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


@pytest.mark.parametrize("held_bytes", [decode._MAX_HELD_BYTES, 0])
def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path, monkeypatch, held_bytes):
    path = video_files.write_trimmed_video(
        tmp_path / "trimmed.mp4", video_files.moving_frames(40), num_hidden=5
    )
    assert len(video_files.decode_plainly(path)) == 35
    monkeypatch.setattr(decode, "_MAX_HELD_BYTES", held_bytes)
    monkeypatch.setattr(decode, "_decode_counted", None)
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
        ("folder", "unreadable"),
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


def fail_with(monkeypatch, code, times, *, file_system_fails):
    """Makes decoding fail some times; returns how often it was waited for."""
    decode_indexed, waits = decode._decode_indexed, []
    failures = [OSError(code, "failed")] * times

    def failing(*args):
        if failures:
            raise failures.pop()
        return decode_indexed(*args)

    monkeypatch.setattr(decode, "_decode_indexed", failing)
    monkeypatch.setattr(decode, "_fails_to_read", lambda path: file_system_fails)
    monkeypatch.setattr(decode.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize(
    "times, file_system_fails, waits", [(1, False, [0]), (3, True, [0.5, 2.0, 8.0])]
)
def test_passing_io_errors_do_not_change_the_clip(
    files, monkeypatch, times, file_system_fails, waits
):
    path = files["h264.mp4"]
    expected = read(path, rng=np.random.default_rng(3))
    waited = fail_with(
        monkeypatch, errno.ESTALE, times, file_system_fails=file_system_fails
    )
    clip = read(path, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(clip, expected)
    assert waited == waits


@pytest.mark.parametrize(
    "file_system_fails, reason, num_waits",
    [(False, "undecodable", 1), (True, "unreadable", 3)],
)
def test_lasting_io_errors_make_a_bad_file(
    files, monkeypatch, file_system_fails, reason, num_waits
):
    waited = fail_with(monkeypatch, errno.EIO, 99, file_system_fails=file_system_fails)
    with pytest.raises(decode.DecodeError) as caught:
        read(files["h264.mp4"])
    assert caught.value.reason == reason
    assert len(waited) == num_waits


def test_unreadable_files_are_told_by_reading_them(files, tmp_path):
    assert not decode._fails_to_read(files["h264.mp4"])
    assert decode._fails_to_read(str(tmp_path))
