"""The streams of a config: their sources, and an iterator over all of them."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping

from vjepa_jax.config import saved
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import make_sampling
from vjepa_jax.data.sources.open import open_mixture
from vjepa_jax.data.sources.records import Mixture, digest_of
from vjepa_jax.data.stream.bad_videos import BadVideoLimits
from vjepa_jax.data.stream.pipeline import Batching, TrainIterator
from vjepa_jax.data.stream.workers import Batch, Workers, require_shared_memory
from vjepa_jax.data.transforms.transforms import ClipTransform
from vjepa_jax.parallel import distributed

_TRANSFORM_KEYS = (
    "crop_scale",
    "crop_aspect_ratio",
    "flip_probability",
    "motion_shift",
    "color_jitter",
    "grayscale_probability",
    "rand_augment",
    "erase_probability",
    "erase_mode",
)


def make_reader(data: ConfigDict, clip: ConfigDict) -> ClipReader:
    """Make the reader of a stream's clips; see `sampling.make_sampling`."""
    return ClipReader(
        make_sampling(data, clip),
        clip.resolution,
        data.resize,
        Limits(data.max_pixels, data.time_limit_secs),
    )


def _clips(config: ConfigDict) -> dict[str, ConfigDict]:
    return {MAIN_STREAM: config.data, **config.streams}


def open_sources(config: ConfigDict) -> dict[str, Mixture]:
    """Open the videos of every stream, the main one first.

    Raises:
      UserError: a source cannot be opened, or is empty.
    """
    return {
        name: open_mixture(clip.path, clip.mix_weights)
        for name, clip in _clips(config).items()
    }


def fingerprint(config: ConfigDict, opened: Mapping[str, Mixture]) -> str:
    """Return a hash by which a resumed run notices that its data has changed.

    Args:
      config: of the run.
      opened: from `open_sources`.
    """
    parts = []
    for name, source in opened.items():
        settings = _sampling_settings(config.data)
        if name != MAIN_STREAM:
            of_stream = dict(config.streams[name])
            for key in ("path", "masks", "weight"):
                del of_stream[key]
            settings |= of_stream
        parts.append(source.fingerprint(**settings))
    return digest_of(part.encode() for part in parts)


def _sampling_settings(data: ConfigDict) -> dict[str, object]:
    """Return the settings that the clips of a step depend on."""
    operational = saved.OPERATIONAL
    return {k: v for k, v in data.items() if not f"data.{k}".startswith(operational)}


def open_streams(
    config: ConfigDict,
    opened: Mapping[str, Mixture],
    batch_sizes: Mapping[str, int],
    start_step: int,
    workdir: str,
) -> "StreamIterator":
    """Open this process's share of all streams.

    Args:
      config: of the run.
      opened: from `open_sources`.
      batch_sizes: clips per global batch, by stream.
      start_step: step of the first batch.
      workdir: local folder of the run, for the lists of bad videos.

    Raises:
      UserError: see `TrainIterator`.
    """
    data, clips = config.data, _clips(config)
    augmentation = {key: data[key] for key in _TRANSFORM_KEYS}
    workers = Workers(
        data.num_workers, data.worker_timeout_secs, data.prefetch_megabytes
    )
    iterators = {}
    with contextlib.ExitStack() as stack:  # closes the open streams if one fails
        for number, (name, source) in enumerate(opened.items()):
            reader = make_reader(data, clips[name])
            iterators[name] = TrainIterator(
                source,
                reader,
                ClipTransform(reader.resolution, **augmentation),
                Batching(
                    batch_sizes[name],
                    config.seed + number,
                    start_step,
                    distributed.process_index(),
                    distributed.process_count(),
                ),
                workers,
                BadVideoLimits(data.max_bad_fraction, _bad_videos_path(workdir, name)),
            )
            stack.callback(iterators[name].close)
        # Each stream has checked the memory that it needs, but all of them share it.
        require_shared_memory(sum(it.shared_bytes for it in iterators.values()))
        stack.pop_all()
    return StreamIterator(iterators)


def _bad_videos_path(workdir: str, stream: str) -> str:
    of_stream = "" if stream == MAIN_STREAM else f".{stream}"
    return os.path.join(workdir, f"bad_videos{of_stream}.jsonl")


class StreamIterator(Iterator[Batch]):
    """Yields `{stream: uint8 [B, T, H, W, 3]}`, one batch of each stream.

    Use it as a context manager, which ends the workers of all streams.
    """

    def __init__(self, streams: Mapping[str, TrainIterator]):
        """Take the streams by name."""
        self._streams = dict(streams)

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """Unreadable videos known so far, by reason, over all streams."""
        return sum((Counter(s.bad_counts) for s in self._streams.values()), Counter())

    def __next__(self) -> Batch:
        return {name: next(it)["video"] for name, it in self._streams.items()}

    def __enter__(self) -> "StreamIterator":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as stack:  # closes all, even if one fails
            for stream in self._streams.values():
                stack.callback(stream.close)
