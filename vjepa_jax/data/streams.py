"""Several streams of clips, of different shapes, drawn together."""

import contextlib
from collections.abc import Iterator, Mapping

from vjepa_jax.data.pipeline import Batch, TrainIterator


class StreamIterator(Iterator):
    """Yields `{stream: {"video": uint8 [B, T, H, W, 3]}}`, one batch of each stream.

    Close it, or use it as a context manager, to end the workers of all streams.

    Attributes:
      bad_count: unreadable files known so far, over all streams.
    """

    def __init__(self, streams: Mapping[str, TrainIterator]):
        self._streams = dict(streams)

    @property
    def bad_count(self) -> int:
        """Unreadable files known so far."""
        return sum(stream.bad_count for stream in self._streams.values())

    def __next__(self) -> Batch:
        return {name: next(it)["video"] for name, it in self._streams.items()}

    def __enter__(self) -> "StreamIterator":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:  # one that fails must not spare the rest
            for stream in self._streams.values():
                stack.callback(stream.close)
