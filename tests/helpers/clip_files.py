"""Videos of every codec, and functions that read them."""

import dataclasses

import numpy as np
import video_files

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Record:
    path: str
    media: bytes | np.ndarray | None = None
    fps: float | None = None


def whole_frame(height, width):
    return 0, 0, height, width


def read_clips(record, *, sampling, size, crop=whole_frame, rng=None, **options):
    """Return uint8 [K, T, S, S, 3]; options are fields of `ClipReader`."""
    return ClipReader(sampling, size, **options).read(record, crop, rng)


def read(record, *, num_frames=8, frame_step=1, size=48, **options):
    """Return one clip by the rule "exact", uint8 [T, S, S, 3]."""
    sampling = Sampling(num_frames, frame_step)
    return read_clips(record, sampling=sampling, size=size, **options)[0]


VFR_STAMPS = np.cumsum([40, 40, 200, 33, 67, 40, 10, 90] * 5).tolist()
LATE_STAMPS = [5000 + 80 * i for i in range(40)]

B_FRAMES = {"bf": "3", "g": "12", "sc_threshold": "0"}
X265 = "keyint=10:log-level=error:pools=none"

FILES = {
    "h264.mp4": {},
    "b_frames.mp4": {"codec_options": B_FRAMES},
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
    # Without the times at which frames are shown, which FFmpeg then makes up.
    "h264.avi": {"codec_options": B_FRAMES},
    "h264.mxf": {"codec_options": B_FRAMES, "fps": 25},
    "h264.h264": {"codec_options": B_FRAMES, "fps": 25},
    "b_frames.ts": {"codec_options": B_FRAMES},
    "b_frames.flv": {"codec_options": B_FRAMES},
    "mpeg2.mpg": {
        "codec": "mpeg2video",
        "codec_options": {"bf": "2", "g": "10"},
        "fps": 25,
    },
    "picture.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def write_files(folder) -> dict[str, str]:
    """Write a video of 40 frames for every entry of `FILES`."""
    # x265 writes beyond its memory where frames are smaller than its largest block.
    frames = {side: video_files.moving_frames(40, side, side) for side in (48, 64)}
    return {
        name: video_files.write_video(
            folder / name, frames[64 if "hevc" in name else 48], **options
        )
        for name, options in FILES.items()
    }
