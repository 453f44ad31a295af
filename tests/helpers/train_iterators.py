"""Training streams with the settings of the tests."""

import dataclasses

import numpy as np

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.stream.bad_videos import BadVideoLimits
from vjepa_jax.data.stream.pipeline import Batching, TrainIterator
from vjepa_jax.data.stream.workers import Workers
from vjepa_jax.data.transforms.transforms import ClipTransform

READER = ClipReader(Sampling(4, frame_step=2), resolution=16)
SETTINGS = (
    Batching(batch_size=4, seed=0),
    Workers(count=0, timeout_secs=60.0, prefetch_megabytes=1.0),
    BadVideoLimits(max_fraction=0.5),
)


def make_iterator(source, reader=READER, transform=None, **overrides):
    """Return a stream; overrides are fields of its settings."""
    settings = []
    for default in SETTINGS:
        names = [field.name for field in dataclasses.fields(default)]
        chosen = {name: overrides.pop(name) for name in names if name in overrides}
        settings.append(dataclasses.replace(default, **chosen))
    assert not overrides
    transform = transform or ClipTransform(reader.resolution)
    return TrainIterator(source, reader, transform, *settings)


def take(num_batches, source, **overrides):
    """Return uint8 [num_batches, B, T, S, S, 3]."""
    with make_iterator(source, **overrides) as batches:
        # Copied, so that no shared memory outlives the iterator.
        return np.stack([np.array(next(batches)["video"]) for _ in range(num_batches)])
