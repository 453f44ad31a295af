"""Intuitive physics: does a video that breaks a law surprise more than another one?

The violation-of-expectation measure of Garrido et al. (2025), with a pretrained
predictor and no training: in windows of a video the features of all that comes after a
few frames are predicted from these; the surprise is the L1 distance to the target
encoder's features. See docs/physics.md.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from sklearn.metrics import roc_auc_score

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import (
    FrozenModel,
    predicted_features,
    random_init,
    target_features,
)
from vjepa_jax.evals.physics import videos as physics_data
from vjepa_jax.evals.physics.videos import Group
from vjepa_jax.models.encoder import normalise

MEAN = "mean"  # the row of all properties together


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the surprise of a video is measured.

    Attributes:
      num_frames: of a window, W.
      stride: frames from one window to the next.
      context_frames: from how many of a window's frames the others are predicted; each
        is a measure of its own.
      mask_index: which of the predictor's mask tokens stands for the others.
    """

    num_frames: int
    stride: int
    context_frames: tuple[int, ...]
    mask_index: int = 0

    def validate(self, tubelet_size: int) -> None:
        """Raise UserError unless windows and contexts are made of whole tubelets."""
        if self.num_frames % tubelet_size or self.stride < 1:
            raise UserError(
                f"config.num_frames={self.num_frames}, config.stride={self.stride}: "
                f"windows are multiples of the {tubelet_size} frames of a tubelet, and "
                "are at least 1 frame apart"
            )
        contexts = self.context_frames
        if not contexts or any(
            not 0 < c < self.num_frames or c % tubelet_size for c in contexts
        ):
            raise UserError(
                f"config.context_frames={contexts}: give multiples of the "
                f"{tubelet_size} frames of a tubelet, below the window's "
                f"{self.num_frames}"
            )


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "contexts", "mask_index"),
)
def _surprise(params, video, *, encoder, predictor, contexts, mask_index):
    """Return the mean L1 error of windows, per number of seen tokens: [B, C]."""
    video = normalise(video)
    features = target_features(params, video, encoder)
    num_tokens = features.shape[1]
    out = []
    for seen in contexts:
        prediction = predicted_features(
            params,
            video,
            encoder,
            predictor,
            range(seen),
            range(seen, num_tokens),
            mask_index,
        )
        out.append(jnp.abs(prediction - features[:, seen:]).mean((1, 2)))
    return jnp.stack(out, axis=1)


def surprise(
    frozen: FrozenModel,
    videos: Sequence[np.ndarray],
    protocol: Protocol,
    batch_size: int,
) -> list[np.ndarray]:
    """Measure the surprise in every window of videos.

    Args:
      frozen: with a predictor.
      videos: uint8 [n, S, S, 3] each, of at least a window's frames.
      protocol: see there.
      batch_size: windows per call.

    Returns:
      float32 [windows, contexts] of each video.
    """
    starts = [
        range(0, len(video) - protocol.num_frames + 1, protocol.stride)
        for video in videos
    ]
    windows = [(v, start) for v, places in enumerate(starts) for start in places]
    _, height, width = frozen.grid((protocol.num_frames, *videos[0].shape[1:]))
    per_frame = height * width / frozen.encoder.tubelet_size
    contexts = tuple(round(c * per_frame) for c in protocol.context_frames)
    losses = np.empty((len(windows), len(contexts)), np.float32)
    for first in range(0, len(windows), batch_size):
        batch = [
            videos[v][start : start + protocol.num_frames]
            for v, start in windows[first : first + batch_size]
        ]
        # All calls have one shape, hence one compilation.
        batch += [batch[-1]] * (batch_size - len(batch))
        found = frozen.call(
            _surprise,
            np.stack(batch),
            encoder=frozen.encoder,
            predictor=frozen.predictor,
            contexts=contexts,
            mask_index=protocol.mask_index,
        )
        losses[first : first + batch_size] = found[: len(windows) - first]
    return np.split(losses, np.cumsum([len(places) for places in starts])[:-1])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The surprise of all videos of a property under one model.

    Attributes:
      pairs: [(possible, impossible)], float [windows, contexts] each.
      videos: [(surprise [windows, contexts], is_possible)] of every single video.
    """

    pairs: list[tuple[np.ndarray, np.ndarray]]
    videos: list[tuple[np.ndarray, bool]]

    def hits(self, context: int | None) -> np.ndarray:
        """Return whether each pair is right, as 0 or 1.

        The score of a video is the mean over its windows; the possible one's must be
        strictly smaller.

        Args:
          context: place in `Protocol.context_frames`; None takes the smallest surprise
            of all, in each window ("filtered").
        """
        scores = [
            [_at(losses, context).mean() for losses in pair] for pair in self.pairs
        ]
        return np.array([float(possible < broken) for possible, broken in scores])

    def auroc(self, context: int | None) -> float:
        """Return how well the largest surprise of a video tells what it shows."""
        scores = [_at(losses, context).max() for losses, _ in self.videos]
        return float(roc_auc_score([not p for _, p in self.videos], scores))


def _at(losses: np.ndarray, context: int | None) -> np.ndarray:
    return losses.min(1) if context is None else losses[:, context]


def welch_p(one: np.ndarray, other: np.ndarray) -> float:
    """Return the p-value of Welch's t-test, two-sided; 1 where nothing varies."""
    if np.ptp(one) == np.ptp(other) == 0:
        return float(np.mean(one) == np.mean(other))
    parts = [f(x) for x in (one, other) for f in (np.mean, _spread, len)]
    return float(scipy.stats.ttest_ind_from_stats(*parts, equal_var=False).pvalue)


def _spread(values: np.ndarray) -> float:
    return np.std(values, ddof=1)


def summarise(
    trained: dict[str, Outcome],
    null: Sequence[dict[str, Outcome]],
    context_frames: Sequence[int],
    reported: int,
) -> dict[str, dict[str, float]]:
    """Turn outcomes by property into the table.

    Args:
      trained: of the model that is judged.
      null: of each untrained one.
      context_frames: see `Protocol`.
      reported: which of them gives the columns without a name of their own; 0: the
        smallest surprise of all.

    Returns:
      {property: {column: value}} and the row `mean` over properties:

        accuracy: share of pairs that are right (relative accuracy).
        null_accuracy, null_std: mean and spread of the same over the untrained models.
        p_value: of Welch's t-test between the pairs of the trained model and those of
          the untrained ones, right or wrong; in the row `mean`, of all properties.
        p_over_properties: of the same test between the accuracies of the properties
          and those of properties times untrained models; in the row `mean` alone.
        auroc: of single videos.
        context_C_accuracy, filtered_accuracy, best_accuracy: of each context, of their
          minimum per window, and of the best of these, chosen after the fact.
    """
    places = {f"context_{c}": i for i, c in enumerate(context_frames)}
    chosen = context_frames.index(reported) if reported else None
    rows = {}
    for name, outcome in trained.items():
        hits = outcome.hits(chosen)
        of_null = np.array([other[name].hits(chosen) for other in null])
        row = {"accuracy": hits.mean(), "auroc": outcome.auroc(chosen)}
        if len(null):
            row["null_accuracy"] = of_null.mean()
            row["null_std"] = of_null.mean(1).std(ddof=1)
            row["p_value"] = welch_p(hits, of_null.ravel())
        if len(places) > 1:
            for label, place in (places | {"filtered": None}).items():
                row[f"{label}_accuracy"] = outcome.hits(place).mean()
            row["best_accuracy"] = max(
                value
                for key, value in row.items()
                if key.endswith("_accuracy") and not key.startswith("null")
            )
        rows[name] = row
    mean = {
        k: np.mean([row[k] for row in rows.values()]) for k in next(iter(rows.values()))
    }
    if len(null):
        hits, of_null = (
            np.concatenate([m[name].hits(chosen) for m in models for name in rows])
            for models in ([trained], null)
        )
        mean["p_value"] = welch_p(hits, of_null)
        per_seed = np.array(
            [[other[name].hits(chosen).mean() for name in rows] for other in null]
        )
        mean["null_std"] = per_seed.mean(1).std(ddof=1)
        per_property = np.array([row["accuracy"] for row in rows.values()])
        if len(rows) > 1:
            mean["p_over_properties"] = welch_p(per_property, per_seed.ravel())
    rows[MEAN] = mean
    return {
        name: {column: float(value) for column, value in row.items()}
        for name, row in rows.items()
    }


def evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, Any]:
    """Measure intuitive physics; see `configs/probe_physics.py` for the config.

    Returns:
      See `summarise`. Of data without labels (the test set of IntPhys) the surprise of
      every video instead, {video: {"mean", "max"}} over its windows.

    Raises:
      UserError: the model cannot predict, or protocol, data and model do not fit.
    """
    settings.validate(config)
    frozen.require_predictor(config.mask_index)
    protocol = Protocol(
        config.num_frames or frozen.video_shape[0],
        config.stride,
        tuple(config.context_frames),
        config.mask_index,
    )
    protocol.validate(frozen.encoder.tubelet_size)
    if config.reported_context and config.reported_context not in config.context_frames:
        raise UserError(
            f"config.reported_context={config.reported_context}: give 0 or one of "
            f"context_frames={tuple(config.context_frames)}"
        )
    if config.null_seeds == 1:
        raise UserError("config.null_seeds=1: a spread takes 2, or give 0 for no null")
    path = config.path or frozen.config.world.path
    groups = physics_data.open_groups(config.dataset, path, config.lists)
    has_labels = all(v.is_possible is not None for g in groups for v in g.videos)
    num_models = 1 + (config.null_seeds if has_labels else 0)
    outcomes: list[dict[str, Outcome]] = [{} for _ in range(num_models)]
    unlabelled: dict[str, dict[str, float]] = {}
    chosen = None
    if config.reported_context:
        chosen = protocol.context_frames.index(config.reported_context)
    for part, read in _read(groups, config, frozen.video_shape[1], protocol):
        videos = [video for of_group in read for video in of_group]
        for number, found in enumerate(outcomes):
            model = random_init(frozen, config.seed + number) if number else frozen
            losses = iter(surprise(model, videos, protocol, config.batch_size))
            for group, of_group in zip(part, read, strict=True):
                own = [next(losses) for _ in of_group]
                if has_labels:
                    _collect(found, group, of_group, own)
                    continue
                for video, loss in zip(group.videos, own, strict=True):
                    name = "/".join([group.property, *video.path.parts[-3:-1]])
                    score = _at(loss, chosen)
                    unlabelled[name] = {
                        "mean": float(score.mean()),
                        "max": float(score.max()),
                    }
    if not has_labels:
        return unlabelled
    reported, contexts = config.reported_context, protocol.context_frames
    return summarise(outcomes[0], outcomes[1:], contexts, reported)


def _collect(found: dict[str, Outcome], group: Group, videos, losses) -> None:
    outcome = found.setdefault(group.property, Outcome([], []))
    for pair in physics_data.matched_pairs(group, videos):
        outcome.pairs.append(tuple(losses[i] for i in pair))
    for video, loss in zip(group.videos, losses, strict=True):
        outcome.videos.append((loss, video.is_possible))


def _read(
    groups: list[Group], config: ConfigDict, size: int, protocol: Protocol
) -> Iterator[tuple[list[Group], list[list[np.ndarray]]]]:
    """Yield groups with their videos, so many at once as are kept in memory."""
    read = functools.partial(
        physics_data.read_group,
        size=config.resolution or size,
        frame_step=config.frame_step,
        max_frames=config.max_frames,
    )
    with concurrent.futures.ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        for first in range(0, len(groups), config.groups_at_once):
            part = groups[first : first + config.groups_at_once]
            videos = list(pool.map(read, part))
            for group, of_group in zip(part, videos, strict=True):
                for video, pixels in zip(group.videos, of_group, strict=True):
                    if len(pixels) < protocol.num_frames:
                        raise UserError(
                            f"{video.path}: {len(pixels)} frames are less than the "
                            f"window's {protocol.num_frames}: lower "
                            "config.num_frames or config.frame_step"
                        )
            yield part, videos
