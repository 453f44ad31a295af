"""V-JEPA's objective: predict the features of hidden tokens from visible ones.

V-JEPA 1, 2 and 2.1, distillation from a frozen teacher, and pixels as targets are
fields of one objective.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.layers import take_tokens, tubelets
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses, masking
from vjepa_jax.objective.objective import Batch, Metrics, Params
from vjepa_jax.objective.optim import Schedule

# {stream: {mask type: (context indices [B, K], target indices [B, M])}}
Masks = Mapping[str, Mapping[str, tuple[jax.Array, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Stream:
    """A stream of clips of one static shape.

    Attributes:
      masks: mask types by name; each is a separate context and prediction.
      weight: share of the stream's loss in the total; weights are normalised.
      mask_indices: index of the predictor's mask token for each mask type; (): 0, 1,
        and so on.
    """

    masks: Mapping[str, masking.MaskSpec]
    weight: float = 1.0
    mask_indices: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """The regression of hidden tokens and the weighted terms added to it.

    Attributes:
      target: what is predicted of a token: `features` of the target encoder, or its
        `pixels`, normalised per tubelet as in a masked autoencoder (arXiv 2111.06377,
        §3). The target encoder is averaged in both cases.
      exponent: p of the regression |error|^p / p.
      context_weight: weight of the regression of visible tokens (V-JEPA 2.1).
      context_warmup: (start, end) steps between which that weight rises from 0.
      context_distance: divide a visible token's loss by the square root of its distance
        to the nearest predicted token.
      prediction_variance_weight: weight of V-JEPA 1's term on predictions.
      variance_weight, covariance_weight: weights of VICReg's terms on the context
        encoder's tokens; not part of V-JEPA.
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


def init_models(
    keys: tuple[jax.Array, jax.Array],
    encoder: VideoEncoder,
    predictor: Predictor | None,
    clip_shape: tuple[int, ...],
) -> Params:
    """Initialise encoder and predictor.

    Args:
      keys: random keys of encoder and predictor.
      encoder: module.
      predictor: module; None: only the encoder is initialised.
      clip_shape: (T, H, W, C) of a clip; the parameters' shapes do not depend on it.

    Returns:
      {"encoder", "predictor"}: parameters boxed with their logical axes.
    """
    encoder_key, predictor_key = keys
    video = jnp.zeros((1, *clip_shape))
    params = {"encoder": encoder.init(encoder_key, video)["params"]}
    if predictor is not None:
        context = jnp.zeros((1, 1, encoder.out_dim))
        one, grid = jnp.zeros((1, 1), jnp.int32), encoder.grid(clip_shape)
        variables = predictor.init(predictor_key, context, one, one, grid)
        params["predictor"] = variables["params"]
    return params


@dataclasses.dataclass(frozen=True)
class MaskedObjective:
    """Prediction of masked tokens; for the methods see `objective.objective.Objective`.

    Attributes:
      encoder, predictor: the trained modules.
      streams: by the names under which the batch holds their clips.
      terms: the loss.
      ema_momentum: of the target encoder, by finished steps.
      teacher: a frozen encoder whose features are predicted instead of the EMA
        target's (distillation); `loss` takes its parameters as `target` then.
      target_dtype: 8-bit dtype of the target encoder's matmuls, see `layers.Dense`;
        "": the encoder's dtype.
      probe_item: see `Objective`.
    """

    encoder: VideoEncoder
    predictor: Predictor
    streams: Mapping[str, Stream]
    terms: LossTerms = LossTerms()
    ema_momentum: Schedule = lambda step: jnp.ones(())
    teacher: VideoEncoder | None = None
    target_dtype: str = ""
    probe_item: str = "target"

    def init(
        self, key: jax.Array, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Any]:
        """Initialise both models; the target starts as a copy of the encoder."""
        clip_shape = next(iter(batch.values())).shape[1:]
        encoder_key, predictor_key = jax.random.split(key)
        keys = encoder_key, predictor_key
        params = init_models(keys, self.encoder, self.predictor, clip_shape)
        # A copy, since donation forbids that two arrays share a buffer.
        return params, jax.tree.map(jnp.copy, params["encoder"])

    def sample(self, key: jax.Array, batch: Batch) -> Masks:
        """Draw all masks of a step, each stream and mask type with its own key.

        Args:
          key: of the step.
          batch: {stream: [B, T, H, W, 3]}.

        Returns:
          {stream: {mask type: (ctx_idx, tgt_idx)}}, see `masking.sample`.
        """
        out: dict[str, dict[str, tuple[jax.Array, jax.Array]]] = {}
        for s, (name, stream) in enumerate(sorted(self.streams.items())):
            video = batch[name]
            grid = self.encoder.grid(video.shape)
            stream_key = jax.random.fold_in(key, s)
            shape_key = jax.random.fold_in(stream_key, 0)
            out[name] = {
                mask: masking.sample(
                    jax.random.fold_in(stream_key, m), shape_key, len(video), grid, spec
                )
                for m, (mask, spec) in enumerate(stream.masks.items(), start=1)
            }
        return out

    def loss(
        self,
        params: Params,
        target: Any,
        batch: Batch,
        sampled: Masks,
        key: jax.Array | None,
        step: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        """Compute the weighted mean loss of all streams.

        Args:
          params: {"encoder", "predictor"}.
          target: parameters of the target encoder, or of the teacher, which get no
            gradient.
          batch: {stream: [B, T, H, W, 3]}, uint8, or float and already normalised.
          sampled: the masks; any masks can be injected.
          key: not used.
          step: finished steps.

        Returns:
          (loss, metrics), float32 scalars.
        """
        del key
        total_weight = sum(stream.weight for stream in self.streams.values())
        total, metrics = jnp.zeros(()), {}
        shares: dict[str, float] = collections.defaultdict(float)
        for name, stream in self.streams.items():
            loss, of_stream = self._stream_loss(
                params, target, batch[name], stream, sampled[name], step
            )
            share = stream.weight / total_weight
            total += share * loss
            if len(self.streams) > 1:
                metrics[f"train/loss_of_{name}"] = of_stream["train/loss"]
            for metric, value in of_stream.items():
                metrics[metric] = metrics.get(metric, 0.0) + share * value
                shares[metric] += share
        # A metric that only some streams have is averaged over those.
        means = {k: v / shares[k] if k in shares else v for k, v in metrics.items()}
        return total, means

    def update_target(self, params: Params, target: Any, step: jax.Array) -> Any:
        """Move the target towards the encoder by the EMA."""
        momentum = self.ema_momentum(step)
        with jax.named_scope("ema"):
            return optax.incremental_update(
                params["encoder"], target, step_size=1 - momentum
            )

    @property
    def modules(self) -> tuple[VideoEncoder | Predictor, ...]:
        """All its transformers, with the teacher."""
        models = self.encoder, self.predictor, self.teacher
        return tuple(model for model in models if model is not None)

    @property
    def _target_encoder(self) -> VideoEncoder:
        # Without a gradient, rematerialisation has no use.
        encoder = self.teacher or self.encoder
        return encoder.clone(remat="none", matmul_dtype=self.target_dtype)

    def _targets(self, params: Any, video: jax.Array) -> jax.Array:
        """Return the normalised targets of all tokens: [B, N, D]."""
        if self.terms.target == "pixels":
            encoder = self.encoder
            tokens = tubelets(video, encoder.patch_size, encoder.tubelet_size)
            return losses.normalise_target(tokens, 1)
        encoder = self._target_encoder
        features = cast(jax.Array, encoder.apply({"params": params}, video))
        return losses.normalise_target(features, encoder.num_levels)

    def _stream_loss(
        self,
        params: Params,
        target: Any,
        video: jax.Array,
        stream: Stream,
        masks: Mapping[str, tuple[jax.Array, jax.Array]],
        step: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        encoder, terms = self.encoder, self.terms
        is_regularised = bool(terms.variance_weight or terms.covariance_weight)
        is_pixels = terms.target == "pixels"
        target_levels = 1 if is_pixels else self._target_encoder.num_levels
        grid, is_image = encoder.grid(video.shape), encoder.is_image(video.shape)
        if video.dtype == jnp.uint8:
            video = normalise(video)
        with jax.named_scope("target"):
            features = jax.lax.stop_gradient(self._targets(target, video))
        metrics: Metrics = {}
        values: dict[str, list[jax.Array]] = collections.defaultdict(list)
        predictions: list[jax.Array] = []
        # In the order of `stream.masks`, which numbers the mask tokens; jax has sorted
        # the keys of `masks`.
        indices = stream.mask_indices or range(len(stream.masks))
        for index, name in zip(indices, stream.masks, strict=True):
            ctx_idx, tgt_idx = masks[name]
            with jax.named_scope("encoder"):
                context = cast(
                    jax.Array,
                    encoder.apply({"params": params["encoder"]}, video, ctx_idx),
                )
            with jax.named_scope("predictor"):
                prediction, of_context = cast(
                    tuple[jax.Array, jax.Array],
                    self.predictor.apply(
                        {"params": params["predictor"]},
                        context,
                        ctx_idx,
                        tgt_idx,
                        grid,
                        mask_index=index,
                        is_image=is_image,
                    ),
                )
            with jax.named_scope("loss"):
                p = terms.exponent
                loss = losses.regression(prediction, take_tokens(features, tgt_idx), p)
                values["regression"].append(loss)
                if terms.context_weight:
                    weights = None
                    if terms.context_distance:
                        far = losses.distance_to_targets(ctx_idx, tgt_idx, grid)
                        weights = jax.lax.rsqrt(far)
                    wanted = take_tokens(features, ctx_idx)
                    values["context"].append(
                        losses.regression(of_context, wanted, p, weights)
                    )
                if is_regularised:
                    variance, covariance = losses.variance_covariance(context)
                    values["variance"].append(variance)
                    values["covariance"].append(covariance)
            predictions.append(prediction)
            metrics[f"train/loss_{name}"] = loss
        means = {k: cast(jax.Array, sum(of)) / len(of) for k, of in values.items()}
        total = means["regression"]
        if terms.context_weight:
            total += terms.context_factor(step) * means["context"]
            metrics["train/context_term"] = means["context"]
        if terms.prediction_variance_weight:
            term = losses.prediction_variance(predictions)
            total += terms.prediction_variance_weight * term
            metrics["train/prediction_variance_term"] = term
        if is_regularised:
            total += terms.variance_weight * means["variance"]
            total += terms.covariance_weight * means["covariance"]
            metrics["train/variance_term"] = means["variance"]
            metrics["train/covariance_term"] = means["covariance"]
        of_target = _statistics(features, target_levels)
        of_encoder = _statistics(context, encoder.num_levels)
        of_prediction = _statistics(prediction, target_levels)
        metrics |= {
            "train/loss": means["regression"],
            "train/total_loss": total,
            "repr/target_std": of_target["std"],
            "repr/target_effective_rank": of_target["effective_rank"],
            "repr/target_cosine": of_target["cosine"],
            # These three describe the last mask type.
            "repr/context_std": of_encoder["std"],
            "repr/context_effective_rank": of_encoder["effective_rank"],
            "repr/predictor_std_ratio": of_prediction["std"] / of_target["std"],
        }
        return total, metrics


def _statistics(features: jax.Array, num_levels: int) -> dict[str, jax.Array]:
    # One level is enough for values that are only logged: covariances are summed over
    # devices, and for all levels of a ViT-G they are a tenth as large as its gradients.
    level = losses.deepest_level(features, num_levels)
    return losses.collapse_statistics(level)
