"""Video object segmentation: the first frame's masks are carried on by features.

Semi-supervised, as DAVIS 2017 is judged: the masks of a video's first frame are given,
all others are found by `label_propagation` with frozen features, and J and F are taken
of every object in all frames but the first and the last. Nothing is trained. See
docs/segmentation.md.
"""

import concurrent.futures
import functools
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources import davis
from vjepa_jax.data.sources.davis import MaskedVideo
from vjepa_jax.data.sources.records import evenly_spread
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.evals.video_objects import region_metrics
from vjepa_jax.evals.video_objects.propagation import Propagation
from vjepa_jax.world import labelled

_RESAMPLES = 1000  # of the interval


def evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, dict[str, float]]:
    """Carry masks through videos and judge them.

    Args:
      frozen: the model.
      config: from `settings.video_objects`.

    Returns:
      {measure: {"pretrained": value, "first_mask": value}}, with `config.random_init`
      also `random_init`; `first_mask` lets the given masks stand still:

      `j_and_f_mean`: the mean of `j_mean` and `f_mean`, with `lower_bound` and
      `upper_bound`, its 95 % interval over draws of the videos.
      `j_mean`, `j_recall`, `j_decay`, and the same of `f`: of every object, averaged
      over the objects of all videos; see `mask_metrics.statistics`.
      `videos`, `objects`: how many were judged.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    videos = davis.list_videos(_root(frozen, config), config.split, config.quality)
    if config.max_videos:
        videos = [videos[i] for i in evenly_spread(len(videos), config.max_videos)]
    num_objects = max(_count_objects(video) for video in videos)
    how = Propagation(
        config.last_frames,
        config.radius,
        config.top_k,
        config.temperature,
        config.places_at_once,
    )
    columns: dict[str, Callable[[MaskedVideo], Iterator[np.ndarray]]] = {}
    models = {"pretrained": frozen}
    if config.random_init:
        models["random_init"] = random_init(frozen, config.seed)
    for name, model in models.items():
        encoder = FrameEncoder(
            model,
            config.num_frames or frozen.video_shape[0],
            config.clips_per_call,
            tuple(config.out_layers),
        )
        columns[name] = functools.partial(
            carry, encoder=encoder, how=how, config=config, num_objects=num_objects
        )
    columns["first_mask"] = _stand_still
    results: dict[str, dict[str, float]] = {}
    for name, masks_of in columns.items():
        judged = []
        for number, video in enumerate(videos, start=1):
            judged.append(judge(video, masks_of(video)))
            logging.info(
                "%s, video %d of %d: %s, J&F %.3f",
                name,
                number,
                len(videos),
                video.name,
                judged[-1][:, :, 0].mean(),
            )
        for measure, value in summarise(judged, config.seed).items():
            results.setdefault(measure, {})[name] = value
    return results


def _root(frozen: FrozenModel, config: ConfigDict) -> str:
    if config.path:
        return config.path
    path = pathlib.Path(frozen.config.world.path) / labelled.FOLDER
    if not path.is_dir():
        raise UserError(
            f"config.path is not set, and {path} is missing: give a folder laid out as "
            "DAVIS 2017, or render a world with world.segmentation_videos (python -m "
            "vjepa_jax.prepare --config=...)"
        )
    return str(path)


def _read_objects(path: pathlib.Path) -> np.ndarray:
    """Read a mask of objects; pixels that count nowhere are background, as in DAVIS."""
    mask = label_images.read_mask(path)
    return np.where(mask == label_images.IGNORED, np.uint8(0), mask)


def _count_objects(video: MaskedVideo) -> int:
    count = int(_read_objects(video.masks[0]).max())
    if not count:
        raise UserError(f"{video.masks[0]} has no object to follow: leave it out")
    return count


def carry(
    video: MaskedVideo,
    *,
    encoder: FrameEncoder,
    how: Propagation,
    config: ConfigDict,
    num_objects: int,
) -> Iterator[np.ndarray]:
    """Yield a mask for each frame after the first: uint8 [H, W], 0 the background.

    Args:
      video: whose first mask is given.
      encoder: of the frames.
      how: labels are carried on.
      config: of the evaluation.
      num_objects: at least the video's; one number for all, one compilation.
    """
    first = _read_objects(video.masks[0])
    size = network_size(
        first.shape,
        config.resolution or encoder.model.video_shape[1],
        encoder.model.encoder.patch_size,
    )
    features = _features(video, encoder, size, first.shape, config.num_workers)
    shares = label_images.patch_shares(first, size, encoder.grid(size), num_objects + 1)
    for labels in how(features, shares, encoder.model.mesh):
        yield np.asarray(_to_mask(labels, size=first.shape))


def network_size(
    shape: tuple[int, int], short_side: int, patch_size: int
) -> tuple[int, int]:
    """Return the (height, width) of frames resized to whole patches, near their shape.

    Args:
      shape: (height, width) of the file.
      short_side: in pixels.
      patch_size: in pixels.
    """
    scale = short_side / min(shape)
    height, width = (
        max(1, round(side * scale / patch_size)) * patch_size for side in shape
    )
    return height, width


def _features(
    video: MaskedVideo,
    encoder: FrameEncoder,
    size: tuple[int, int],
    shape: tuple[int, int],
    num_workers: int,
) -> Iterator[np.ndarray]:
    """Yield the features [h, w, D] of every frame, encoding some frames at once."""
    read = functools.partial(label_images.read_image, size=size, shape=shape)
    with concurrent.futures.ThreadPoolExecutor(max(1, num_workers)) as pool:
        frames = np.stack(list(pool.map(read, video.frames)))
    for start in range(0, len(frames), encoder.clips_per_call):
        part = range(start, min(start + encoder.clips_per_call, len(frames)))
        windows = [frames[encoder.window(i, len(frames))] for i in part]
        yield from encoder(np.stack(windows))


@functools.partial(jax.jit, static_argnames="size")
def _to_mask(labels: jax.Array, *, size: tuple[int, int]) -> jax.Array:
    """Upsample shares [h, w, K] bilinearly and take the largest one: uint8 [*size].

    Before that, each label is stretched to reach from 0 to 1 in the frame, as by DINO;
    an object smaller than a patch would else never be the largest.
    """
    shares = jax.image.resize(labels, (*size, labels.shape[-1]), "linear")
    lowest, highest = shares.min((0, 1)), shares.max((0, 1))
    stretched = (shares - lowest) / jnp.maximum(highest - lowest, 1e-6)
    return stretched.argmax(-1).astype(jnp.uint8)


def _stand_still(video: MaskedVideo) -> Iterator[np.ndarray]:
    """Yield the first mask for each frame after the first."""
    first = _read_objects(video.masks[0])
    for _ in video.frames[1:]:
        yield first


def judge(video: MaskedVideo, found: Iterator[np.ndarray]) -> np.ndarray:
    """Judge the masks of a video.

    Args:
      video: with the true masks; those of its first frame say which objects there are.
      found: uint8 [H, W] of each frame after the first.

    Returns:
      float [objects, 2, 3]: of J and of F mean, recall and decay.
    """
    objects = np.arange(1, _count_objects(video) + 1)
    scores = []
    # The last frame is not judged, and the first was given.
    for path, mask in zip(video.masks[1:-1], found, strict=False):
        truth = _read_objects(path)
        if truth.shape != mask.shape:
            raise UserError(f"{path} is not of the size of its video's first mask")
        scores.append(
            [
                (
                    region_metrics.region_similarity(truth == k, mask == k),
                    region_metrics.boundary_accuracy(truth == k, mask == k),
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


def summarise(judged: list[np.ndarray], seed: int) -> dict[str, float]:
    """Average what `judge` says over the objects of all videos.

    Args:
      judged: of each video.
      seed: of the draws of videos for the interval.
    """
    means = np.concatenate(judged).mean(0)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(judged), (_RESAMPLES, len(judged)))
    # A draw takes videos whole: objects of one video are not independent.
    totals = np.array([part[..., 0].mean(1).sum() for part in judged])
    counts = np.array([len(part) for part in judged])
    low, high = np.percentile(totals[draws].sum(1) / counts[draws].sum(1), (2.5, 97.5))
    results = {
        "j_and_f_mean": means[:, 0].mean(),
        "lower_bound": low,
        "upper_bound": high,
    }
    for name, row in zip("jf", means, strict=True):
        for statistic, value in zip(("mean", "recall", "decay"), row, strict=True):
            results[f"{name}_{statistic}"] = value
    results |= {"videos": len(judged), "objects": counts.sum()}
    return {measure: float(value) for measure, value in results.items()}
