"""Intuitive physics: does a video that breaks a physical law surprise the model?

The violation-of-expectation measure of Garrido et al. (2025), see `surprise`: the
surprise at possible and at impossible videos is compared, and untrained networks are
measured beside the trained one. Nothing is trained. See docs/physics.md.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.stats
from sklearn.metrics import roc_auc_score

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.physics.surprise import Protocol, surprise
from vjepa_jax.evals.physics.videos import (
    Group,
    matched_pairs,
    open_groups,
    read_group,
)

MEAN = "mean"  # the row of the mean over properties


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The surprise of one model at all videos of a property.

    Attributes:
      pairs: [(possible, impossible)], float [windows, contexts] each; infinite where a
        context was not used in a window, see `with_early_contexts`.
      videos: [(surprise [windows, contexts], is_possible)] of every video.
    """

    pairs: list[tuple[np.ndarray, np.ndarray]]
    videos: list[tuple[np.ndarray, bool]]

    def hits(self, context: int | None) -> np.ndarray:
        """Return 1 for each pair whose possible video has the lower score, else 0.

        The score of a video is the mean over its windows.

        Args:
          context: index in `Protocol.context_frames`; None takes the minimum over
            contexts in each window ("filtered").
        """
        scores = [
            [_of_context(losses, context).mean() for losses in pair]
            for pair in self.pairs
        ]
        return np.array([float(good < bad) for good, bad in scores])

    def auroc(self, context: int | None) -> float:
        """Return the AUROC of single videos, scored by their largest surprise."""
        scores = [_of_context(losses, context).max() for losses, _ in self.videos]
        return float(roc_auc_score([not p for _, p in self.videos], scores))


def _of_context(losses: np.ndarray, context: int | None) -> np.ndarray:
    """Return [windows] of [windows, contexts], see `Outcome.hits`."""
    if context is None:
        return losses.min(1)
    of_context = losses[:, context]
    return of_context[of_context != np.inf]


def with_early_contexts(
    model: FrozenModel,
    videos: Sequence[np.ndarray],
    protocol: Protocol,
    batch_size: int,
) -> list[np.ndarray]:
    """Measure the surprise in every window, and early events from shorter contexts.

    As in the code of IntPhys 2 (`max_context_mode`), the first window is also predicted
    from every shorter context, so that an event within the first context counts.

    Returns:
      float32 [k + windows, contexts] of each video: k rows of the first window, one for
      each shorter context, are infinite in the columns of contexts that are not longer.

    See `surprise` for the arguments.
    """
    tubelet, contexts = model.encoder.tubelet_size, np.array(protocol.context_frames)
    shorter = np.arange(tubelet, contexts.max(), tubelet)
    losses = surprise(model, videos, protocol, batch_size)
    if not len(shorter):
        return losses
    of_first = dataclasses.replace(protocol, context_frames=tuple(shorter.tolist()))
    first_windows = [video[: protocol.num_frames] for video in videos]
    early = surprise(model, first_windows, of_first, batch_size)
    is_used = shorter[:, None] < contexts
    return [
        np.concatenate([np.where(is_used, first.T, np.inf), rest]).astype(np.float32)
        for first, rest in zip(early, losses, strict=True)
    ]


def welch_p(one: np.ndarray, other: np.ndarray) -> float:
    """Return the p-value of Welch's t-test, two-sided.

    Where neither sample varies: 1 if the means are equal, else 0.
    """
    if np.ptp(one) == np.ptp(other) == 0:
        return float(np.mean(one) == np.mean(other))
    parts = [f(x) for x in (one, other) for f in (np.mean, _spread, len)]
    return float(scipy.stats.ttest_ind_from_stats(*parts, equal_var=False).pvalue)


def _spread(values: np.ndarray) -> float:
    return np.std(values, ddof=1)


def tabulate_outcomes(
    trained: dict[str, Outcome],
    null: Sequence[dict[str, Outcome]],
    context_frames: Sequence[int],
    chosen: int | None,
) -> dict[str, dict[str, float]]:
    """Compute the table of results from outcomes by property.

    Args:
      trained: outcomes of the evaluated model.
      null: outcomes of each untrained model.
      context_frames: see `Protocol`.
      chosen: the context of `accuracy`, `null_*`, `p_*` and `auroc`, see
        `Outcome.hits`.

    Returns:
      {property: {column: value}} and the row `mean` over properties:

        accuracy: share of pairs whose possible video surprises less ("relative
          accuracy").
        null_accuracy, null_std: mean and standard deviation of the accuracy over the
          untrained models.
        p_value: of Welch's t-test between the pairs of the trained model and those of
          the untrained ones, each 0 or 1; in the row `mean`, of all properties.
        p_over_properties: of the same test between the accuracies of the properties
          and those of properties times untrained models; only in the row `mean`.
        auroc: of single videos.
        context_C_accuracy, filtered_accuracy, best_accuracy: of each context, of their
          minimum per window, and of the best of these, chosen after the fact.
    """
    contexts = {f"context_{c}": i for i, c in enumerate(context_frames)}
    rows = {}
    for name, outcome in trained.items():
        hits = outcome.hits(chosen)
        of_null = np.array([other[name].hits(chosen) for other in null])
        row = {"accuracy": hits.mean(), "auroc": outcome.auroc(chosen)}
        if len(null):
            row["null_accuracy"] = of_null.mean()
            row["null_std"] = of_null.mean(1).std(ddof=1)
            row["p_value"] = welch_p(hits, of_null.ravel())
        if len(contexts) > 1:
            for label, context in (contexts | {"filtered": None}).items():
                row[f"{label}_accuracy"] = outcome.hits(context).mean()
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


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, Any]:
    """Measure intuitive physics.

    Args:
      model: with a predictor.
      config: from `settings.physics`.

    Returns:
      See `tabulate_outcomes`. For data without labels (the test sets of IntPhys and
      IntPhys 2) instead the surprise of every video, {video: {"mean", "max"}} over its
      windows.

    Raises:
      UserError: the model cannot predict, or protocol, data and model do not fit.
    """
    settings.validate(config)
    model.require_predictor(config.mask_index)
    protocol = Protocol(
        config.num_frames or model.video_shape[0],
        config.stride,
        tuple(config.context_frames),
        config.mask_index,
    )
    protocol.validate(model.encoder.tubelet_size)
    chosen = None
    if config.reported_context:
        if config.reported_context not in protocol.context_frames:
            raise UserError(
                f"config.reported_context={config.reported_context}: give 0 or one of "
                f"context_frames={protocol.context_frames}"
            )
        chosen = protocol.context_frames.index(config.reported_context)
    if config.null_seeds == 1:
        raise UserError(
            "config.null_seeds=1: a standard deviation needs at least 2; give 0 for no "
            "untrained models"
        )
    path = config.path or model.config.world.path
    groups = open_groups(config.dataset, path, config.lists, config.rows)
    has_labels = all(v.is_possible is not None for g in groups for v in g.videos)
    num_models = 1 + (config.null_seeds if has_labels else 0)
    outcomes: list[dict[str, Outcome]] = [{} for _ in range(num_models)]
    unlabelled: dict[str, dict[str, float]] = {}
    measure = with_early_contexts if config.early_contexts else surprise
    for part, pixels in _read(groups, config, model.video_shape[1], protocol):
        videos = [video for of_group in pixels for video in of_group]
        for number, outcome in enumerate(outcomes):
            # One untrained model at a time is in memory.
            network = random_init(model, config.seed + number) if number else model
            losses = iter(measure(network, videos, protocol, config.batch_size))
            for group, of_group in zip(part, pixels, strict=True):
                own = [next(losses) for _ in of_group]
                if has_labels:
                    _add_group(outcome, group, of_group, own)
                else:
                    unlabelled |= _without_labels(group, own, chosen)
    if not has_labels:
        return unlabelled
    return tabulate_outcomes(outcomes[0], outcomes[1:], protocol.context_frames, chosen)


def _add_group(
    outcomes: dict[str, Outcome],
    group: Group,
    videos: list[np.ndarray],
    losses: list[np.ndarray],
) -> None:
    outcome = outcomes.setdefault(group.property, Outcome([], []))
    for possible, impossible in matched_pairs(group, videos):
        outcome.pairs.append((losses[possible], losses[impossible]))
    for video, loss in zip(group.videos, losses, strict=True):
        outcome.videos.append((loss, bool(video.is_possible)))


def _without_labels(
    group: Group, losses: list[np.ndarray], chosen: int | None
) -> dict[str, dict[str, float]]:
    found = {}
    for video, loss in zip(group.videos, losses, strict=True):
        # Frames of a video of IntPhys are in a folder of their own.
        parts = (
            video.path.parts[-3:-1] if video.path.is_dir() else video.path.parts[-1:]
        )
        name = "/".join([group.property, *parts])
        score = _of_context(loss, chosen)
        found[name] = {"mean": float(score.mean()), "max": float(score.max())}
    return found


def _read(
    groups: list[Group], config: ConfigDict, size: int, protocol: Protocol
) -> Iterator[tuple[list[Group], list[list[np.ndarray]]]]:
    """Yield groups with their videos, `config.groups_at_once` at a time."""
    read = functools.partial(
        read_group,
        size=config.resolution or size,
        frame_step=config.frame_step,
        max_frames=config.max_frames,
    )
    with concurrent.futures.ThreadPoolExecutor(max(1, config.num_workers)) as pool:
        for first in range(0, len(groups), config.groups_at_once):
            part = groups[first : first + config.groups_at_once]
            pixels = list(pool.map(read, part))
            for group, of_group in zip(part, pixels, strict=True):
                for video, frames in zip(group.videos, of_group, strict=True):
                    if len(frames) < protocol.num_frames:
                        raise UserError(
                            f"{video.path}: {len(frames)} frames are fewer than the "
                            f"window's {protocol.num_frames}: lower "
                            "config.num_frames or config.frame_step"
                        )
            yield part, pixels
