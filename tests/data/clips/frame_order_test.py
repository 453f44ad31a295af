"""Files whose time stamps are not the decoder's, joined recordings, long videos."""

import io
import itertools
import pathlib

import av
import numpy as np
import odd_videos
import pytest
import video_files
from clip_files import FILES, Record, read, read_clips
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vjepa_jax.data.clips import clock, media, packet_index, packets, reader
from vjepa_jax.data.clips.frame_stream import FrameStream
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.jobs.reencode import Encoding, reencode

NUM = 50
NUMBERS = tuple(range(NUM))
SIDE = odd_videos.SIDE


@pytest.fixture(autouse=True)
def no_index_is_kept(monkeypatch):
    monkeypatch.setattr(packet_index, "_long_files", packet_index.IndexCache())
    monkeypatch.setattr(packets, "_counted_files", packet_index.IndexCache())


@pytest.fixture(params=[packet_index._MAX_HELD_BYTES, 0], ids=["held", "sought"])
def held_bytes(request, monkeypatch):
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", request.param)


def times_of(path):
    """Return the times of all frames, as `check` and `prepare` use them."""
    with media.open_media(path, None, media.Limits()) as opened:
        index, _ = packets.read_settled(opened)
    assert index.times is not None
    return index.times


def assert_clips_match(path, times=None, samplings=()):
    """Clips, `check` and `prepare` agree with a plain decode and with `times`."""
    plain = video_files.decode_plainly(path)
    steps = [Sampling(6, frame_step=1), Sampling(6, frame_step=5)]
    for seed, sampling in enumerate([*steps, *samplings]):
        clip = read_clips(
            path, sampling=sampling, size=SIDE, rng=np.random.default_rng(seed)
        )
        at = np.arange(len(plain)) if sampling.frame_step else times
        wanted = sampling.frames(at, 25.0, np.random.default_rng(seed))
        found = odd_videos.numbers_of(clip[0])
        assert found == odd_videos.numbers_of(plain[wanted[0]]), (path, sampling)
        np.testing.assert_array_equal(clip, plain[wanted])
    assert reader.inspect(path).frames == len(plain)
    if times is not None:
        np.testing.assert_allclose(times_of(path), times, atol=2e-3)


def assert_all_are_kept(path, times=None):
    """Other readers of whole files have the same frames at the same times."""
    stream = FrameStream(SIDE, frame_step=1).read(Record(path))
    at, frames = zip(*stream, strict=True)
    np.testing.assert_array_equal(np.stack(frames), video_files.decode_plainly(path))
    if times is not None:
        np.testing.assert_allclose(at, times, atol=2e-3)
    content = reencode(path, Encoding(crf=5)).content
    kept, plain = video_files.decode_content(content), video_files.decode_plainly(path)
    assert odd_videos.numbers_of(kept) == odd_videos.numbers_of(plain)
    if times is not None:
        with av.open(io.BytesIO(content)) as container:
            found = [frame.time for frame in container.decode(video=0)]
        np.testing.assert_allclose(found, times, atol=2e-3)


BY_TIME = [Sampling(6, fps=10.0), Sampling(6, fps=5.0, rule="official")]

# Containers in which the times at which frames are shown are missing or wrong.
WITHOUT_TIMES = {
    "h264": ("avi", "mxf", "mp4", "mov", "mkv", "ts", "flv", "asf", "nut"),
    "h264_open": ("avi", "mp4", "mkv", "ts"),
    "hevc": ("mp4", "mov", "mkv", "ts", "flv"),
    "hevc_open": ("mp4", "mkv", "ts"),
    "mpeg4": ("avi", "mp4", "mkv", "asf"),
    "mpeg2": ("avi", "mp4", "mkv", "ts", "mxf"),
}
CASES = [(codec, ext) for codec, kinds in WITHOUT_TIMES.items() for ext in kinds]


@pytest.mark.parametrize("codec, ext", CASES)
def test_frames_are_in_the_decoders_order(tmp_path, codec, ext, held_bytes):
    encoded = odd_videos.encode(codec, NUMBERS)
    path = odd_videos.write(tmp_path / f"x.{ext}", encoded)
    plain = video_files.decode_plainly(path)
    assert odd_videos.numbers_of(plain) == list(NUMBERS)
    assert_clips_match(path, np.arange(NUM) / 25, BY_TIME)


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
def test_prepare_keeps_all_frames(tmp_path, codec):
    path = odd_videos.write(tmp_path / "x.avi", odd_videos.encode(codec, NUMBERS))
    assert_all_are_kept(path, np.arange(NUM) / 25)


@settings(max_examples=20, deadline=None)
@example(case=("mpeg2", "mp4"), gop=2, num_b=4, gap=(1, 0))  # only key frames wanted
@example(case=("h264_open", "avi"), gop=7, num_b=3, gap=(8, 9))
@given(
    case=st.sampled_from(CASES),
    gop=st.sampled_from([1, 2, 3, 7, 12, 40]),
    num_b=st.integers(0, 4),
    gap=st.tuples(st.integers(1, NUM), st.integers(0, 30)),
)
def test_order_and_gaps_of_any_file(tmp_path_factory, case, gop, num_b, gap):
    codec, ext = case
    encoded = odd_videos.encode(codec, NUMBERS, gop, num_b)
    place, missing = gap
    keys = [i for i, packet in enumerate(encoded.packets) if packet.is_key]
    place = min((key for key in keys if key >= place), default=NUM)
    # A recording pauses in front of a key frame, if no frame is shown before it.
    later = encoded.packets[place:]
    is_closed = all(packet.pts >= later[0].pts for packet in later)
    missing = missing if is_closed and ext != "mxf" else 0
    places = [i + missing * (i >= place) for i in range(NUM)]
    folder = tmp_path_factory.mktemp("x")
    path = odd_videos.write(folder / f"x.{ext}", encoded, places=places)
    if ext in ("ts", "mpg", "asf") and codec in ("mpeg2", "mpeg4"):
        assert_clips_match(path)
    else:
        assert_clips_match(path, np.array(places) / 25, BY_TIME[:1])


@pytest.mark.parametrize("ext", ["avi", "mp4", "mkv", "ts"])
def test_a_gap_keeps_its_time(tmp_path, ext):
    encoded = odd_videos.encode("h264", NUMBERS)
    places = [i + 20 * (i >= 24) for i in range(NUM)]
    path = odd_videos.write(tmp_path / f"x.{ext}", encoded, places=places)
    assert_clips_match(path, np.array(places) / 25, BY_TIME[:1])
    assert_all_are_kept(path, np.array(places) / 25)


@pytest.mark.parametrize(
    "edits",
    [[(5, 30)], [(0, 10), (25, 10), (40, 10)], [(25, 20), (0, 20)], [(3, 20), (3, 20)]],
    ids=["cut", "parts", "exchanged", "repeated"],
)
def test_parts_of_an_edit_list_follow_each_other(tmp_path, edits, held_bytes):
    encoded = odd_videos.encode("h264", NUMBERS, num_b=3)
    path = odd_videos.write(
        tmp_path / "v.mp4",
        encoded,
        places=[packet.dts for packet in encoded.packets],
        shown_at=[packet.pts for packet in encoded.packets],
    )
    odd_videos.set_edits(path, edits)
    shown = [n for first, count in edits for n in range(first, first + count)]
    plain = video_files.decode_plainly(path)
    assert odd_videos.numbers_of(plain) == shown
    with av.open(path) as container:
        times = np.array([frame.time for frame in container.decode(video=0)])
    assert_clips_match(path, times - times[0], BY_TIME)


@pytest.mark.parametrize("num_b", [1, 2, 3])
@pytest.mark.parametrize("ext", ["avi", "mp4", "mkv"])
def test_packed_b_frames(tmp_path, ext, num_b, held_bytes):
    encoded = odd_videos.encode("mpeg4", NUMBERS, 12, num_b)
    packed = odd_videos.pack_b_frames(encoded)
    path = odd_videos.write(tmp_path / f"x.{ext}", packed)
    plain = video_files.decode_plainly(path)
    assert odd_videos.numbers_of(plain) == list(NUMBERS)
    assert_clips_match(path, np.arange(NUM) / 25, BY_TIME)
    assert_clips_match_in_memory(path, plain)
    assert_all_are_kept(path, np.arange(NUM) / 25)


def assert_clips_match_in_memory(path, plain):
    record = Record("x.avi", pathlib.Path(path).read_bytes())
    np.testing.assert_array_equal(read(record, num_frames=NUM, size=SIDE), plain)


def test_an_encoder_waits_for_its_packed_frames(tmp_path):
    """The times of XviD: a pause after the first frame, which nothing shows."""
    encoded = odd_videos.encode("mpeg4", NUMBERS, 12, 2)
    packed = odd_videos.pack_b_frames(encoded)
    places = [0, *range(3, NUM + 2)]
    path = odd_videos.write(tmp_path / "x.avi", packed, places=places)
    assert_clips_match(path, np.arange(NUM) / 25, BY_TIME)


@pytest.mark.parametrize("ext", ["avi", "mp4", "mkv"])
def test_repeated_pictures_are_no_frames(tmp_path, ext, held_bytes):
    repeats = [5, 6, 20, 21, 22, 45]
    encoded = odd_videos.encode("mpeg4", NUMBERS, 12, 0)
    repeated = odd_videos.repeat_pictures(encoded, repeats)
    path = odd_videos.write(tmp_path / f"x.{ext}", repeated)
    times = np.delete(np.arange(NUM), repeats) / 25
    assert len(video_files.decode_plainly(path)) == len(times)
    assert_clips_match(path, times, BY_TIME[:1])
    assert_all_are_kept(path, times)


def write_recording(path, codec, numbers, *, num_b=2, start=0, drop=0):
    """Write frames with right times, without the first `drop` packets."""
    encoded = odd_videos.encode(codec, tuple(numbers), 12, num_b)
    first = min(packet.dts for packet in encoded.packets)
    kept = odd_videos.Encoded(encoded.packets[drop:], encoded.raw)
    return odd_videos.write(
        path,
        kept,
        places=[packet.dts - first + start for packet in kept.packets],
        shown_at=[packet.pts - first + start for packet in kept.packets],
    )


def join(path, parts):
    path.write_bytes(b"".join(pathlib.Path(part).read_bytes() for part in parts))
    return str(path)


JOINED = [("h264", "ts"), ("h264", "mkv"), ("hevc", "ts"), ("mpeg2", "ts")]


@pytest.mark.parametrize("num_b", [0, 2])
@pytest.mark.parametrize("codec, ext", JOINED)
@pytest.mark.parametrize("starts", [(0, 0, 0), (500, 0, 20), (0, 300, 300)])
def test_joined_recordings(tmp_path, codec, ext, num_b, starts, held_bytes):
    # FFmpeg reads no more than two joined files of Matroska.
    lengths = (30, 25) if ext == "mkv" else (30, 25, 14)
    parts, ends = [], 0
    for i, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        numbers = range(100 * i, 100 * i + length)
        part = tmp_path / f"{i}.{ext}"
        parts.append(write_recording(part, codec, numbers, num_b=num_b, start=start))
        ends += length
    path = join(tmp_path / f"x.{ext}", parts)
    times = np.arange(ends) / 25
    if starts[1] > lengths[0]:  # a clock that is put forward is a gap
        times[lengths[0] :] += (starts[1] - lengths[0]) / 25
    if codec == "mpeg2" and ext == "ts":
        # FFmpeg corrects the last times of a recording by its own count.
        assert_clips_match(path)
    else:
        assert_clips_match(path, times, BY_TIME[:1])
        assert_all_are_kept(path, times)


@pytest.mark.parametrize(
    "codec, ext", [("h264", "ts"), ("hevc", "ts"), ("h264", "mp4")]
)
@pytest.mark.parametrize("drop", [1, 5, 14])
def test_a_recording_that_starts_between_key_frames(
    tmp_path, codec, ext, drop, held_bytes
):
    path = write_recording(tmp_path / f"a.{ext}", codec, NUMBERS, drop=drop)
    assert_clips_match(path)
    if ext == "ts":
        whole = write_recording(tmp_path / "b.ts", codec, range(100, 130))
        assert_clips_match(join(tmp_path / "x.ts", [whole, path]))


@pytest.mark.parametrize("codec", ["h264_open", "hevc_open", "mpeg2"])
def test_a_cut_in_open_groups_of_pictures(tmp_path, codec, held_bytes):
    path = write_recording(tmp_path / "x.ts", codec, NUMBERS, drop=14)
    assert_clips_match(path)


@pytest.mark.parametrize("codec", ["h264", "h264_open", "hevc", "mpeg2"])
def test_raw_streams(tmp_path, codec, held_bytes):
    raw = odd_videos.encode(codec, NUMBERS).raw
    suffix = "hevc" if codec == "hevc" else "m2v" if codec == "mpeg2" else "h264"
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(raw)
    assert_clips_match(str(path), samplings=[])
    assert reader.inspect(str(path)).fps == pytest.approx(25)


def test_frames_that_share_a_time(tmp_path, held_bytes):
    encoded = odd_videos.encode("h264", NUMBERS, 12, 0)
    places = [0, 1, 2, 3, 3, 3, 6, *range(6, NUM - 1)]
    path = odd_videos.write(tmp_path / "x.mkv", encoded, places=places)
    times = np.array(places) / 25
    times[3:6], times[6:8] = np.array([3, 4, 5]) / 25, np.array([6, 6.5]) / 25
    assert_clips_match(path, times, BY_TIME[:1])
    assert_all_are_kept(path)


ORDINARY = ["b_frames.mp4", "hevc.mp4", "vp9.webm", "av1.mp4"]


@pytest.mark.parametrize("ext", ["", ".mkv"])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_are_not_compared(tmp_path, name, ext, monkeypatch):
    """Frames that nothing needs are skipped, and none is decoded twice."""
    side = 64 if "hevc" in name else 48
    frames = video_files.moving_frames(40, side, side)
    path = video_files.write_video(tmp_path / (name + ext), frames, **FILES[name])
    monkeypatch.setattr(packets, "_decode_all", None)
    monkeypatch.setattr(packets, "decode_counted", None)
    plain = video_files.decode_plainly(path)
    clip = read(path, size=side, frame_step=3)
    np.testing.assert_array_equal(clip, plain[9:33:3])


def test_without_b_frames_no_packet_more_is_decoded(tmp_path, monkeypatch):
    path = video_files.write_video(
        tmp_path / "x.mp4",
        video_files.moving_frames(40),
        codec_options={"bf": "0", "g": "10", "sc_threshold": "0"},
    )
    decode_all, count = packets._decode_all, []

    def counted(video, remaining):
        return decode_all(video, (count.append(p.pts) or p for p in remaining))

    monkeypatch.setattr(packets, "_decode_all", counted)
    read(path, num_frames=8)  # 16 to 23
    assert len(count) == 14


# Long videos.


def write_long(path, num_frames):
    """Write tiny packets, each group of 50 frames the same."""
    encoded = odd_videos.encode("h264", NUMBERS, NUM, 0)
    packets_ = itertools.islice(itertools.cycle(encoded.packets), num_frames)
    return odd_videos.write(path, odd_videos.Encoded(tuple(packets_), encoded.raw))


def test_of_a_long_video_little_is_held_and_read_once(tmp_path, monkeypatch):
    num_frames = 20_000
    path = write_long(tmp_path / "x.mp4", num_frames)
    # Less than the packets take, but more than their content does.
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", 4 << 20)
    assert pathlib.Path(path).stat().st_size < 2 << 20
    all_packets, count = media.VideoStream.packets, []

    def counted(video):
        return (count.append(1) or packet for packet in all_packets(video))

    monkeypatch.setattr(media.VideoStream, "packets", counted)
    for seed in range(4):
        clip = read(path, size=SIDE, frame_step=4, rng=np.random.default_rng(seed))
        (chosen,) = Sampling(8, 4).frames(
            np.arange(num_frames), None, np.random.default_rng(seed)
        )
        assert odd_videos.numbers_of(clip) == (chosen % NUM).tolist()
        if not seed:
            assert len(count) > num_frames
            count.clear()
    assert len(count) < 3 * 3 * NUM
    (index,) = packet_index._long_files._indices.values()
    assert index.packets is None
    assert index.num_bytes < 13 * num_frames


def test_a_file_that_changes_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", 0)
    path = tmp_path / "x.mp4"
    for num_frames in (500, 300, 700):
        write_long(path, num_frames)
        assert reader.inspect(str(path)).frames == num_frames
        clip = read(str(path), num_frames=4, size=SIDE)
        (chosen,) = Sampling(4, 1).frames(np.arange(num_frames))
        assert odd_videos.numbers_of(clip) == (chosen % NUM).tolist()


def test_kept_indices_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", 0)
    monkeypatch.setattr(packet_index, "_MAX_CACHED_BYTES", 20_000)
    paths = [write_long(tmp_path / f"{i}.mp4", 600) for i in range(4)]
    for path in paths:
        read(path, num_frames=4, size=SIDE)
    kept = [key[0][0] for key in packet_index._long_files._indices]
    assert kept == paths[-len(kept) :] and 1 <= len(kept) < 4


# The clock.

NO = np.iinfo(np.int64).min


@given(
    lengths=st.lists(st.integers(3, 20), min_size=1, max_size=4),
    starts=st.lists(st.integers(-50, 50), min_size=4, max_size=4),
    gop=st.integers(1, 5),
    has_dts=st.booleans(),
)
def test_recordings_follow_each_other(lengths, starts, gop, has_dts):
    stamps = [
        start + 2 * np.arange(length)
        for start, length in zip(starts, lengths, strict=False)
    ]
    ends = list(itertools.accumulate(lengths))
    # Elsewhere the clock is put forward.
    for i in range(1, len(stamps)):
        over = stamps[i][2] - stamps[i - 1][-1]
        stamps[i] = stamps[i] - max(0, over)
    keys = np.concatenate(
        [np.arange(0, n, gop) + e - n for n, e in zip(lengths, ends, strict=True)]
    )
    pts = np.concatenate(stamps)
    dts = pts.copy() if has_dts else np.full(len(pts), NO)
    found = clock.make_clock(pts, dts, keys, 2, NO)
    assert found.starts.tolist() == ends[:-1]
    first = pts[0]
    found.shift(pts, NO)
    assert pts.tolist() == [first + 2 * i for i in range(len(pts))]


@pytest.mark.parametrize("error", [-40, 40])
def test_one_wrong_time_does_not_set_the_clock_back(error):
    stamps = np.arange(20)
    stamps[7] += error
    found = clock.make_clock(stamps, stamps, np.array([0]), 1, NO)
    assert not found.is_set_back


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_equal_times_are_spread(steps):
    times = np.cumsum([0, *steps]).astype(float)
    if times[-1] == 0:
        return
    found = clock.spread(times)
    assert (np.diff(found) > 0).all()
    firsts = np.diff(times, prepend=-1.0) > 0
    np.testing.assert_allclose(found[firsts], times[firsts])
