"""Schedules as functions of the step, and AdamW as the official code configures it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_cosine(
    start: float, peak: float, end: float, warmup_steps: int, decay_steps: int
) -> Schedule:
    """Rise linearly from `start` to `peak`, then fall along a cosine to `end`.

    The official schedules count before they are read: the first update uses step 1
    (`src/utils/schedulers.py`), hence `schedule(0)` is one step into the warm-up.

    Args:
      start, peak, end: values; `start` is only met when there is a warm-up.
      warmup_steps: steps of the rise.
      decay_steps: step at which `end` is reached; later steps stay there.
    """

    def schedule(step):
        s = jnp.asarray(step, jnp.float32) + 1
        rise = start + (s / max(warmup_steps, 1)) * (peak - start)
        progress = (s - warmup_steps) / max(decay_steps - warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return jnp.where(s < warmup_steps, rise, end + (peak - end) * cosine)

    return schedule


def linear_decay(start: float, end: float, decay_steps: int) -> Schedule:
    """Fall linearly from `start` to `end`: the official cooldown, first update at 1.

    Later steps stay at `end`; the official code would go on falling.
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
    """Rise linearly to `peak`, stay, and fall linearly to `end` in the last steps.

    Args:
      start, peak, end: values; `start` is only met when there is a warm-up.
      warmup_steps: steps of the rise.
      anneal_steps: steps of the fall.
      decay_steps: step at which `end` is reached; later steps stay there.
    """

    def schedule(step):
        s = jnp.asarray(step, jnp.float32) + 1
        rise = start + (s / max(warmup_steps, 1)) * (peak - start)
        fallen = (s - (decay_steps - anneal_steps)) / max(anneal_steps, 1)
        fall = peak + jnp.clip(fallen, 0, 1) * (end - peak)
        return jnp.where(s < warmup_steps, rise, fall)

    return schedule


def cosine(start: float, end: float, decay_steps: int) -> Schedule:
    """Move from `start` to `end` along a half cosine (the weight decay's schedule)."""
    return warmup_cosine(start, start, end, 0, decay_steps)


def linear(start: float, end: float, decay_steps: int) -> Schedule:
    """Move linearly from `start` at step 0 to `end` (the EMA momentum's schedule)."""

    def schedule(step):
        progress = jnp.asarray(step, jnp.float32) / max(decay_steps, 1)
        return start + jnp.minimum(progress, 1) * (end - start)

    return schedule


def decay_mask(params):
    """Mark what weight decay applies to: a tree of bools shaped like `params`.

    As in the official code, everything decays but biases and norm scales (one
    dimension per layer). Mask tokens and modality embeddings do decay there.
    """

    def decays(path, leaf):
        name = path[-1].key if hasattr(path[-1], "key") else path[-1].name
        return name not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(
    learning_rate: Schedule,
    weight_decay: Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float = 0.0,
    clip_start_step: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW with decay decoupled but multiplied by the rate, as PyTorch's is.

    Its `update` takes the run's `step` as a keyword. The schedules follow that, not a
    count of their own, so that a skipped update does not hold them back.

    Args:
      learning_rate, weight_decay: schedules of the step.
      b1, b2, eps: Adam's constants.
      clip_norm: largest global norm of each module's gradient (encoder, predictor
        apart, as V-JEPA does); 0 does not clip.
      clip_start_step: first step whose gradient is clipped.
    """
    clip = clip_by_module_norm(clip_norm, clip_start_step)
    return optax.chain(
        # In any case something, so that the state does not depend on clipping.
        clip if clip_norm else optax.identity(),
        optax.scale_by_adam(b1, b2, eps),
        _decay_and_scale(learning_rate, weight_decay),
    )


def _decay_and_scale(learning_rate: Schedule, weight_decay: Schedule):
    """Add `weight_decay` times the parameter, then multiply by minus the rate."""

    def update(updates, state, params, *, step, **_):
        rate, decay = learning_rate(step), weight_decay(step)

        def scaled(update, param, decays):
            return -rate * (update + decay * param if decays else update)

        return jax.tree.map(scaled, updates, params, decay_mask(params)), state

    return optax.GradientTransformationExtraArgs(_stateless, update)


def clip_by_module_norm(
    max_norm: float, start_step: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Clip each top-level entry of the gradient to its own global norm.

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
