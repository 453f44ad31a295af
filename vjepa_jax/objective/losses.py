"""The V-JEPA objective, regularisers against collapse, and statistics that show it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Grid = tuple[int, int, int]


def normalise_target(h: jax.Array, num_levels: int = 1, eps: float = 1e-5) -> jax.Array:
    """Layer-normalise without parameters over channels, in fp32: [..., D] -> [..., D].

    The official code does so with the target encoder's output (`app/vjepa/train.py`);
    V-JEPA 2.1 with each of its levels, which lie side by side in the channels.
    """
    levels = h.astype(jnp.float32).reshape(*h.shape[:-1], num_levels, -1)
    mean = levels.mean(-1, keepdims=True)
    variance = jnp.square(levels - mean).mean(-1, keepdims=True)
    return ((levels - mean) * jax.lax.rsqrt(variance + eps)).reshape(h.shape)


def deepest_level(h: jax.Array, num_levels: int) -> jax.Array:
    """Return the last of the levels side by side in the channels, [..., D / levels]."""
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
    """
    error = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    if exponent != 1.0:
        error = error**exponent / exponent
    if weights is not None:
        error = error * weights[..., None]
    return error.mean()


def distance_to_targets(
    ctx_idx: jax.Array, tgt_idx: jax.Array, grid: Grid
) -> jax.Array:
    """Return how far each visible token is from the nearest predicted one.

    V-JEPA 2.1 divides the loss on visible tokens by the root of it, so that what lies
    beside a hole counts most.

    Args:
      ctx_idx: int [B, K], token numbers; none of them in `tgt_idx`.
      tgt_idx: int [B, M].
      grid: (T, H, W).

    Returns:
      float32 [B, K], Euclidean, in tokens.
    """
    _, height, width = grid

    def place(idx):
        parts = (idx // (height * width), idx // width % height, idx % width)
        return jnp.stack(parts, axis=-1).astype(jnp.float32)

    between = place(ctx_idx)[:, :, None] - place(tgt_idx)[:, None]
    return jnp.sqrt(jnp.square(between).sum(-1).min(-1))


def prediction_variance(predictions: Sequence[jax.Array]) -> jax.Array:
    """Return V-JEPA 1's regulariser of predictions (its weight is 0 in every recipe).

    The mean over samples and channels of relu(1 - std), where std is taken over a
    sample's predicted tokens and averaged over mask types.

    Args:
      predictions: [B, M, D] per mask type.
    """
    deviations = [
        jnp.sqrt(z.astype(jnp.float32).var(axis=1, ddof=1) + 1e-4) for z in predictions
    ]
    return jax.nn.relu(1 - sum(deviations) / len(deviations)).mean()


@jax.named_scope("statistics")
def variance_covariance(
    z: jax.Array, std: float = 1.0, eps: float = 1e-4
) -> tuple[jax.Array, jax.Array]:
    """Return VICReg's variance and covariance terms of tokens (arXiv 2105.04906, §4.1).

    Args:
      z: [..., D]; all leading axes are samples.
      std: the standard deviation below which a channel is punished.
      eps: added to the variance for a finite gradient.

    Returns:
      Mean over channels of relu(std - sqrt(Var + eps)); sum of squared off-diagonal
      covariances divided by D. Both fp32 scalars.
    """
    z = z.astype(jnp.float32).reshape(-1, z.shape[-1])
    z = z - z.mean(0)
    covariance = z.T @ z / (z.shape[0] - 1)
    variance = jnp.diagonal(covariance)
    hinge = jax.nn.relu(std - jnp.sqrt(variance + eps)).mean()
    off_diagonal = jnp.square(covariance).sum() - jnp.square(variance).sum()
    return hinge, off_diagonal / z.shape[-1]


@jax.named_scope("statistics")
def collapse_statistics(h: jax.Array, max_tokens: int = 4096) -> dict[str, jax.Array]:
    """Describe the spread of features: a collapsed encoder shows in all three numbers.

    Args:
      h: [B, N, D] features.
      max_tokens: at most so many tokens (but one of each clip) enter the statistics,
        evenly spaced in a clip and at other positions in the next.

    Returns:
      `std`: mean over channels of the standard deviation over tokens;
      `effective_rank`: participation ratio (tr C)^2 / tr(C^2) of the covariance, 1..D;
      `cosine`: mean cosine similarity of a token to the mean token.
    """
    batch, num_tokens, width = h.shape
    per_clip = max(max_tokens // batch, 1)
    if per_clip < num_tokens:
        # Chosen within each clip: a stride over all tokens would move some of them from
        # device to device.
        places = jnp.arange(batch)[:, None] + jnp.arange(per_clip) * (
            num_tokens // per_clip
        )
        h = jnp.take_along_axis(h, places[..., None] % num_tokens, axis=1)
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
