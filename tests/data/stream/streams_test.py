"""Streams are drawn together, and none survives the others' failure."""

import numpy as np
import pytest

from vjepa_jax.data.stream.streams import StreamIterator


class Source:
    """Counts up, as a TrainIterator of one stream would."""

    def __init__(self, start, bad_counts, fails=False):
        self.count, self.bad_counts, self.fails = start, bad_counts, fails
        self.is_closed = False

    def __next__(self):
        self.count += 1
        return {"video": np.array(self.count)}

    def close(self):
        self.is_closed = True
        if self.fails:
            raise RuntimeError("a worker has died")


def test_a_batch_holds_one_of_every_stream_under_its_name():
    streams = {
        "video": Source(0, {"empty": 2}),
        "image": Source(10, {"empty": 1, "missing": 3}),
    }
    with StreamIterator(streams) as batches:
        for step in (1, 2):
            batch = next(batches)
            assert batch == {"video": step, "image": 10 + step}
        assert batches.bad_counts == {"empty": 3, "missing": 3}


def test_leaving_closes_every_stream_though_one_fails():
    streams = [Source(0, {}, fails) for fails in (False, True, False)]
    names = ("video", "long", "image")
    with (
        pytest.raises(RuntimeError, match="a worker has died"),
        StreamIterator(dict(zip(names, streams, strict=True))),
    ):
        pass
    assert all(source.is_closed for source in streams)
