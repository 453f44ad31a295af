import io
import json
import subprocess
import sys

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_files import (
    decode_plainly,
    moving_frames,
    write_rotated_video,
    write_sound,
    write_video,
)

from vjepa_jax.data import encode_shards, reencode, shards, sources
from vjepa_jax.data.decode import DecodeError
from vjepa_jax.default_config import UserError

# One process, no servers: what is tested here does not depend on the runner.
IN_MEMORY = ("--direct_running_mode=in_memory", "--direct_num_workers=1")


def decoded(content):
    return decode_plainly(io.BytesIO(content))


def psnr(a, b):
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * np.log10(255**2 / error)


def encode(path, **settings):
    return reencode.reencode(str(path), reencode.Encoding(**settings))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4"])
def test_videos_of_the_same_size_stay_close(tmp_path, codec):
    path = write_video(tmp_path / "a.mkv", moving_frames(30, 96, 128), codec=codec)
    video = encode(path)
    assert (video.num_frames, video.width, video.height) == (30, 128, 96)
    assert video.fps == pytest.approx(12, rel=1e-3)
    original = decode_plainly(path)
    # A frame off by one would cost 15 dB.
    assert psnr(decoded(video.content), original) > 36


@pytest.mark.parametrize(
    "pix_fmt, colours",
    [("yuv444p", 5), ("yuv420p", 1), ("yuvj420p", 5), ("yuv420p10le", 1)],
)
def test_colours_survive(tmp_path, pix_fmt, colours):
    options = {"colorspace": str(colours)}
    path = write_video(
        tmp_path / "a.mkv", moving_frames(5), pix_fmt=pix_fmt, codec_options=options
    )
    original = decode_plainly(path)
    assert psnr(decoded(encode(path, crf=5).content), original) > 30


def test_key_frames_keep_the_pace_and_nothing_is_reordered(tmp_path):
    frames = moving_frames(40)
    frames[17:] = 255 - frames[17:]  # a cut, which makes no key frame
    path = write_video(tmp_path / "a.mp4", frames)
    with av.open(io.BytesIO(encode(path, gop=8).content)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        assert len(container.streams) == 1
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert keys == [0, 8, 16, 24, 32]
    assert all(packet.pts == packet.dts for packet in packets)


def test_times_survive(tmp_path):
    stamps = [500, 520, 600, 601, 900, 1700]
    path = write_video(tmp_path / "a.mkv", moving_frames(6), stamps=stamps)
    video = encode(path)
    with av.open(io.BytesIO(video.content)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, (np.array(stamps) - 500) / 1000, atol=1e-4)
    assert video.fps == pytest.approx(5 / 1.2)


def test_rotation_is_applied(tmp_path):
    path = write_rotated_video(tmp_path / "a.mp4", moving_frames(6, 48, 80))
    video = encode(path)
    assert (video.width, video.height) == (48, 80)
    with av.open(path) as container:
        turns = round(next(container.decode(video=0)).rotation / 90)
    upright = np.rot90(decode_plainly(path), turns, axes=(1, 2))
    assert psnr(decoded(video.content), upright) > 36


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((64, 96), 32, (32, 48)),
        ((96, 64), 32, (48, 32)),
        ((64, 96), 64, (64, 96)),
        ((63, 97), 320, (62, 96)),  # cut, not scaled
        ((90, 130), 35, (34, 50)),
    ],
)
def test_sizes(tmp_path, size, short_side, expected):
    frames = moving_frames(3, *size)
    path = write_video(tmp_path / "a.mkv", frames, pix_fmt="yuv444p")
    video = encode(path, short_side=short_side)
    assert (video.height, video.width) == expected
    if short_side == 320:
        original = decode_plainly(path)[:, : expected[0], : expected[1]]
        assert psnr(decoded(video.content), original) > 30


@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    short_side=st.integers(2, 1000),
)
def test_sizes_are_even_and_never_larger(height, width, short_side):
    new_height, new_width = reencode.output_size(height, width, short_side)
    assert new_height % 2 == new_width % 2 == 0
    assert 2 <= new_height <= max(2, height) and 2 <= new_width <= max(2, width)
    assert min(new_height, new_width) <= short_side


@pytest.mark.parametrize("fps, kept", [(6, range(0, 24, 2)), (4, range(0, 24, 3))])
def test_frames_are_left_out_evenly(tmp_path, fps, kept):
    path = write_video(tmp_path / "a.mp4", moving_frames(24))
    video = encode(path, fps=fps)
    assert video.fps == pytest.approx(fps, rel=1e-3)
    original = decode_plainly(path)[list(kept)]
    assert psnr(decoded(video.content), original) > 36


@pytest.mark.parametrize("fps", [12, 30, 0])
def test_no_frame_is_made_up(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", moving_frames(9))
    assert encode(path, fps=fps).num_frames == 9


def test_images_become_videos_of_one_frame(tmp_path):
    path = tmp_path / "a.png"
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 40, 60, "rgb24"
        frame = moving_frames(1, 40, 60)[0]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
    video = encode(path)
    assert (video.num_frames, video.width, video.height) == (1, 60, 40)
    assert psnr(decoded(video.content), decode_plainly(str(path))) > 30


def test_why_a_video_fails(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video" * 1000)
    write_sound(tmp_path / "sound.mp4")
    for name, reason in [
        ("nowhere.mp4", "missing"),
        ("empty.mp4", "empty"),
        ("text.mp4", "not_a_video"),
        ("sound.mp4", "no_video_stream"),
    ]:
        with pytest.raises(DecodeError) as caught:
            encode(tmp_path / name)
        assert caught.value.reason == reason


def test_hostile_sizes_and_long_decodes_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(9))
    monkeypatch.setattr(reencode, "_TIME_LIMIT_SECS", -1.0)
    with pytest.raises(DecodeError) as caught:
        encode(path)
    assert caught.value.reason == "too_slow"
    monkeypatch.setattr(reencode, "_MAX_PIXELS", 100)
    with pytest.raises(DecodeError) as caught:
        encode(path)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "settings",
    [{"short_side": 1}, {"gop": 0}, {"crf": 52}, {"fps": -1}, {"fps": float("nan")}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=f"--{next(iter(settings))} must"):
        reencode.Encoding(**settings)


def test_every_input_has_one_shard():
    for num_inputs in (1, 2, 17, 1000, 123457):
        count = min(encode_shards.default_num_shards(num_inputs), num_inputs)
        job = encode_shards.Job("", "", num_inputs, count, reencode.Encoding())
        parts = [job.inputs_of(i) for i in range(count)]
        assert [i for part in parts for i in part] == list(range(num_inputs))
        assert all(1 <= len(part) <= 512 for part in parts)


@pytest.fixture
def folder(tmp_path):
    """Six videos in two classes, and a file that is none."""
    for i in range(6):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.mp4"
        write_video(path, moving_frames(4 + i, seed=i))
    (tmp_path / "in" / "b" / "bad.mp4").write_bytes(b"no video")
    return tmp_path


def prepare(folder, **settings):
    pytest.importorskip(
        "apache_beam", reason="Beam is missing: pip install 'vjepa_jax[prepare]'"
    )
    arguments = {"num_shards": 3, "max_bad_fraction": 0.2, **settings}
    encoding = reencode.Encoding(
        **{k: arguments.pop(k) for k in ("gop", "crf") if k in arguments}
    )
    source = sources.open_source(str(folder / "in"))
    return encode_shards.prepare(
        source, str(folder / "out"), encoding, beam_options=IN_MEMORY, **arguments
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.mark.beam
def test_a_folder_becomes_shards(folder):
    manifest = prepare(folder)
    assert (manifest["num_records"], manifest["num_failures"]) == (6, 1)
    source = sources.open_source(str(folder / "out"))
    original = sources.open_source(str(folder / "in"))
    good = [i for i in range(len(original)) if "bad" not in original.path_of(i)]
    for record, index in zip(map(source.read, range(6)), good, strict=True):
        assert record.path == original.path_of(index)
        assert (record.id, record.label) == (original.entry(index), index // 3)
        frames, expected = decoded(record.video), decode_plainly(record.path)
        assert len(frames) == record.num_frames == len(expected)
        assert psnr(frames, expected) > 36
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (failure,) = map(
        json.loads, (folder / "out/failures.jsonl").read_text().splitlines()
    )
    assert failure["reason"] == "not_a_video" and failure["path"].endswith("bad.mp4")
    assert shards.verify(str(folder / "out")) == 6
    names = [name for name in contents(folder) if ".part" in name or "inputs" in name]
    assert not names


@pytest.mark.beam
def test_a_stopped_run_goes_on_with_what_is_missing(folder, monkeypatch):
    begun = []

    def stopped(path, encoding):
        begun.append(path)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return reencode.reencode(path, encoding)

    monkeypatch.setattr(encode_shards, "reencode", stopped)
    with pytest.raises(BaseException):  # noqa: B017 Beam wraps some of them
        prepare(folder)
    with pytest.raises(UserError, match="not complete"):
        sources.open_source(str(folder / "out"))
    done = [name for name in contents(folder) if name.endswith(shards.SUFFIX)]
    begun.clear()

    def counted(path, encoding):
        begun.append(path)
        return reencode.reencode(path, encoding)

    monkeypatch.setattr(encode_shards, "reencode", counted)
    prepare(folder)
    assert 0 < len(done) < 3 and 0 < len(begun) < 7
    resumed = contents(folder)

    begun.clear()
    prepare(folder)
    assert not begun and contents(folder) == resumed

    # Neither a damaged shard nor a lost one is kept.
    (first, second) = sorted(n for n in resumed if n.endswith(shards.SUFFIX))[:2]
    (folder / "out" / second).unlink()
    with open(folder / "out" / first, "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    prepare(folder)
    assert len(begun) == 4 and shards.verify(str(folder / "out")) == 6
    assert sources.open_source(str(folder / "out"))


@pytest.mark.beam
def test_other_settings_or_videos_are_refused(folder):
    prepare(folder)
    before = contents(folder)
    with pytest.raises(UserError, match="made with gop=12, not 6"):
        prepare(folder, gop=6)
    with pytest.raises(UserError, match="made with num_shards=3, not 2, crf=20, not 9"):
        prepare(folder, num_shards=2, crf=9)
    prepare(folder, num_shards=0)  # as it was
    write_video(folder / "in/a/new.mp4", moving_frames(2))
    with pytest.raises(UserError, match="of other videos"):
        prepare(folder)
    assert contents(folder) == before


@pytest.mark.beam
def test_too_many_failures_end_the_run_but_lose_nothing(folder):
    with pytest.raises(UserError, match="1 of 7 videos failed, listed in") as caught:
        prepare(folder, max_bad_fraction=0.1)
    assert "--max_bad_fraction=0.1" in str(caught.value)
    kept = contents(folder)
    assert shards.MANIFEST not in kept and kept["failures.jsonl"]
    prepare(folder)
    for name, content in contents(folder).items():
        if name.endswith(shards.SUFFIX):
            assert content == kept[name]


@pytest.mark.beam
def test_foreign_folders_are_left_alone(folder):
    (folder / "out").mkdir()
    (folder / "out" / shards.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="not of this program's shards"):
        prepare(folder)
    (folder / "file").touch()
    source = sources.open_source(str(folder / "in"))
    with pytest.raises(UserError, match="is not a folder"):
        encode_shards.prepare(source, str(folder / "file"), reencode.Encoding())


def command(*arguments):
    return [sys.executable, "-m", "vjepa_jax.data.prepare", *map(str, arguments)]


@pytest.mark.beam
def test_the_command_spreads_over_processes(folder):
    pytest.importorskip("apache_beam", reason="Beam is missing")
    arguments = [f"--data={folder / 'in'}", f"--output={folder / 'out'}"]
    arguments += ["--num_shards=2", "--max_bad_fraction=0.5"]
    ended = subprocess.run(
        command(*arguments, "--", "--direct_num_workers=2"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "6 videos in 2 shards" in ended.stderr
    ended = subprocess.run(
        command("--verify", arguments[1]), capture_output=True, text=True, timeout=60
    )
    assert "6 records" in ended.stderr and ended.returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to prepare"),
        (["--data=x"], "--output is not set"),
        (["--data=/nowhere/at/all", "--output=x"], "does not exist"),
        (["--verify", "--output=/nowhere/at/all"], "not complete"),
        (["--data=x", "--output=y", "--crf=90"], "--crf must lie in 0..51"),
    ],
)
def test_wrong_commands_are_told_in_a_line(arguments, message):
    ended = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr
