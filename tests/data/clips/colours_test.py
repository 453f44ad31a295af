"""Colours, odd streams and odd starts of files, each against a plain decode."""

import io

import av
import numpy as np
import PIL.Image
import pytest
import video_files
from clip_files import read

from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import inspect

SIDE = 32
# Shares of red and blue in the luma of each matrix, by FFmpeg's numbers.
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 9: (0.2627, 0.0593)}


def ramps():
    """Return uint8 [S, S, 3] in which all channels differ."""
    rows, columns = np.mgrid[:SIDE, :SIDE] * 8
    return np.stack([columns, rows, 255 - (rows + columns) // 2], -1).astype(np.uint8)


def planes_of(rgb, matrix, is_full):
    """Return luma and both colour differences of a frame, uint8."""
    red, blue = MATRICES[matrix]
    r, g, b = np.moveaxis(rgb / 255, -1, 0)
    luma = red * r + (1 - red - blue) * g + blue * b
    differences = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    scale, offset, chroma = (255, 0, 255) if is_full else (219, 16, 224)
    planes = [luma * scale + offset, *(d * chroma + 128 for d in differences)]
    return [np.rint(p).clip(0, 255).astype(np.uint8) for p in planes]


def write_planes(path, codec, rgb, matrix, is_full):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv444p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if is_full else 1
        frame = av.VideoFrame(SIDE, SIDE, "yuv444p")
        frame.colorspace, frame.color_range = matrix, 2 if is_full else 1
        for plane, values in zip(
            frame.planes, planes_of(rgb, matrix, is_full), strict=True
        ):
            rows = np.zeros((SIDE, plane.line_size), np.uint8)
            rows[:, :SIDE] = values
            plane.update(rows)
        for i in range(2):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    ("codec", "suffix"), [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("ffv1", "mkv")]
)
def test_matrix_and_range_of_colours_are_those_stated(
    tmp_path, codec, suffix, matrix, is_full
):
    rgb = ramps()
    path = write_planes(tmp_path / f"a.{suffix}", codec, rgb, matrix, is_full)
    for options in ({}, {"resize": "official"}):
        clip = read(path, num_frames=2, size=SIDE, **options)
        assert np.abs(clip.astype(int) - rgb).mean() < 1
    small = PIL.Image.fromarray(rgb).resize((12, 12), PIL.Image.Resampling.BILINEAR)
    clip = read(path, num_frames=2, size=12)
    assert np.abs(clip.astype(int) - np.asarray(small)).mean() < 1


def as_ycck(jpeg):
    """Mark four components as luma, colour differences and black, as Photoshop does."""
    content = bytearray(jpeg)
    content[content.index(b"Adobe") + 11] = 2
    frame, scan = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    for i in range(4):
        content[frame + 10 + 3 * i] = content[scan + 5 + 2 * i] = i + 1
    return bytes(content)


@pytest.mark.parametrize("kind", ["cmyk", "ycck", "no marker"])
def test_images_of_four_inks_are_those_of_pillow(tmp_path, kind):
    """Three hundred of ImageNet are such files."""
    black = np.add.outer(np.arange(SIDE), np.arange(SIDE)) * 3
    inks = 255 - ramps()
    if kind == "ycck":
        inks = 255 - np.asarray(PIL.Image.fromarray(inks).convert("YCbCr"))
    content = io.BytesIO()
    image = PIL.Image.fromarray(np.dstack([inks, black.astype(np.uint8)]), "CMYK")
    image.save(content, "jpeg", quality=98)
    content = content.getvalue()
    if kind == "ycck":
        content = as_ycck(content)
    if kind == "no marker":
        start = content.index(b"\xff\xee")
        length = int.from_bytes(content[start + 2 : start + 4])
        content = content[:start] + content[start + 2 + length :]
    path = tmp_path / "a.JPEG"
    path.write_bytes(content)
    wanted = PIL.Image.open(path).convert("RGB")
    for size in (SIDE, 12):
        small = wanted.resize((size, size), PIL.Image.Resampling.BILINEAR)
        clip = read(str(path), num_frames=1, size=size)
        assert np.abs(clip[0].astype(int) - np.asarray(small)).mean() < 2


@pytest.mark.parametrize("name", ["png.JPEG", "webp.jpg", "gif.png", "jpeg.mp4"])
def test_the_content_decides_and_not_the_suffix(tmp_path, name):
    """ImageNet has a PNG that is called JPEG."""
    image = PIL.Image.fromarray(ramps()).quantize(64).convert("RGB")
    path = tmp_path / name
    image.save(path, name.split(".")[0], lossless=True)
    clip = read(str(path), num_frames=2, size=SIDE)
    wanted = np.asarray(PIL.Image.open(path).convert("RGB"))
    assert np.abs(clip.astype(int) - wanted).mean() < 4


def write_streams(path, sides, cover=False):
    """Write a video stream of each side, and a picture as cover art, last to first."""
    frames = [video_files.moving_frames(12, n, n, seed=n) for n in sides]
    with av.open(str(path), "w") as container:
        if cover:
            art = container.add_stream("mjpeg", rate=10)
            art.width = art.height = 200
            art.pix_fmt = "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        streams = [
            container.add_stream("libx264", rate=10, options={"bf": "0"}) for _ in sides
        ]
        for stream, side in zip(streams, sides, strict=True):
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
        if cover:
            picture = av.VideoFrame(200, 200, "yuvj420p")
            picture.pts = 0
            container.mux(art.encode(picture))
            container.mux(art.encode())
        for i in range(12):
            for stream, content in zip(streams, frames, strict=True):
                frame = av.VideoFrame.from_ndarray(content[i], format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_cover_art_is_not_the_video(tmp_path, suffix):
    path = write_streams(tmp_path / f"a.{suffix}", [SIDE], cover=True)
    assert inspect(path).frames == 12
    with av.open(path) as container:
        stream = next(s for s in container.streams.video if s.width == SIDE)
        plain = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    np.testing.assert_array_equal(read(path, num_frames=12, size=SIDE), plain)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "ts"])
@pytest.mark.parametrize("sides", [(32, 48), (48, 32)])
def test_of_two_videos_in_a_file_the_first_is_read(tmp_path, suffix, sides):
    path = write_streams(tmp_path / f"a.{suffix}", sides)
    plain = video_files.decode_plainly(path)
    assert plain.shape[1] == sides[0]
    np.testing.assert_array_equal(read(path, num_frames=12, size=sides[0]), plain)


def test_only_a_cover_is_no_video(tmp_path):
    path = write_streams(tmp_path / "a.mp4", [], cover=True)
    with pytest.raises(DecodeError) as caught:
        read(path)
    assert caught.value.reason == "no_video_stream"


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_cut_that_begins_between_key_frames(tmp_path, suffix):
    """Frames that need missing ones are left out, as in a plain decode."""
    options = {"g": "10", "bf": "2"}
    frames = video_files.moving_frames(30, SIDE, SIDE)
    whole = video_files.write_video(tmp_path / "a.mp4", frames, codec_options=options)
    path = str(tmp_path / f"cut.{suffix}")
    with av.open(whole) as source, av.open(path, "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for i, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None and i >= 4:
                packet.stream = stream
                container.mux(packet)
    plain = video_files.decode_plainly(path)
    assert 0 < len(plain) < 26
    clip = read(path, num_frames=len(plain), size=SIDE)
    np.testing.assert_array_equal(clip, plain)


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "cmaf"]
)
@pytest.mark.parametrize("rate", [1000, 2])
def test_fragments_and_extreme_rates(tmp_path, flags, rate):
    path = video_files.write_video(
        tmp_path / "a.mp4",
        video_files.moving_frames(30, SIDE, SIDE),
        fps=rate,
        codec_options={"g": "10", "bf": "2"},
        container_options={"movflags": flags},
    )
    plain = video_files.decode_plainly(path)
    assert inspect(path).fps == pytest.approx(rate)
    np.testing.assert_array_equal(read(path, num_frames=30, size=SIDE), plain)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_encrypted_videos_are_no_noise(tmp_path, codec):
    key = "0123456789abcdef" * 2
    path = video_files.write_video(
        tmp_path / "a.mp4",
        video_files.moving_frames(20, SIDE, SIDE),
        codec=codec,
        codec_options={"x265-params": "log-level=none"} if "265" in codec else None,
        container_options={
            "encryption_scheme": "cenc-aes-ctr",
            "encryption_key": key,
            "encryption_kid": key,
        },
    )
    for use in (read, inspect):
        with pytest.raises(DecodeError, match="encrypted") as caught:
            use(path)
        assert caught.value.reason == "undecodable"
