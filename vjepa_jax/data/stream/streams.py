"""The streams of a config: what they read, opened at a step and drawn together."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping

from vjepa_jax.config import saved
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.data.clips.sampling import make_sampling
from vjepa_jax.data.sources.open import open_mixture
from vjepa_jax.data.sources.records import Mixture, digest_of
from vjepa_jax.data.stream import pipeline
from vjepa_jax.data.stream.pipeline import TrainIterator
from vjepa_jax.data.stream.reading import Batch, Reading
from vjepa_jax.data.stream.workers import require_shared_memory
from vjepa_jax.data.transforms.transforms import ClipTransform

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


def make_reading(data: ConfigDict, clip: ConfigDict) -> Reading:
    """Make how clips are decoded; see `sampling.make_sampling`."""
    return Reading(
        make_sampling(data, clip),
        clip.resolution,
        data.resize,
        data.max_pixels,
        data.time_limit_secs,
    )


def _clips(config: ConfigDict) -> dict[str, ConfigDict]:
    return {MAIN_STREAM: config.data, **config.streams}


def open_sources(config: ConfigDict) -> dict[str, Mixture]:
    """Open the videos of every stream, the main one first.

    Raises:
      UserError: a source cannot be opened, or has nothing in it.
    """
    return {
        name: open_mixture(clip.path, clip.mix_weights)
        for name, clip in _clips(config).items()
    }


def fingerprint(config: ConfigDict, opened: Mapping[str, Mixture]) -> str:
    """Identify what the streams will deliver, for a resumed run to notice a change.

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
    """Return the settings that decide which clips a step sees."""
    operational = saved.OPERATIONAL
    return {k: v for k, v in data.items() if not f"data.{k}".startswith(operational)}


def open_streams(
    config: ConfigDict,
    opened: Mapping[str, Mixture],
    batch_sizes: Mapping[str, int],
    start_step: int,
    workdir: str,
    process_index: int,
    process_count: int,
) -> "StreamIterator":
    """Open the streams at a step.

    Args:
      config: of the run.
      opened: from `open_sources`.
      batch_sizes: clips per global batch, by stream.
      start_step: step of the first batch.
      workdir: folder of the run, for the lists of bad videos.
      process_index: this process, in `[0, process_count)`.
      process_count: processes that share each global batch.

    Raises:
      UserError: see `pipeline.make_train_iterator`.
    """
    data, clips, iterators = config.data, _clips(config), {}
    augmentation = {key: data[key] for key in _TRANSFORM_KEYS}
    with contextlib.ExitStack() as stack:  # what is open must not outlive a failure
        for number, (name, source) in enumerate(opened.items()):
            reading = make_reading(data, clips[name])
            iterators[name] = pipeline.make_train_iterator(
                source,
                reading=reading,
                transform=ClipTransform(reading.resolution, **augmentation),
                batch_size=batch_sizes[name],
                seed=config.seed + number,
                start_step=start_step,
                num_workers=data.num_workers,
                prefetch_megabytes=data.prefetch_megabytes,
                worker_timeout_secs=data.worker_timeout_secs,
                max_bad_fraction=data.max_bad_fraction,
                bad_videos_path=_bad_videos_path(workdir, name),
                process_index=process_index,
                process_count=process_count,
            )
            stack.callback(iterators[name].close)
        # Each has looked for itself, and found what all of them share.
        require_shared_memory(sum(it.shared_bytes for it in iterators.values()))
        stack.pop_all()
    return StreamIterator(iterators)


def _bad_videos_path(workdir: str, stream: str) -> str:
    of_stream = "" if stream == MAIN_STREAM else f".{stream}"
    return os.path.join(workdir, f"bad_videos{of_stream}.jsonl")


class StreamIterator(Iterator):
    """Yields `{stream: uint8 [B, T, H, W, 3]}`, one batch of each stream.

    Use it as a context manager, to end the workers of all streams.

    Attributes:
      bad_counts: unreadable videos known so far, by reason, over all streams.
    """

    def __init__(self, streams: Mapping[str, TrainIterator]):
        """Takes the streams by name."""
        self._streams = dict(streams)

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """Unreadable videos known so far, by reason."""
        return sum((Counter(s.bad_counts) for s in self._streams.values()), Counter())

    def __next__(self) -> Batch:
        return {name: next(it)["video"] for name, it in self._streams.items()}

    def __enter__(self) -> "StreamIterator":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:  # one that fails must not spare the rest
            for stream in self._streams.values():
                stack.callback(stream.close)
