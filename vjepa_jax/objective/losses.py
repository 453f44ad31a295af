"""The V-JEPA regression loss, regularisers, and statistics that reveal collapse."""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

Grid = tuple[int, int, int]


def normalise_target(h: jax.Array, num_levels: int = 1) -> jax.Array:
    """Layer-normalise features over channels in fp32, without parameters.

    The official code does this with the target encoder's output (`app/vjepa/train.py`),
    V-JEPA 2.1 with each of its levels.

    Args:
      h: [..., D].
      num_levels: number of equal parts of the channels that are normalised separately.

    Returns:
      float32 [..., D].
    """
    levels = h.astype(jnp.float32).reshape(*h.shape[:-1], num_levels, -1)
    mean = levels.mean(-1, keepdims=True)
    variance = jnp.square(levels - mean).mean(-1, keepdims=True)
    return ((levels - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(h.shape)


def deepest_level(h: jax.Array, num_levels: int) -> jax.Array:
    """Return the last of the levels that are concatenated in h: [..., D / levels]."""
    return h.reshape(*h.shape[:-1], num_levels, -1)[..., -1, :]


def regression(
    prediction: jax.Array,
    target: jax.Array,
    exponent: float = 1.0,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Return the mean of |prediction - target|^p / p in fp32 (V-JEPA eq. 2; p = 1).

    Args:
      prediction: [B, M, D].
      target: [B, M, D], normalised.
      exponent: p.
      weights: [B, M], a factor per token; the mean is not divided by their sum.

    Returns:
      float32 scalar.
    """
    chex.assert_rank(prediction, 3)
    chex.assert_equal_shape([prediction, target])
    error = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if exponent != 1.0:
        error = error**exponent / exponent
    if weights is not None:
        chex.assert_shape(weights, prediction.shape[:2])
        error = error * weights[..., None]
    return error.mean()


def distance_to_targets(
    ctx_idx: jax.Array, tgt_idx: jax.Array, grid: Grid
) -> jax.Array:
    """Return the distance of each visible token to the nearest predicted token.

    V-JEPA 2.1 divides the loss on visible tokens by its square root, so that tokens
    next to the mask count most.

    Args:
      ctx_idx: int [B, K], token indices; none of them is in `tgt_idx`.
      tgt_idx: int [B, M], token indices.
      grid: (T, H, W).

    Returns:
      float32 [B, K], Euclidean, in tokens.
    """
    chex.assert_rank([ctx_idx, tgt_idx], 2)
    chex.assert_type([ctx_idx, tgt_idx], int)
    chex.assert_equal_shape_prefix([ctx_idx, tgt_idx], 1)
    _, height, width = grid

    def coordinates(idx):
        parts = (idx // (height * width), idx // width % height, idx % width)
        return jnp.stack(parts, axis=-1).astype(jnp.float32)

    between = coordinates(ctx_idx)[:, :, None] - coordinates(tgt_idx)[:, None]
    return jnp.sqrt(jnp.square(between).sum(-1).min(-1))


def prediction_variance(predictions: Sequence[jax.Array]) -> jax.Array:
    """Return V-JEPA 1's regulariser of predictions (its weight is 0 in every recipe).

    It is the mean over samples and channels of relu(1 - std), where std is taken over a
    sample's predicted tokens and averaged over mask types.

    Args:
      predictions: one array [B, M, D] per mask type.

    Returns:
      float32 scalar.
    """
    chex.assert_rank(predictions, 3)
    deviations = [
        jnp.sqrt(z.astype(jnp.float32).var(axis=1, ddof=1) + 1e-4) for z in predictions
    ]
    return jax.nn.relu(1 - sum(deviations) / len(deviations)).mean()


@jax.named_scope("statistics")
def variance_covariance(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return VICReg's variance and covariance terms of tokens (arXiv 2105.04906, §4.1).

    Args:
      z: [..., D]; all leading axes are samples.

    Returns:
      The mean over channels of relu(1 - sqrt(Var + 1e-4)), which penalises a standard
      deviation below 1, and the sum of squared off-diagonal covariances divided by D.
      Both are float32 scalars.
    """
    z = z.astype(jnp.float32).reshape(-1, z.shape[-1])
    z = z - z.mean(0)
    covariance = z.T @ z / (z.shape[0] - 1)
    variance = jnp.diagonal(covariance)
    # 1e-4, as in VICReg, keeps the gradient finite at zero variance.
    hinge = jax.nn.relu(1.0 - jnp.sqrt(variance + 1e-4)).mean()
    off_diagonal = jnp.square(covariance).sum() - jnp.square(variance).sum()
    return hinge, off_diagonal / z.shape[-1]


@jax.named_scope("statistics")
def collapse_statistics(h: jax.Array, max_tokens: int = 4096) -> dict[str, jax.Array]:
    """Return the spread of features: all three statistics reveal a collapsed encoder.

    Args:
      h: [B, N, D] features.
      max_tokens: use at most this many tokens, but at least one per clip: evenly spaced
        within a clip, and shifted by one from clip to clip.

    Returns:
      float32 scalars by name:
      `std`: mean over channels of the standard deviation over tokens;
      `effective_rank`: participation ratio (tr C)^2 / tr(C^2) of the covariance, 1..D;
      `cosine`: mean cosine similarity of a token to the mean token.
    """
    chex.assert_rank(h, 3)
    batch, num_tokens, width = h.shape
    per_clip = max(max_tokens // batch, 1)
    if per_clip < num_tokens:
        # Chosen within each clip: a stride over all tokens of the batch would move some
        # of them between devices.
        idx = jnp.arange(batch)[:, None] + jnp.arange(per_clip) * (
            num_tokens // per_clip
        )
        h = jnp.take_along_axis(h, idx[..., None] % num_tokens, axis=1)
    h = h.astype(jnp.float32).reshape(-1, width)
    mean = h.mean(0)
    centred = h - mean
    covariance = centred.T @ centred / h.shape[0]
    trace = jnp.trace(covariance)
    spectrum = covariance / jnp.maximum(trace, 1e-30)
    rank = jnp.where(trace > 0, 1 / jnp.square(spectrum).sum(), 1.0)
    norms = jnp.linalg.norm(h, axis=-1) * jnp.linalg.norm(mean)
    return {
        "std": jnp.sqrt(jnp.diagonal(covariance)).mean(),
        "effective_rank": rank,
        "cosine": ((h @ mean) / jnp.maximum(norms, 1e-12)).mean(),
    }
