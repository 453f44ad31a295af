"""Sizes by name, and encoders and predictors made from explicit fields."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Size:
    """Transformer size: blocks, channels, heads, hidden channels of the MLP."""

    depth: int
    width: int
    num_heads: int
    mlp_dim: int


# tiny to gigantic as in the official code (V-JEPA 2's `vit_*_xformers` for giant, 2.1's
# corrected MLP for gigantic); nano is for the synthetic world on a CPU.
SIZES = {
    "nano": Size(4, 96, 3, 384),
    "tiny": Size(12, 192, 3, 768),
    "small": Size(12, 384, 6, 1536),
    "base": Size(12, 768, 12, 3072),
    "large": Size(24, 1024, 16, 4096),
    "huge": Size(32, 1280, 16, 5120),
    "giant": Size(40, 1408, 22, 6144),
    "gigantic": Size(48, 1664, 26, 8192),
}


def make_encoder(size: str, dtype: str = "float32", **fields: Any) -> VideoEncoder:
    """Make the encoder of a named size; `fields` are `VideoEncoder`'s.

    Raises:
      ValueError: the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"model size '{size}' is unknown; known: {', '.join(SIZES)}")
    sizes = dataclasses.asdict(SIZES[size])
    return VideoEncoder(**sizes, dtype=jnp.dtype(dtype), **fields)


def make_predictor(dtype: str = "float32", **fields: Any) -> Predictor:
    """Make a predictor from its own fields; its MLP is four times its width."""
    return Predictor(**fields, mlp_dim=4 * fields["width"], dtype=jnp.dtype(dtype))
