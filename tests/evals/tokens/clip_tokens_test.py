import numpy as np
import pytest
import video_files

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.evals.tokens.clip_tokens import Videos
from vjepa_jax.evals.tokens.features import read_clips


class PixelEncoder:
    num_clips = 1
    clips_per_call = 4

    def __call__(self, video):
        return video


@pytest.fixture
def source(tmp_path):
    frames = video_files.moving_frames(2, height=64, width=64)
    video_files.write_video(tmp_path / "video.mp4", frames)
    return open_source(str(tmp_path))


def test_videos_show_the_central_crop_and_plain_clips_the_whole_square(source):
    plain = video_files.decode_plainly(source[0].path)
    reader = ClipReader(Sampling(2, frame_step=1), resolution=56)
    videos = Videos(source, reader, PixelEncoder(), 1, 0, 60.0)
    (batch,) = videos.batches(1)
    np.testing.assert_array_equal(batch.tokens[0, 0], plain[:, 4:60, 4:60])
    reader = ClipReader(Sampling(2, frame_step=1), resolution=64)
    (clip,) = read_clips(source, reader, np.array([0]))
    np.testing.assert_array_equal(clip, plain)
