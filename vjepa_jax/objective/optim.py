"""Schedules as functions of the step, and AdamW as in the official code."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_cosine(
    start: float, peak: float, end: float, warmup_steps: int, decay_steps: int
) -> Schedule:
    """Make a schedule: linear warm-up to `peak`, then cosine decay to `end`.

    The official schedules increment their count before they use it
    (`src/utils/schedulers.py`), so `schedule(0)` is one step into the warm-up.

    Args:
      start, peak, end: values; `start` is not used without a warm-up.
      warmup_steps: length of the warm-up.
      decay_steps: step at which `end` is reached; constant from there on.
    """

    def schedule(step):
        s = jnp.asarray(step, jnp.float32) + 1
        rise = start + (s / max(warmup_steps, 1)) * (peak - start)
        progress = (s - warmup_steps) / max(decay_steps - warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(s < warmup_steps, rise, end + (peak - end) * cosine)

    return schedule


def linear_decay(start: float, end: float, decay_steps: int) -> Schedule:
    """Make a linear schedule from `start` to `end`: the official cooldown.

    As in `warmup_cosine`, `schedule(0)` is one step into the decay. After `decay_steps`
    it is constant; the official code would continue to decrease.
    """

    def schedule(step):
        progress = (jnp.asarray(step, jnp.float32) + 1) / max(decay_steps, 1)
        return start + jnp.minimum(progress, 1) * (end - start)

    return schedule


def warmup_stable_decay(
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    anneal_steps: int,
    decay_steps: int,
) -> Schedule:
    """Make a schedule: linear warm-up to `peak`, constant, linear decay to `end`.

    Args:
      start, peak, end, warmup_steps, decay_steps: see `warmup_cosine`.
      anneal_steps: length of the final decay.
    """

    def schedule(step):
        s = jnp.asarray(step, jnp.float32) + 1
        rise = start + (s / max(warmup_steps, 1)) * (peak - start)
        fallen = (s - (decay_steps - anneal_steps)) / max(anneal_steps, 1)
        fall = peak + jnp.clip(fallen, 0, 1) * (end - peak)
        return jnp.where(s < warmup_steps, rise, fall)

    return schedule


def cosine(start: float, end: float, decay_steps: int) -> Schedule:
    """Make a half-cosine schedule from `start` to `end` (used for weight decay)."""
    return warmup_cosine(start, start, end, 0, decay_steps)


def linear(start: float, end: float, decay_steps: int) -> Schedule:
    """Make a linear schedule from `start` at step 0 to `end` (for EMA momentum)."""

    def schedule(step):
        progress = jnp.asarray(step, jnp.float32) / max(decay_steps, 1)
        return start + jnp.minimum(progress, 1) * (end - start)

    return schedule


def is_decayed(params: Any) -> Any:
    """Return a tree of bools like `params`: whether weight decay applies.

    As in the official code, it applies to everything except biases and norm scales,
    that is, also to mask tokens and modality embeddings.
    """

    def decays(path, leaf):
        name = path[-1].key if hasattr(path[-1], "key") else path[-1].name
        return name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    learning_rate: Schedule,
    weight_decay: Schedule,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    clip_norm: float = 0.0,
    clip_start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW, with weight decay multiplied by the learning rate as in PyTorch.

    Its `update` takes the run's `step` as a keyword argument. The schedules depend on
    it, not on a count of their own, so that a skipped update does not delay them.

    Args:
      learning_rate, weight_decay: schedules.
      betas, eps: Adam's constants.
      clip_norm: largest global norm of each module's gradient (encoder and predictor
        separately, as V-JEPA does); 0: no clipping.
      clip_start_step: first step whose gradient is clipped.
    """
    clip = clip_by_module_norm(clip_norm, clip_start_step)
    return optax.chain(
        # The identity keeps the state's structure the same with and without clipping.
        clip if clip_norm else optax.identity(),
        optax.scale_by_adam(*betas, eps),
        _decay_and_scale(learning_rate, weight_decay),
    )


def _decay_and_scale(
    learning_rate: Schedule, weight_decay: Schedule
) -> optax.GradientTransformationExtraArgs:
    """Add weight decay, then multiply by minus the learning rate."""

    def update(updates, state, params, *, step, **_):
        rate, decay = learning_rate(step), weight_decay(step)

        def scaled(update, param, decays):
            return -rate * (update + decay * param if decays else update)

        return jax.tree.map(scaled, updates, params, is_decayed(params)), state

    return optax.GradientTransformationExtraArgs(_stateless, update)


def clip_by_module_norm(
    max_norm: float, start_step: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Clip the global norm of each top-level entry of the gradient.

    Steps before `start_step` are not clipped (V-JEPA clips after the warm-up).
    """

    def update(updates, state, params=None, *, step, **_):
        del params

        def clip(tree):
            norm = optax.tree.norm(tree)
            clipped = max_norm / jnp.maximum(norm, max_norm)
            return optax.tree.scale(jnp.where(step >= start_step, clipped, 1.0), tree)

        return {name: clip(tree) for name, tree in updates.items()}, state

    return optax.GradientTransformationExtraArgs(_stateless, update)


def _stateless(params) -> optax.EmptyState:
    del params
    return optax.EmptyState()
