"""Building blocks shared by encoder and predictor: tubelet embedding, block, stack.

Parameters carry logical axis names (`embed`, `mlp`, `heads`, `layers`, ...), which
`sharding.py` maps to the mesh; activations are constrained at block boundaries.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import attention
from vjepa_jax.models.positions import rotate

NORM_EPS = 1e-6
ACT_AXES = ("act_batch", "act_len", "act_embed")

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Official init: normal with sigma 0.02 truncated at +-2 absolute, which never cuts.
_normal = nn.initializers.normal(0.02)


def _dense(features, axes, dtype, name, init=_normal, use_bias=True):
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[-1:]),
        name=name,
    )


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """Make a layer norm over channels; statistics are fp32, the output is `dtype`."""
    return nn.LayerNorm(
        epsilon=NORM_EPS,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


def linear(features: int, axes: tuple[str, str], dtype: jnp.dtype, name: str):
    """Make a dense layer [..., in] -> [..., features], its kernel of logical `axes`."""
    return _dense(features, axes, dtype, name)


class TubeletEmbed(nn.Module):
    """Cut a clip into tubelets and project each: [B, T, H, W, C] -> [B, N, width].

    Equal to a strided 3-D convolution, written as one matmul over the flattened tubelet
    because that is what the hardware multiplies fastest. Tokens are in (t, h, w) order.
    """

    width: int
    patch_size: int
    tubelet_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array) -> jax.Array:
        b, t, h, w, c = video.shape
        dt, p = self.tubelet_size, self.patch_size
        x = video.reshape(b, t // dt, dt, h // p, p, w // p, p, c)
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, dt * p * p * c)
        proj = _dense(self.width, ("patch", "embed"), self.dtype, "proj")
        return proj(x.astype(self.dtype))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP with exact GELU.

    Output projections are initialised smaller by sqrt(2 * layer), as V-JEPA 2 does.
    """

    width: int
    num_heads: int
    mlp_dim: int
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, tables):
        """Map x [B, N, D]; `layer` counts from 1; `tables` rotate, or None."""

        def scaled(key, shape, dtype):
            return _normal(key, shape, dtype) / jnp.sqrt(2.0 * layer).astype(dtype)

        y = layer_norm(self.dtype, "norm1")(x)
        qkv = _dense(3 * self.width, ("embed", "heads"), self.dtype, "qkv")(y)
        b, n, _ = x.shape
        qkv = qkv.reshape(b, n, 3, self.num_heads, self.width // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        y = attention(q, k, v, self.attention).reshape(b, n, self.width)
        x = x + _dense(self.width, ("heads", "embed"), self.dtype, "proj", scaled)(y)
        y = layer_norm(self.dtype, "norm2")(x)
        y = _dense(self.mlp_dim, ("embed", "mlp"), self.dtype, "fc1")(y)
        y = nn.gelu(y, approximate=False)
        x = x + _dense(self.width, ("mlp", "embed"), self.dtype, "fc2", scaled)(y)
        return nn.with_logical_constraint(x, ACT_AXES), None


class Stack(nn.Module):
    """A stack of blocks whose parameters carry a leading `layers` axis.

    `scan_layers` compiles one block and loops over it; otherwise the loop is unrolled.
    The parameters are the same either way, hence so are the checkpoints.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, tables=None) -> jax.Array:
        """Map x [B, N, D] to the last block's output, not normalised."""
        block: Callable = Block
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan_layers)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan_layers else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            self.width,
            self.num_heads,
            self.mlp_dim,
            self.attention,
            self.dtype,
            name="blocks",
        )
        x = nn.with_logical_constraint(x, ACT_AXES)
        x, _ = layers(x, jnp.arange(1, self.depth + 1), tables)
        return x
