"""One update as a pure function: masks, target, prediction, gradient, AdamW, EMA."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.layers import take_tokens, tubelets
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses, masking
from vjepa_jax.objective.optim import Schedule
from vjepa_jax.objective.state import Guard, TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of clips of one static shape.

    Attributes:
      masks: mask types by name; each is a separate context and prediction.
      weight: share of the stream's loss in the total; weights are normalised.
      mask_indices: which of the predictor's mask tokens stands for each mask type.
    """

    masks: Mapping[str, masking.MaskSpec]
    weight: float = 1.0
    mask_indices: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the regression of hidden tokens, plus weighted terms.

    Attributes:
      target: what is predicted of a token: `features` of the target encoder, or its
        `pixels`, normalised tubelet by tubelet as in a masked autoencoder
        (arXiv 2111.06377, §3). The target encoder is averaged all the same.
      exponent: p of the regression |error|^p / p.
      context_weight: of the regression of visible tokens (V-JEPA 2.1).
      context_warmup: steps at which that weight leaves 0 and at which it is reached.
      context_distance: divide a visible token's loss by the root of its distance to the
        nearest predicted token.
      prediction_variance_weight: of V-JEPA 1's term on predictions.
      variance_weight, covariance_weight: of VICReg's terms on the context encoder's
        tokens; not part of V-JEPA.
    """

    target: str = "features"
    exponent: float = 1.0
    context_weight: float = 0.0
    context_warmup: tuple[int, int] = (0, 0)
    context_distance: bool = True
    prediction_variance_weight: float = 0.0
    variance_weight: float = 0.0
    covariance_weight: float = 0.0

    def context_factor(self, step: jax.Array) -> jax.Array:
        """Return the weight of the visible tokens' regression at a step."""
        start, end = self.context_warmup
        done = (step - start + (end == start)) / max(end - start, 1)
        return self.context_weight * jnp.clip(done, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """Refuses updates whose loss is far above the recent ones.

    The loss is the global batch's, so that all devices decide alike.

    Attributes:
      window: updates whose losses are compared.
      deviations: standard deviations above their mean from which a loss is a spike.
    """

    window: int
    deviations: float

    def is_spike(self, loss: jax.Array, recent: jax.Array) -> jax.Array:
        """Compare a loss to the last `window`; never true before there are so many."""
        # A comparison with NaN, which stands for "not yet", is false.
        return loss > recent.mean() + self.deviations * recent.std()


def sample_masks(key, batch: Batch, streams: Mapping[str, Stream], encoder):
    """Draw all masks of a step.

    Args:
      key: of the step; each stream and mask type has its own from it.
      batch: {stream: [B, T, H, W, 3]}.
      streams: with the masks' specifications.
      encoder: whose tokens they are of.

    Returns:
      {stream: {mask: (ctx_idx, tgt_idx)}}, see `masking.sample`.
    """
    out: dict[str, dict[str, tuple[jax.Array, jax.Array]]] = {}
    for s, (name, stream) in enumerate(sorted(streams.items())):
        video = batch[name]
        grid = encoder.grid(video.shape)
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
    teacher: VideoEncoder | None = None,
    target_dtype: str = "",
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Make `loss_fn(params, target, batch, masks, step) -> (loss, metrics)`.

    `masks` is explicit, {stream: {mask: (ctx_idx, tgt_idx)}}, so that any can be
    injected; clips are uint8, or float and normalised already. There is no gradient to
    `target`, which holds the parameters of `teacher`, by default those of an `encoder`;
    `target_dtype` is its `matmul_dtype`.
    """
    total_weight = sum(stream.weight for stream in streams.values())
    is_regularised = bool(objective.variance_weight or objective.covariance_weight)
    # Without a gradient there is nothing to recompute.
    target_encoder = (teacher or encoder).clone(remat="none", matmul_dtype=target_dtype)

    is_pixels = objective.target == "pixels"
    target_levels = 1 if is_pixels else target_encoder.num_levels

    def targets(params, video):
        if is_pixels:
            of_tokens = tubelets(video, encoder.patch_size, encoder.tubelet_size)
        else:
            of_tokens = target_encoder.apply({"params": params}, video)
        return losses.normalise_target(of_tokens, target_levels)

    def describe(features, num_levels):
        # Covariances are added up over devices: those of all levels of a ViT-G would be
        # as much as a tenth of its gradients, for what is only logged.
        level = losses.deepest_level(features, num_levels)
        return losses.collapse_statistics(level)

    def stream_loss(params, target, video, stream, masks, step):
        grid, is_image = encoder.grid(video.shape), encoder.is_image(video.shape)
        if video.dtype == jnp.uint8:
            video = normalise(video)
        with jax.named_scope("target"):
            features = jax.lax.stop_gradient(targets(target, video))
        metrics: Metrics = {}
        terms: dict[str, list[jax.Array]] = collections.defaultdict(list)
        predictions = []
        # Numbered by the config's order: jax sorts the keys of what passes through it.
        indices = stream.mask_indices or range(len(stream.masks))
        for index, name in zip(indices, stream.masks, strict=True):
            ctx_idx, tgt_idx = masks[name]
            with jax.named_scope("encoder"):
                context = encoder.apply({"params": params["encoder"]}, video, ctx_idx)
            with jax.named_scope("predictor"):
                prediction, of_context = predictor.apply(
                    {"params": params["predictor"]},
                    context,
                    ctx_idx,
                    tgt_idx,
                    grid,
                    mask_index=index,
                    is_image=is_image,
                )
            with jax.named_scope("loss"):
                p = objective.exponent
                loss = losses.regression(prediction, take_tokens(features, tgt_idx), p)
                terms["regression"].append(loss)
                if objective.context_weight:
                    weights = None
                    if objective.context_distance:
                        far = losses.distance_to_targets(ctx_idx, tgt_idx, grid)
                        weights = jax.lax.rsqrt(far)
                    wanted = take_tokens(features, ctx_idx)
                    terms["context"].append(
                        losses.regression(of_context, wanted, p, weights)
                    )
                if is_regularised:
                    variance, covariance = losses.variance_covariance(context)
                    terms["variance"].append(variance)
                    terms["covariance"].append(covariance)
            predictions.append(prediction)
            metrics[f"train/loss_{name}"] = loss
        means = {name: sum(values) / len(values) for name, values in terms.items()}
        total = means["regression"]
        if objective.context_weight:
            total += objective.context_factor(step) * means["context"]
            metrics["train/context_term"] = means["context"]
        if objective.prediction_variance_weight:
            term = losses.prediction_variance(predictions)
            total += objective.prediction_variance_weight * term
            metrics["train/prediction_variance_term"] = term
        if is_regularised:
            total += objective.variance_weight * means["variance"]
            total += objective.covariance_weight * means["covariance"]
            metrics["train/variance_term"] = means["variance"]
            metrics["train/covariance_term"] = means["covariance"]
        of_target = describe(features, target_levels)
        of_encoder = describe(context, encoder.num_levels)
        of_prediction = describe(prediction, target_levels)
        metrics |= {
            "train/loss": means["regression"],
            "train/total_loss": total,
            "repr/target_std": of_target["std"],
            "repr/target_effective_rank": of_target["effective_rank"],
            "repr/target_cosine": of_target["cosine"],
            "repr/context_std": of_encoder["std"],
            "repr/context_effective_rank": of_encoder["effective_rank"],
            "repr/predictor_std_ratio": of_prediction["std"] / of_target["std"],
        }
        return total, metrics

    def loss_fn(params, target, batch: Batch, masks, step):
        total, metrics = jnp.zeros(()), {}
        shares: dict[str, float] = collections.defaultdict(float)
        for name, stream in streams.items():
            loss, of_stream = stream_loss(
                params, target, batch[name], stream, masks[name], step
            )
            share = stream.weight / total_weight
            total += share * loss
            if len(streams) > 1:
                metrics[f"train/loss_of_{name}"] = of_stream["train/loss"]
            for key, value in of_stream.items():
                metrics[key] = metrics.get(key, 0.0) + share * value
                shares[key] += share
        # A mask type of some streams only is averaged over those.
        means = {k: v / shares[k] if k in shares else v for k, v in metrics.items()}
        return total, means

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
    tx: optax.GradientTransformationExtraArgs,
    schedules: Mapping[str, Schedule],
    streams: Mapping[str, Stream],
    objective: Objective,
    seed: int,
    accumulate_steps: int = 1,
    spike_guard: SpikeGuard | None = None,
    teacher: VideoEncoder | None = None,
    target_dtype: str = "",
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make the pure `train_step(state, batch) -> (state, metrics)`.

    An update whose loss or gradient is not finite, or whose loss is a spike, is not
    taken: parameters, moments and target stay, the step counts on, and with it the
    schedules, the data and the masks.

    Args:
      encoder, predictor, tx: modules and optimiser.
      schedules: `learning_rate` and `weight_decay` (reported; `tx` holds them too) and
        `ema_momentum`, functions of the finished steps.
      streams: by the name under which the batch holds them.
      objective: what is minimised.
      seed: masks are drawn from `fold_in(key(seed), step)` alone, hence they depend
        neither on the mesh nor on accumulation.
      accumulate_steps: microbatches per update, run one after the other.
      spike_guard: refuses updates of outlying loss; its window is the state's.
      teacher: a frozen encoder whose features are predicted instead of the EMA
        target's (distillation). The step then is
        `train_step(state, batch, teacher_params)`; the target is still averaged.
      target_dtype: 8-bit type of the matmuls of what is predicted, see
        `layers.Dense`; "": the encoder's.

    Returns:
      The step. Its batch is {stream: uint8 [B, T, H, W, 3]}; its metrics are
      float32 scalars, averaged over the batch.
    """
    loss_fn = make_loss_fn(
        encoder, predictor, streams, objective, teacher, target_dtype
    )
    grad_fn = jax.grad(loss_fn, has_aux=True)

    def accumulate(params, target, batch, masks, step):
        if accumulate_steps == 1:
            return grad_fn(params, target, batch, masks, step)
        parts = _microbatches((batch, masks), accumulate_steps)

        def add(total, part):
            part = grad_fn(params, target, *part, step)
            return jax.tree.map(jnp.add, total, part), None

        shapes = jax.eval_shape(
            grad_fn, params, target, *jax.tree.map(lambda x: x[0], parts), step
        )
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate_steps, total)

    def guarded(guard: Guard, loss, norms) -> tuple[jax.Array, Guard]:
        """Return whether to take the update, and the guard after it."""
        taken = jnp.isfinite(loss)
        for norm in norms:
            taken &= jnp.isfinite(norm)
        recent = guard.losses
        if spike_guard is not None:
            taken &= ~spike_guard.is_spike(loss, recent)
            moved = jnp.append(recent[1:], loss)
            recent = jnp.where(taken, moved, recent)
        refused = 1 - taken.astype(jnp.int32)
        in_row = (guard.skipped_in_row + 1) * refused
        return taken, Guard(
            skipped=guard.skipped + refused,
            skipped_in_row=in_row,
            most_skipped_in_row=jnp.maximum(guard.most_skipped_in_row, in_row),
            losses=recent,
        )

    def train_step(state: TrainState, batch: Batch, teacher_params=None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        masks = sample_masks(key, batch, streams, encoder)
        target = state.target if teacher is None else teacher_params
        grads, metrics = accumulate(state.params, target, batch, masks, state.step)
        norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}
        taken, guard = guarded(state.guard, metrics["train/total_loss"], norms.values())
        with jax.named_scope("optimiser"):
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, step=state.step
            )
            params = optax.apply_updates(state.params, updates)
        momentum = schedules["ema_momentum"](state.step)
        with jax.named_scope("ema"):
            ema = optax.incremental_update(
                params["encoder"], state.target, step_size=1 - momentum
            )
        params, ema, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (params, ema, opt_state),
            (state.params, state.target, state.opt_state),
        )
        metrics |= {
            "optim/grad_norm_encoder": norms["encoder"],
            "optim/grad_norm_predictor": norms["predictor"],
            "optim/learning_rate": schedules["learning_rate"](state.step),
            "optim/weight_decay": schedules["weight_decay"](state.step),
            "optim/ema_momentum": momentum,
            "optim/skipped": guard.skipped.astype(jnp.float32),
            "optim/skipped_in_row": guard.skipped_in_row.astype(jnp.float32),
            "optim/most_skipped_in_row": guard.most_skipped_in_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, ema, opt_state, guard), metrics

    return train_step
