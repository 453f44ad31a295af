import io

import numpy as np
import PIL.Image
import pytest
import video_files
from clip_files import (
    FILES,
    VFR_STAMPS,
    Record,
    read,
    read_clips,
    whole_frame,
    write_files,
)

from vjepa_jax.data.clips import media, packet_index, packets, reader
from vjepa_jax.data.clips.sampling import Sampling


@pytest.fixture(autouse=True)
def no_index_is_kept(monkeypatch):
    monkeypatch.setattr(packet_index, "_long_files", packet_index.IndexCache())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("videos"))


def assert_clips_match_plain_decode(path):
    plain = video_files.decode_plainly(path)
    for seed in range(6):
        sampling = Sampling(8, frame_step=1 + 2 * seed)
        clips = read_clips(
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
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", 0)
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_files_whose_index_fails_are_counted_from_key_frames(files, name, monkeypatch):
    monkeypatch.setattr(packets, "decode_indexed", lambda *args: iter(()))
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", FILES)
def test_files_whose_index_fails_are_counted(files, name, monkeypatch):
    monkeypatch.setattr(packets, "decode_indexed", lambda *args: iter(()))
    monkeypatch.setattr(packets, "decode_from_keys", lambda *args: iter(()))
    assert_clips_match_plain_decode(files[name])


@pytest.mark.parametrize("name", sorted(set(FILES) - {"vp8.webm"}))
def test_no_file_is_decoded_from_the_start_needlessly(files, name, monkeypatch):
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

    def recorded(video, index, wanted):
        ways.append([(s.start, s.stop) for s in packets._spans(index, wanted)])
        return decode_indexed(video, index, wanted)

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
    clip = read_clips(files["vfr.mp4"], sampling=sampling, size=48, crop=whole_frame)
    wanted = sampling.frames(times)
    np.testing.assert_array_equal(clip, plain[wanted])
    assert (np.abs(np.diff(times[wanted[0]]) - 0.2) < 0.2).all()


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "stream.ts"])
def test_the_official_rule_steps_by_the_stated_frame_rate(files, name):
    plain = video_files.decode_plainly(files[name])
    clip = read_clips(
        files[name],
        sampling=Sampling(6, fps=5, rule="official"),
        size=48,
        crop=whole_frame,
    )
    # ceil(12) // 5 = 2
    np.testing.assert_array_equal(clip[0], plain[[0, 2, 4, 7, 9, 11]])
    with pytest.raises(media.DecodeError) as caught:
        read_clips(
            files[name],
            sampling=Sampling(6, fps=13, rule="official"),
            size=48,
            crop=whole_frame,
        )
    assert caught.value.reason == "low_frame_rate"


@pytest.mark.parametrize("held_bytes", [packet_index._MAX_HELD_BYTES, 0])
def test_several_clips_come_from_one_pass(files, monkeypatch, held_bytes):
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", held_bytes)
    plain = video_files.decode_plainly(files["b_frames.mp4"])
    sampling = Sampling(5, frame_step=2, num_clips=3)
    corners = iter([(0, 0), (3, 5), (8, 8)])
    clips = read_clips(
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


@pytest.mark.parametrize("held_bytes", [packet_index._MAX_HELD_BYTES, 0])
def test_frames_hidden_by_an_edit_list_do_not_count(tmp_path, monkeypatch, held_bytes):
    path = video_files.write_trimmed_video(
        tmp_path / "trimmed.mp4", video_files.moving_frames(40), num_hidden=5
    )
    assert len(video_files.decode_plainly(path)) == 35
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", held_bytes)
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


def test_frames_in_memory_are_cut_like_a_video():
    pixels = video_files.moving_frames(40)
    sampling = Sampling(4, fps=5.0, num_clips=2)
    clips = read_clips(
        Record("x", pixels, fps=12.0),
        sampling=sampling,
        rng=np.random.default_rng(1),
        size=30,
        crop=lambda *_: (5, 9, 30, 30),
    )
    wanted = sampling.frames(np.arange(40) / 12, 12.0, np.random.default_rng(1))
    np.testing.assert_array_equal(clips, pixels[wanted, 5:35, 9:39])
    info = reader.inspect(Record("x", pixels, fps=12.0))
    assert info == reader.VideoInfo(40, 48, 48, 12.0, "raw", 40 / 12)
    with pytest.raises(media.DecodeError) as caught:
        read(Record("x", pixels[:0]))
    assert caught.value.reason == "no_frames"


def encode_image(pixels, kind):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind, error", [("PNG", 0), ("BMP", 0), ("JPEG", 6)])
def test_an_image_is_a_clip_of_equal_frames(tmp_path, kind, error):
    pixels = video_files.moving_frames(1)[0]
    # To FFmpeg, the name would stand for a numbered series of images.
    path = tmp_path / f"%03d.{kind.lower()}"
    path.write_bytes(encode_image(pixels, kind))
    for record in (str(path), Record("x", path.read_bytes())):
        for rule in ("exact", "official"):
            clips = read_clips(
                record,
                sampling=Sampling(4, fps=4.0, num_clips=2, rule=rule),
                size=48,
                crop=whole_frame,
            )
            assert clips.shape == (2, 4, 48, 48, 3)
            assert (clips == clips[0, 0]).all()
            assert np.abs(clips[0, 0].astype(int) - pixels).mean() <= error
    assert reader.inspect(str(path)).frames == 1


@pytest.mark.parametrize("name", [*FILES])
@pytest.mark.parametrize("deep", [False, True])
def test_inspect_returns_the_properties(files, name, deep):
    info = reader.inspect(files[name], deep=deep)
    side = 64 if "hevc" in name else 48
    assert (info.frames, info.height, info.width) == (40, side, side)
    assert info.codec == {
        "vp9.webm": "vp9",
        "vp8.webm": "vp8",
        "hevc.mp4": "hevc",
        "hevc_open_gop.mkv": "hevc",
        "av1.mp4": "av1",
        "mpeg4.avi": "mpeg4",
        "mpeg4.mp4": "mpeg4",
        "mpeg1.mpg": "mpeg1video",
        "mpeg2.mpg": "mpeg2video",
        "picture.gif": "gif",
    }.get(name, "h264")
    if name != "picture.gif":
        assert info.duration_secs == pytest.approx(40 / info.fps)
    if name in ("h264.mp4", "av1.mp4", "stream.ts"):
        assert info.fps == pytest.approx(12, rel=1e-3)
