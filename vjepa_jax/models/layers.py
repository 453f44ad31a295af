"""Layers shared by encoder and predictors: tubelet embedding, block, stack of blocks.

Parameters carry logical axis names (`embed`, `mlp`, `heads`, `layers`, ...), which
`parallel.sharding` maps to the mesh. Activations are constrained at block boundaries.
"""

import dataclasses
from typing import Any, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.choices import POS_EMBEDS
from vjepa_jax.models import functional, positions
from vjepa_jax.models.attention.dispatch import OUTPUT_NAME, attention

NORM_EPS = 1e-6
ACT_AXES = ("act_batch", "act_len", "act_embed")


def _is_cudnn_attention(primitive, *_, **__) -> bool:
    # Matched by the primitive, since its log-normaliser is a residual without a name.
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _with_attention(policy=None):
    """Also store attention's residuals, so that its kernel does not run twice."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(OUTPUT_NAME)
    either = policies.save_from_both_policies(named, _is_cudnn_attention)
    return policies.save_from_both_policies(either, policy) if policy else either


# What is stored for the backward pass; the rest is recomputed. With `xla` attention,
# `dots` stores the scores.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _with_attention(),
    "dots": _with_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _with_attention(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}

# The official code truncates at +-2. At 100 standard deviations this has no effect.
_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Fields of a transformer: its shape, and how it is computed.

    Parameters, and so checkpoints, do not depend on `scan_layers`, `remat`, `attention`
    and the dtypes.

    Attributes:
      depth: number of blocks.
      width: channels of the tokens.
      num_heads: attention heads; divides `width`.
      mlp_dim: hidden channels of the MLP.
      mlp: `gelu` (exact) is fc2(gelu(fc1)); `swiglu` is fc3(silu(fc1) * fc2).
      scale_init: initialise output projections smaller by sqrt(2 * layer), as V-JEPA 2
        does; V-JEPA 1 does not.
      norm_eps: epsilon of the layer norms.
      scan_layers: compile one block and loop over it; False unrolls the loop.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      attention: implementation, see `attention.dispatch.attention`.
      dtype: dtype of the computation; parameters are float32.
      matmul_dtype: 8-bit dtype of the matmul operands, which has no gradient; "":
        `dtype`.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    mlp: str = "gelu"
    scale_init: bool = True
    norm_eps: float = NORM_EPS
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32
    matmul_dtype: str = ""

    @classmethod
    def of(cls, module: nn.Module) -> "TransformerConfig":
        """Take the values of the module's fields that have the same names."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{n: getattr(module, n) for n in names if hasattr(module, n)})


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> jax.Array:
    """Return a float32 parameter of a module, with logical axes."""
    init = nn.with_logical_partitioning(init, axes)
    return cast(jax.Array, module.param(name, init, shape, jnp.float32))


class Dense(nn.Module):
    """Dense layer: [..., in] -> [..., features].

    Attributes:
      features: channels of the output.
      axes: logical axes of the kernel.
      dtype: dtype of the computation; parameters are float32.
      kernel_init: initialiser of the kernel.
      matmul_dtype: see `TransformerConfig`.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer = _normal
    matmul_dtype: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., in] to [..., features]."""
        shape = x.shape[-1], self.features
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape)
        zeros = nn.initializers.zeros
        bias = parameter(self, "bias", zeros, self.axes[-1:], shape[-1:])
        if self.matmul_dtype:
            args = self.dtype, self.matmul_dtype
            return functional.quantised_dense(x, kernel, bias, *args)
        return functional.dense(x, kernel, bias, self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over channels: statistics in float32, output in `dtype`."""

    dtype: jnp.dtype
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., D]."""
        shape = x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, ("norm",), shape)
        bias = parameter(self, "bias", nn.initializers.zeros, ("norm",), shape)
        return functional.layer_norm(x, scale, bias, self.eps, self.dtype)


def position_code(
    kind: str,
    idx: jax.Array,
    grid: positions.Grid,
    width: int,
    num_heads: int,
    base_grid: positions.Grid | None,
) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array] | None]:
    """Return the position embedding of tokens, to add or to rotate by.

    Args:
      kind: `sincos` is added to the tokens (V-JEPA); `rope` rotates queries and keys
        (V-JEPA 2.1); `rope_tiled` is V-JEPA 2's released form of the rotation.
      idx: int [B, N] or [1, N], token indices.
      grid: (T, H, W) of the clip.
      width, num_heads: of the transformer.
      base_grid: see `positions.sincos_table` and `positions.rope_tables`.

    Returns:
      The embedding to add, float32 [B, N, width], and the (cos, sin) tables to rotate
      by. One of the two is None, depending on the kind.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind == "sincos":
        return jnp.asarray(positions.sincos_table(grid, width, base_grid))[idx], None
    if kind in ("rope", "rope_tiled"):
        tiled = kind == "rope_tiled"
        head_dim = width // num_heads
        return None, positions.rope_tables(idx, grid, head_dim, tiled, base_grid)
    raise ValueError(f"pos_embed '{kind}' is unknown; known: {', '.join(POS_EMBEDS)}")


def modality(module: nn.Module, width: int, is_image: bool) -> jax.Array:
    """Return the embedding [width] that is added to all tokens of an image or a video.

    Call it in a compact method of `module`, which owns the parameter.
    """
    init = nn.initializers.normal(1e-6)
    table = parameter(module, "modality", init, (None, "embed"), (2, width))
    return table[0 if is_image else 1]


def tubelets(video: jax.Array, patch_size: int, tubelet_size: int) -> jax.Array:
    """Cut clips [B, T, H, W, C] into tubelets [B, N, tubelet_size * p * p * C].

    Tokens are in (t, h, w) order, and so are the pixels of each token.
    """
    b, t, h, w, c = video.shape
    dt, p = tubelet_size, patch_size
    x = video.reshape(b, t // dt, dt, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, dt * p * p * c)


class TubeletEmbed(nn.Module):
    """Cut a clip into tubelets and project each: [B, T, H, W, C] -> [B, N, width].

    Equal to a strided 3-D convolution, but written as one matmul over the flattened
    tubelets, which is faster. With `idx`, int [B, K], only the tokens of these indices
    are projected: [B, K, width].
    """

    width: int
    patch_size: int
    tubelet_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array, idx: jax.Array | None = None) -> jax.Array:
        x = tubelets(video, self.patch_size, self.tubelet_size)
        # Pixels take no gradient, so gathering here costs nothing in the backward pass.
        if idx is not None:
            x = take_tokens(x, idx)
        proj = Dense(self.width, ("patch", "embed"), self.dtype, name="proj")
        return proj(x.astype(self.dtype))


def take_tokens(x: jax.Array, idx: jax.Array) -> jax.Array:
    """Gather tokens: x [B, N, D], idx int [B, K] -> [B, K, D]."""
    return jnp.take_along_axis(x, idx[..., None], axis=1, mode="promise_in_bounds")


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        tables: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Map x [B, N, D] to [B, N, D].

        Args:
          x: tokens.
          layer: number of the block, counted from 1.
          tables, mask: see `Stack`.
        """
        c = self.config

        def scaled(key, shape, dtype):
            by = jnp.sqrt(2.0 * layer) if c.scale_init else 1.0
            return (_normal(key, shape, dtype) / by).astype(dtype)

        def dense(features, axes, name, init=_normal):
            return Dense(features, axes, c.dtype, init, c.matmul_dtype, name=name)

        b, n, _ = x.shape
        y = LayerNorm(c.dtype, c.norm_eps, name="norm1")(x)
        qkv = dense(3 * c.width, ("embed", "heads"), "qkv")(y)
        q, k, v = (
            part.reshape(b, n, c.num_heads, -1) for part in jnp.split(qkv, 3, axis=-1)
        )
        if tables is not None:
            q = positions.rotate(q, tables)
            k = positions.rotate(k, tables)
        y = attention(q, k, v, c.attention, mask).reshape(b, n, c.width)
        x = x + dense(c.width, ("heads", "embed"), "proj", scaled)(y)
        y = LayerNorm(c.dtype, c.norm_eps, name="norm2")(x)
        hidden = dense(c.mlp_dim, ("embed", "mlp"), "fc1")(y)
        if c.mlp == "gelu":
            hidden, last = functional.gelu(hidden), "fc2"
        else:
            gate = dense(c.mlp_dim, ("embed", "mlp"), "fc2")(y)
            hidden, last = nn.silu(hidden) * gate, "fc3"
        out = dense(c.width, ("mlp", "embed"), last, scaled)
        return nn.with_logical_constraint(x + out(hidden), ACT_AXES)


class _Layer(nn.Module):
    """One step of the scan over blocks; it also stores the requested outputs."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        block: Any = Block
        if c.remat != "none":
            policy = REMAT_POLICIES[c.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=not c.scan_layers)
        self.block = block(c)
        # The names of the parameters do not show this wrapper.
        nn.share_scope(self, self.block)

    def __call__(self, carry, layer, slot, tables, mask):
        x, kept = carry
        x = self.block(x, layer, tables, mask)
        if kept is not None:
            # Layers that are not requested have a slot beyond the end: it is dropped.
            kept = kept.at[slot].set(x, mode="drop")
        return (x, kept), None


class Stack(nn.Module):
    """A stack of blocks whose parameters carry a leading `layers` axis."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tables: tuple[jax.Array, jax.Array] | None = None,
        mask: jax.Array | None = None,
        out_layers: tuple[int, ...] = (),
    ) -> tuple[jax.Array, jax.Array | None]:
        """Run the blocks.

        Args:
          x: [B, N, D].
          tables: cos and sin by which queries and keys are rotated; None: no rotation.
          mask: bool [N, N], which keys (last axis) a query may attend to; None: all.
          out_layers: blocks, counted from 0, whose outputs are also returned.

        Returns:
          The last block's output [B, N, D], and the outputs of `out_layers`
          [len(out_layers), B, N, D] or None. They are not normalised.
        """
        c = self.config
        chex.assert_shape(x, (None, None, c.width))
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=c.depth,
            unroll=1 if c.scan_layers else c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="blocks")
        x = nn.with_logical_constraint(x, ACT_AXES)
        kept, slots = None, np.full(c.depth, len(out_layers), np.int32)
        if out_layers:
            kept = jnp.zeros((len(out_layers), *x.shape), x.dtype)
            slots[list(out_layers)] = np.arange(len(out_layers))
        (x, kept), _ = layers(
            (x, kept), jnp.arange(1, c.depth + 1), jnp.asarray(slots), tables, mask
        )
        return x, kept
