"""Building blocks shared by encoder and predictor: tubelet embedding, block, stack.

Parameters carry logical axis names (`embed`, `mlp`, `heads`, `layers`, ...), which
`sharding.py` maps to the mesh; activations are constrained at block boundaries.
"""

from collections.abc import Callable

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
    # Its log of the normaliser is a residual without a name.
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _with_attention(policy=None):
    """Also store what attention gives to its backward pass: no kernel runs twice."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(OUTPUT_NAME)
    either = policies.save_from_both_policies(named, _is_cudnn_attention)
    return policies.save_from_both_policies(either, policy) if policy else either


# What the backward pass need not recompute. With `xla` attention `dots` stores scores.
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _with_attention(),
    "dots": _with_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _with_attention(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}

# Official init: normal with sigma 0.02 truncated at +-2 absolute, which never cuts.
_normal = nn.initializers.normal(0.02)


class Dense(nn.Module):
    """Dense layer: [..., in] -> [..., features].

    Attributes:
      features: channels of the output.
      axes: logical axes of the kernel.
      dtype: of the computation; parameters are float32.
      init: of the kernel.
      matmul_dtype: 8-bit type of the operands, without a gradient; "": `dtype`.
    """

    features: int
    axes: tuple[str, str]
    dtype: jnp.dtype
    init: nn.initializers.Initializer = _normal
    matmul_dtype: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., in] to [..., features]."""
        init = nn.with_logical_partitioning(self.init, self.axes)
        shape = x.shape[-1], self.features
        kernel = self.param("kernel", init, shape, jnp.float32)
        init = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[-1:])
        bias = self.param("bias", init, (self.features,))
        if self.matmul_dtype:
            args = self.dtype, self.matmul_dtype
            return functional.quantised_dense(x, kernel, bias, *args)
        return functional.dense(x, kernel, bias, self.dtype)


class LayerNorm(nn.Module):
    """Layer norm over channels; statistics are fp32, the output is `dtype`."""

    dtype: jnp.dtype
    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., D] to [..., D]."""

        def param(name, init):
            init = nn.with_logical_partitioning(init, ("norm",))
            return self.param(name, init, x.shape[-1:])

        scale = param("scale", nn.initializers.ones)
        bias = param("bias", nn.initializers.zeros)
        return functional.layer_norm(x, scale, bias, self.eps, self.dtype)


def position_code(
    kind: str,
    idx: jax.Array,
    grid: positions.Grid,
    width: int,
    num_heads: int,
    base_grid: positions.Grid | None,
):
    """Return what carries the position of tokens into a transformer.

    Args:
      kind: `sincos` is added to the tokens (V-JEPA); `rope` rotates queries and keys
        (V-JEPA 2.1), `rope_tiled` does in V-JEPA 2's released form.
      idx: int [B, N] or [1, N], token numbers.
      grid: (T, H, W) of the clip.
      width, num_heads: of the transformer.
      base_grid: see `positions.sincos_table` and `positions.rope_tables`.

    Returns:
      What to add, float32 [B, N, width], and (cos, sin) to rotate by; None each where
      the kind has no use for it.

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
    """Return [width], what is added to every token of an image or of a video.

    Its parameter belongs to `module`, whose compact method calls this.
    """
    table = module.param(
        "modality",
        nn.with_logical_partitioning(nn.initializers.normal(1e-6), (None, "embed")),
        (2, width),
    )
    return table[0 if is_image else 1]


def tubelets(video: jax.Array, patch_size: int, tubelet_size: int) -> jax.Array:
    """Cut clips [B, T, H, W, C] into tokens of pixels [B, N, tubelet_size * p * p * C].

    Tokens are in (t, h, w) order, and so are the pixels of each.
    """
    b, t, h, w, c = video.shape
    dt, p = tubelet_size, patch_size
    x = video.reshape(b, t // dt, dt, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, dt * p * p * c)


class TubeletEmbed(nn.Module):
    """Cut a clip into tubelets and project each: [B, T, H, W, C] -> [B, N, width].

    Equal to a strided 3-D convolution, written as one matmul over the flattened tubelet
    because that is what the hardware multiplies fastest. Tokens are in (t, h, w) order;
    of given numbers `idx`, int [B, K], only those are projected: [B, K, width].
    """

    width: int
    patch_size: int
    tubelet_size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array, idx: jax.Array | None = None) -> jax.Array:
        x = tubelets(video, self.patch_size, self.tubelet_size)
        # Pixels take no gradient, so that gathering here costs nothing backward.
        if idx is not None:
            x = take_tokens(x, idx)
        proj = Dense(self.width, ("patch", "embed"), self.dtype, name="proj")
        return proj(x.astype(self.dtype))


def take_tokens(x: jax.Array, idx: jax.Array) -> jax.Array:
    """Gather tokens: x [B, N, D], idx int [B, K] -> [B, K, D]."""
    return jnp.take_along_axis(x, idx[..., None], axis=1, mode="promise_in_bounds")


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP.

    Output projections are initialised smaller by sqrt(2 * layer), as V-JEPA 2 does.

    Attributes:
      mlp: `gelu` (exact) is fc2(gelu(fc1)); `swiglu` is fc3(silu(fc1) * fc2).
      scale_init: whether output projections start smaller; V-JEPA 1's do not.
      norm_eps: of the layer norms.
      matmul_dtype: see `Dense`.
    """

    width: int
    num_heads: int
    mlp_dim: int
    mlp: str = "gelu"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32
    scale_init: bool = True
    norm_eps: float = NORM_EPS
    matmul_dtype: str = ""

    @nn.compact
    def __call__(self, x: jax.Array, layer: jax.Array, tables, mask=None):
        """Map x [B, N, D]; `layer` counts from 1; `tables` rotate, or None."""

        def scaled(key, shape, dtype):
            by = jnp.sqrt(2.0 * layer) if self.scale_init else 1.0
            return (_normal(key, shape, dtype) / by).astype(dtype)

        def dense(features, axes, name, init=_normal):
            kind = self.matmul_dtype
            return Dense(features, axes, self.dtype, init, kind, name=name)

        b, n, _ = x.shape
        y = LayerNorm(self.dtype, self.norm_eps, name="norm1")(x)
        qkv = dense(3 * self.width, ("embed", "heads"), "qkv")(y)
        q, k, v = (
            part.reshape(b, n, self.num_heads, -1)
            for part in jnp.split(qkv, 3, axis=-1)
        )
        if tables is not None:
            q = positions.rotate(q, tables)
            k = positions.rotate(k, tables)
        y = attention(q, k, v, self.attention, mask).reshape(b, n, self.width)
        x = x + dense(self.width, ("heads", "embed"), "proj", scaled)(y)
        y = LayerNorm(self.dtype, self.norm_eps, name="norm2")(x)
        hidden = dense(self.mlp_dim, ("embed", "mlp"), "fc1")(y)
        if self.mlp == "gelu":
            hidden, last = functional.gelu(hidden), "fc2"
        else:
            gate = dense(self.mlp_dim, ("embed", "mlp"), "fc2")(y)
            hidden, last = nn.silu(hidden) * gate, "fc3"
        out = dense(self.width, ("mlp", "embed"), last, scaled)
        return nn.with_logical_constraint(x + out(hidden), ACT_AXES)


class _Layer(nn.Module):
    """A block as one step of a scan, which also stores the outputs asked for."""

    make_block: Callable[[], nn.Module]

    def setup(self):
        self.block = self.make_block()
        nn.share_scope(self, self.block)  # parameters do not show the wrapper

    def __call__(self, carry, layer, slot, tables, mask):
        x, kept = carry
        x = self.block(x, layer, tables, mask)
        if kept is not None:
            # Most layers store nothing: a slot beyond the end is dropped.
            kept = kept.at[slot].set(x, mode="drop")
        return (x, kept), None


class Stack(nn.Module):
    """A stack of blocks whose parameters carry a leading `layers` axis.

    `scan_layers` compiles one block and loops over it; otherwise the loop is unrolled.
    The parameters are the same either way, hence so are the checkpoints.

    Attributes:
      depth, width, num_heads, mlp_dim, mlp, scale_init: see `Block`.
      scan_layers: loop, or unroll.
      remat: what the backward pass recomputes, a key of `REMAT_POLICIES`.
      attention: see `attention.attention`.
      dtype: of the computation.
      norm_eps, matmul_dtype: see `Block`.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    mlp: str = "gelu"
    scale_init: bool = True
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32
    norm_eps: float = NORM_EPS
    matmul_dtype: str = ""

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
          tables: cos and sin by which queries and keys are rotated.
          mask: bool [N, N], where a token may attend; None: everywhere.
          out_layers: blocks, counted from 0, whose outputs are wanted.

        Returns:
          The last block's output [B, N, D] and those of `out_layers`
          [len(out_layers), B, N, D] or None; none is normalised.
        """
        block: Callable = Block
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan_layers)

        def make_block():
            return block(
                self.width,
                self.num_heads,
                self.mlp_dim,
                self.mlp,
                self.attention,
                self.dtype,
                self.scale_init,
                self.norm_eps,
                self.matmul_dtype,
            )

        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan_layers else self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(make_block, name="blocks")
        x = nn.with_logical_constraint(x, ACT_AXES)
        kept, slots = None, np.full(self.depth, len(out_layers), np.int32)
        if out_layers:
            kept = jnp.zeros((len(out_layers), *x.shape), x.dtype)
            slots[list(out_layers)] = np.arange(len(out_layers))
        (x, kept), _ = layers(
            (x, kept), jnp.arange(1, self.depth + 1), jnp.asarray(slots), tables, mask
        )
        return x, kept
