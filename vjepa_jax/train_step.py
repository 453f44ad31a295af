"""One update as a pure function: masks, target, prediction, gradient, AdamW, EMA."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax import losses, masking
from vjepa_jax.models.encoder import (
    VideoEncoder,
    normalise,
    take_tokens,
    token_grid,
)
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.optim import Schedule
from vjepa_jax.train_state import TrainState

Batch = Mapping[str, Mapping[str, jax.Array]]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of clips of one static shape.

    Attributes:
      masks: mask types by name; each is a separate context and prediction.
      weight: share of the stream's loss in the total; weights are normalised.
    """

    masks: Mapping[str, masking.MaskSpec]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
      exponent: p of the regression |error|^p / p.
      variance_weight, covariance_weight: weights of VICReg's terms on the context
        encoder's tokens; 0 is V-JEPA's plain objective.
    """

    exponent: float = 1.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0


def _sample_masks(key, batch: Batch, streams: Mapping[str, Stream], encoder):
    """Draw all masks of a step: {stream: {mask: (ctx_idx, tgt_idx)}}."""
    out: dict[str, dict[str, tuple[jax.Array, jax.Array]]] = {}
    for s, (name, stream) in enumerate(sorted(streams.items())):
        video = batch[name]["video"]
        grid = token_grid(video.shape, encoder.patch_size, encoder.tubelet_size)
        stream_key = jax.random.fold_in(key, s)
        shape_key = jax.random.fold_in(stream_key, 0)
        out[name] = {
            mask: masking.sample(
                jax.random.fold_in(stream_key, m), shape_key, len(video), grid, spec
            )
            for m, (mask, spec) in enumerate(stream.masks.items(), start=1)
        }
    return out


def make_loss_fn(
    encoder: VideoEncoder,
    predictor: Predictor,
    streams: Mapping[str, Stream],
    objective: Objective,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Make `loss_fn(params, target, batch, masks) -> (loss, metrics)`.

    `masks` is explicit, {stream: {mask: (ctx_idx, tgt_idx)}}, so that any can be
    injected. There is no gradient to `target`.
    """
    total_weight = sum(stream.weight for stream in streams.values())

    def stream_loss(params, target, video, names, masks):
        grid = token_grid(video.shape, encoder.patch_size, encoder.tubelet_size)
        video = normalise(video)
        with jax.named_scope("target"):
            features = encoder.apply({"params": target}, video)
            features = jax.lax.stop_gradient(losses.normalise_target(features))
        metrics: Metrics = {}
        terms, variances, covariances = [], [], []
        # Numbered by the config's order: jax sorts the keys of what passes through it.
        for index, name in enumerate(names):
            ctx_idx, tgt_idx = masks[name]
            with jax.named_scope("encoder"):
                context = encoder.apply({"params": params["encoder"]}, video, ctx_idx)
            with jax.named_scope("predictor"):
                prediction = predictor.apply(
                    {"params": params["predictor"]},
                    context,
                    ctx_idx,
                    tgt_idx,
                    grid,
                    mask_index=index,
                )
            with jax.named_scope("loss"):
                wanted = take_tokens(features, tgt_idx)
                terms.append(losses.regression(prediction, wanted, objective.exponent))
                variance, covariance = losses.variance_covariance(context)
            variances.append(variance)
            covariances.append(covariance)
            metrics[f"train/loss_{name}"] = terms[-1]
        regression = sum(terms) / len(terms)
        variance = sum(variances) / len(terms)
        covariance = sum(covariances) / len(terms)
        loss = regression
        if objective.variance_weight:
            loss += objective.variance_weight * variance
        if objective.covariance_weight:
            loss += objective.covariance_weight * covariance
        of_target = losses.collapse_statistics(features)
        of_context = losses.collapse_statistics(context)
        of_prediction = losses.collapse_statistics(prediction)
        metrics |= {
            "train/loss": regression,
            "train/variance_term": variance,
            "train/covariance_term": covariance,
            "repr/target_std": of_target["std"],
            "repr/target_effective_rank": of_target["effective_rank"],
            "repr/target_cosine": of_target["cosine"],
            "repr/context_std": of_context["std"],
            "repr/context_effective_rank": of_context["effective_rank"],
            "repr/predictor_std_ratio": of_prediction["std"] / of_target["std"],
        }
        return loss, metrics

    def loss_fn(params, target, batch: Batch, masks) -> tuple[jax.Array, Metrics]:
        total, metrics = jnp.zeros(()), {}
        for name, stream in streams.items():
            loss, of_stream = stream_loss(
                params, target, batch[name]["video"], tuple(stream.masks), masks[name]
            )
            share = stream.weight / total_weight
            total += share * loss
            for key, value in of_stream.items():
                metrics[key] = metrics.get(key, 0.0) + share * value
        return total, metrics

    return loss_fn


def _microbatches(tree: Any, count: int):
    """Split the batch axis of every leaf: [B, ...] -> [count, B / count, ...].

    Strided, so that each microbatch is spread over all devices that hold the batch.
    """
    return jax.tree.map(
        lambda x: x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1), tree
    )


def make_train_step(
    encoder: VideoEncoder,
    predictor: Predictor,
    tx: optax.GradientTransformation,
    schedules: Mapping[str, Schedule],
    streams: Mapping[str, Stream],
    objective: Objective,
    seed: int,
    accumulate_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the pure `train_step(state, batch) -> (state, metrics)`.

    Args:
      encoder, predictor, tx: modules and optimiser.
      schedules: `learning_rate` and `weight_decay` (reported; `tx` holds them too) and
        `ema_momentum`, functions of the finished steps.
      streams: by the name under which the batch holds them.
      objective: what is minimised.
      seed: masks are drawn from `fold_in(key(seed), step)` alone, hence they depend
        neither on the mesh nor on accumulation.
      accumulate_steps: microbatches per update, run one after the other.

    Returns:
      The step. Its batch is {stream: {"video": uint8 [B, T, H, W, 3]}}; its metrics are
      float32 scalars, averaged over the batch.
    """
    loss_fn = make_loss_fn(encoder, predictor, streams, objective)
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def accumulate(params, target, batch, masks):
        if accumulate_steps == 1:
            return grad_fn(params, target, batch, masks)
        parts = _microbatches((batch, masks), accumulate_steps)

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(params, target, *part)), None

        shapes = jax.eval_shape(
            grad_fn, params, target, *jax.tree.map(lambda x: x[0], parts)
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate_steps, total)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        masks = _sample_masks(key, batch, streams, encoder)
        grads, metrics = accumulate(state.params, state.target, batch, masks)
        with jax.named_scope("optimiser"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        momentum = schedules["ema_momentum"](state.step)
        metrics |= {
            "optim/grad_norm_encoder": optax.tree.norm(grads["encoder"]),
            "optim/grad_norm_predictor": optax.tree.norm(grads["predictor"]),
            "optim/learning_rate": schedules["learning_rate"](state.step),
            "optim/weight_decay": schedules["weight_decay"](state.step),
            "optim/ema_momentum": momentum,
        }
        target = optax.incremental_update(
            params["encoder"], state.target, step_size=1 - momentum
        )
        state = TrainState(state.step + 1, params, target, opt_state)
        return state, metrics

    return train_step
