"""Video object segmentation: features carry the labels of the first frame to the rest.

Semi-supervised, by the protocol of DAVIS 2017: the label image of a video's first frame
is given, all others are predicted by `propagation` with frozen features, and J and F
are computed for every object in all frames but the first and the last. Nothing is
trained. See docs/segmentation.md.
"""

import concurrent.futures
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources import davis
from vjepa_jax.data.sources.davis import LabelledVideo
from vjepa_jax.data.sources.records import evenly_spread
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, beside_untrained
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.evals.video_objects import region_metrics
from vjepa_jax.evals.video_objects.propagation import Propagation
from vjepa_jax.world import labelled

_RESAMPLES = 1000  # of the interval

# From a video to the predicted label images of all frames but the first.
Prediction = Callable[[LabelledVideo], Iterator[np.ndarray]]


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, float]]:
    """Propagate labels through videos and compare them with the true ones.

    Args:
      model: of the features.
      config: from `settings.video_objects`.

    Returns:
      {measure: {"pretrained": value, "first_mask": value}}, with `config.random_init`
      also `random_init`; `first_mask` repeats the given labels in every frame:

      `j_and_f_mean`: the mean of `j_mean` and `f_mean`, with `lower_bound` and
      `upper_bound`, its 95 % interval over draws of the videos.
      `j_mean`, `j_recall`, `j_decay`, and the same of `f`: of every object, averaged
      over the objects of all videos; see `region_metrics.statistics`.
      `videos`, `objects`: their numbers.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    videos = davis.list_videos(_root(model, config), config.split, config.quality)
    if config.max_videos:
        videos = [videos[i] for i in evenly_spread(len(videos), config.max_videos)]
    num_objects = max(_count_objects(video) for video in videos)

    def measure(network: FrozenModel) -> dict[str, float]:
        encoder = FrameEncoder(
            network,
            config.num_frames or network.video_shape[0],
            config.clips_per_call,
            tuple(config.out_layers),
        )
        predict = functools.partial(
            follow_objects, encoder=encoder, config=config, num_objects=num_objects
        )
        name = "pretrained" if network is model else "random_init"
        return average_scores(_score_all(name, videos, predict), config.seed)

    results = beside_untrained(measure, model, config)
    scores = _score_all("first_mask", videos, _repeat_first)
    for name, value in average_scores(scores, config.seed).items():
        results[name]["first_mask"] = value
    return results


def _score_all(
    name: str, videos: Sequence[LabelledVideo], predict: Prediction
) -> list[np.ndarray]:
    scores = []
    for number, video in enumerate(videos, start=1):
        scores.append(score_video(video, predict(video)))
        logging.info(
            "%s, video %d of %d: %s, J&F %.3f",
            name,
            number,
            len(videos),
            video.name,
            scores[-1][:, :, 0].mean(),
        )
    return scores


def _root(model: FrozenModel, config: ConfigDict) -> str:
    if config.path:
        return config.path
    path = pathlib.Path(model.config.world.path) / labelled.FOLDER
    if not path.is_dir():
        raise UserError(
            f"config.path is not set, and {path} is missing: give a folder laid out as "
            "DAVIS 2017, or render a world with world.segmentation_videos (python -m "
            "vjepa_jax.prepare --config=...)"
        )
    return str(path)


def _read_objects(path: pathlib.Path) -> np.ndarray:
    """Read a label image of objects; ignored pixels are background, as in DAVIS."""
    labels = label_images.read_labels(path)
    return np.where(labels == label_images.IGNORED, np.uint8(0), labels)


def _count_objects(video: LabelledVideo) -> int:
    count = int(_read_objects(video.labels[0]).max())
    if not count:
        raise UserError(f"{video.labels[0]} has no object to follow: leave it out")
    return count


def follow_objects(
    video: LabelledVideo, *, encoder: FrameEncoder, config: ConfigDict, num_objects: int
) -> Iterator[np.ndarray]:
    """Predict the label image of each frame after the first.

    Args:
      video: whose first label image is given.
      encoder: of the frames.
      config: of the evaluation.
      num_objects: at least the video's number; one value for all videos saves
        compilations.

    Yields:
      uint8 [H, W], 0 the background, k object k.
    """
    first = _read_objects(video.labels[0])
    size = network_size(
        first.shape,
        config.resolution or encoder.model.video_shape[1],
        encoder.model.encoder.patch_size,
    )
    propagation = Propagation(
        config.last_frames,
        config.radius,
        config.top_k,
        config.temperature,
        config.places_at_once,
    )
    features = _features(video, encoder, size, first.shape, config.num_workers)
    shares = label_images.patch_shares(first, size, encoder.grid(size), num_objects + 1)
    for labels in propagation(features, shares, encoder.model.mesh):
        yield np.asarray(_most_likely(labels, size=first.shape))


def network_size(
    shape: tuple[int, int], short_side: int, patch_size: int
) -> tuple[int, int]:
    """Return the (height, width) of whole patches that is nearest to a frame's shape.

    Args:
      shape: (height, width) of the file.
      short_side: wanted, in pixels.
      patch_size: in pixels.
    """
    scale = short_side / min(shape)
    height, width = (
        max(1, round(side * scale / patch_size)) * patch_size for side in shape
    )
    return height, width


def _features(
    video: LabelledVideo,
    encoder: FrameEncoder,
    size: tuple[int, int],
    shape: tuple[int, int],
    num_workers: int,
) -> Iterator[np.ndarray]:
    """Yield the features [h, w, D] of every frame; some frames are encoded at once."""
    read = functools.partial(label_images.read_image, size=size, shape=shape)
    with concurrent.futures.ThreadPoolExecutor(max(1, num_workers)) as pool:
        frames = np.stack(list(pool.map(read, video.frames)))
    for start in range(0, len(frames), encoder.clips_per_call):
        part = range(start, min(start + encoder.clips_per_call, len(frames)))
        windows = [frames[encoder.window(i, len(frames))] for i in part]
        yield from encoder(np.stack(windows))


@functools.partial(jax.jit, static_argnames="size")
def _most_likely(labels: jax.Array, *, size: tuple[int, int]) -> jax.Array:
    """Upsample shares [h, w, K] bilinearly and take the largest: uint8 [*size].

    Before the maximum, each label is scaled to the range 0 to 1 in the frame, as in
    DINO: otherwise an object smaller than a patch would never be the largest.
    """
    shares = jax.image.resize(labels, (*size, labels.shape[-1]), "linear")
    lowest, highest = shares.min((0, 1)), shares.max((0, 1))
    scaled = (shares - lowest) / jnp.maximum(highest - lowest, 1e-6)
    return scaled.argmax(-1).astype(jnp.uint8)


def _repeat_first(video: LabelledVideo) -> Iterator[np.ndarray]:
    """Yield the first label image for each frame after the first."""
    first = _read_objects(video.labels[0])
    for _ in video.frames[1:]:
        yield first


def score_video(video: LabelledVideo, predicted: Iterator[np.ndarray]) -> np.ndarray:
    """Compare predicted label images with a video's own.

    Args:
      video: with the true label images; the first one defines the objects.
      predicted: uint8 [H, W] of each frame after the first.

    Returns:
      float [objects, 2, 3]: of J and of F mean, recall and decay.
    """
    objects = np.arange(1, _count_objects(video) + 1)
    scores = []
    # The first frame is given, and the last one is not scored.
    for path, labels in zip(video.labels[1:-1], predicted, strict=False):
        truth = _read_objects(path)
        if truth.shape != labels.shape:
            raise UserError(
                f"{path} and the first label image of its video differ in size: leave "
                "the video out"
            )
        scores.append(
            [
                (
                    region_metrics.region_similarity(truth == k, labels == k),
                    region_metrics.boundary_accuracy(truth == k, labels == k),
                )
                for k in objects
            ]
        )
    per_frame = np.array(scores)  # [frames, objects, 2]
    return np.array(
        [
            [region_metrics.statistics(per_frame[:, k, measure]) for measure in (0, 1)]
            for k in range(len(objects))
        ]
    )


def average_scores(scores: list[np.ndarray], seed: int) -> dict[str, float]:
    """Average scores over the objects of all videos.

    Args:
      scores: of each video, from `score_video`.
      seed: of the draws of videos for the interval.
    """
    means = np.concatenate(scores).mean(0)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(scores), (_RESAMPLES, len(scores)))
    # Videos are drawn, not objects: objects of one video are not independent.
    totals = np.array([part[..., 0].mean(1).sum() for part in scores])
    counts = np.array([len(part) for part in scores])
    low, high = np.percentile(totals[draws].sum(1) / counts[draws].sum(1), (2.5, 97.5))
    results = {
        "j_and_f_mean": means[:, 0].mean(),
        "lower_bound": low,
        "upper_bound": high,
    }
    for name, row in zip("jf", means, strict=True):
        for statistic, value in zip(("mean", "recall", "decay"), row, strict=True):
            results[f"{name}_{statistic}"] = value
    results |= {"videos": len(scores), "objects": counts.sum()}
    return {measure: float(value) for measure, value in results.items()}
