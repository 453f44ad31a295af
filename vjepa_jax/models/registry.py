"""Model sizes by name; factories of encoders and predictors."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from vjepa_jax.base.choices import MLPS
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import ActionPredictor, Predictor


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of a transformer, see `layers.TransformerConfig`."""

    depth: int
    width: int
    num_heads: int
    mlp_dim: int


# tiny to gigantic are the official sizes (giant as V-JEPA 2's `vit_*_xformers`,
# gigantic with V-JEPA 2.1's corrected MLP); nano is for the synthetic world on a CPU.
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


def size_of(name: str) -> Size:
    """Return the size of a name in `SIZES` or of the form `12x768x12x3072`.

    Raises:
      ValueError: the name is unknown, or the heads do not divide the width.
    """
    if name in SIZES:
        return SIZES[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", name):
        raise ValueError(
            f"model size '{name}' is unknown; known: {', '.join(SIZES)}, or "
            "DEPTHxWIDTHxHEADSxMLP, e.g. 12x768x12x3072"
        )
    size = Size(*(int(n) for n in name.split("x")))
    if size.width % size.num_heads:
        raise ValueError(
            f"model size '{name}': {size.num_heads} heads do not divide {size.width}"
        )
    return size


def name_of(size: Size) -> str:
    """Return the name from which `size_of` returns this size."""
    named = [name for name, known in SIZES.items() if known == size]
    return named[0] if named else "x".join(map(str, dataclasses.astuple(size)))


def mlp_fields(mlp: str, hidden: int) -> dict[str, Any]:
    """Return the fields `mlp` and `mlp_dim` of a named MLP.

    `swiglu_wide` is the official `wide_silu`: two thirds of the hidden channels,
    rounded up to a multiple of 8, so that its three matrices have as many parameters as
    the two of `gelu`.

    Raises:
      ValueError: the name is unknown.
    """
    if mlp not in MLPS:
        raise ValueError(f"mlp '{mlp}' is unknown; known: {', '.join(MLPS)}")
    if mlp == "swiglu_wide":
        hidden = -(-int(2 * hidden / 3) // 8) * 8
    return {"mlp": mlp.removesuffix("_wide"), "mlp_dim": hidden}


def make_encoder(
    size: str | Size, dtype: str = "float32", mlp: str = "gelu", **fields: Any
) -> VideoEncoder:
    """Make the encoder of a size, see `size_of`; `fields` are `VideoEncoder`'s.

    Raises:
      ValueError: the size or the MLP is unknown.
    """
    if isinstance(size, str):
        size = size_of(size)
    return VideoEncoder(
        depth=size.depth,
        width=size.width,
        num_heads=size.num_heads,
        **mlp_fields(mlp, size.mlp_dim),
        dtype=jnp.dtype(dtype),
        **fields,
    )


def make_predictor(
    dtype: str = "float32", mlp: str = "gelu", mlp_ratio: float = 4.0, **fields: Any
) -> Predictor:
    """Make a predictor from its own fields; its MLP is `mlp_ratio` times its width."""
    hidden = mlp_fields(mlp, int(mlp_ratio * fields["width"]))
    return Predictor(**fields, **hidden, dtype=jnp.dtype(dtype))


def make_action_predictor(
    dtype: str = "float32", mlp: str = "gelu", **fields: Any
) -> ActionPredictor:
    """Make an action-conditioned predictor; its MLP is four times its width."""
    hidden = mlp_fields(mlp, 4 * fields["width"])
    return ActionPredictor(**fields, **hidden, dtype=jnp.dtype(dtype))
