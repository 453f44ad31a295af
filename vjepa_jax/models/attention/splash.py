"""Attention by jax's splash kernel (Pallas) for TPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from vjepa_jax.models.attention.blockwise import OUTPUT_NAME

# Chosen by compiling for TPU v5e. With all keys in one block, no partial sums of the
# queries' gradient are written and added, but long rows exceed the vector memory.
_BLOCK_Q = 128
_MAX_BLOCK_KV = 2048
_LANES = 128  # lengths are multiples of the width of a vector register


def _kernels():
    try:
        from jax.experimental.pallas.ops.tpu import splash_attention
    except ImportError as error:
        raise ValueError(
            f"jax {jax.__version__} has no splash attention ({error}): use another "
            "model.attention, such as xla"
        ) from None
    return splash_attention


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def block_kv(length: int) -> int:
    """Return the block size that cuts `length` keys as equally as lanes allow."""
    blocks = -(-length // _MAX_BLOCK_KV)
    return _round_up(-(-length // blocks), _LANES)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
    """Attend without a mask, see `dispatch.attention`.

    Lengths are padded to whole blocks; segment ids exclude the padded keys.

    Args:
      q: [B, N, heads, head_dim].
      k, v: [B, M, heads, head_dim].
      interpret: run without a TPU, slowly.

    Raises:
      ValueError: the installed jax has no such kernel.
    """
    (_, n, heads, head_dim), m = q.shape, k.shape[1]
    padded_n, padded_m = _round_up(n, _BLOCK_Q), _round_up(m, block_kv(m))

    def run(q, k, v):
        segments = None
        if padded_m != m:
            # Padded queries are dropped later. They are in the segment of the real
            # keys, so that no row is empty.
            segments = _kernels().SegmentIds(
                jnp.zeros(padded_n, jnp.int32),
                (jnp.arange(padded_m) >= m).astype(jnp.int32),
            )
        kernel = _make_kernel(heads, padded_n, padded_m, interpret)
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)

    def pad(x, length):
        return _to_heads(x.reshape(*x.shape[:2], -1), heads, length)

    q = pad(q * head_dim**-0.5, padded_n)  # the kernel does not scale
    out = _keep_tokens(run, (q, pad(k, padded_m), pad(v, padded_m)), n, m)
    return out.reshape(*out.shape[:2], heads, head_dim)


def _make_kernel(heads: int, n: int, m: int, interpret: bool):
    """Make the kernel from [heads, n or m, head_dim] to [heads, n, head_dim]."""
    kernels = _kernels()
    kv = block_kv(m)
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.FullMask((n, m))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=_BLOCK_Q,
            block_kv=kv,
            block_q_dkv=_BLOCK_Q,
            block_kv_dkv=kv,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


@struct.dataclass
class _Kept:
    """The first tokens of an array [B, heads, N, head_dim], stored without padding."""

    tokens: jax.Array
    shape: tuple[int, ...] = struct.field(pytree_node=False)

    def restore(self) -> jax.Array:
        """Return the array, with zeros for the tokens that were not stored."""
        return _to_heads(self.tokens, *self.shape[1:3])


def _to_tokens(x: jax.Array, count: int) -> jax.Array:
    x = x.swapaxes(1, 2)[:, :count]
    return x.reshape(*x.shape[:2], -1)


def _to_heads(x: jax.Array, heads: int, length: int) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _keep_tokens(
    run: Callable[..., jax.Array], operands: tuple[jax.Array, ...], n: int, m: int
) -> jax.Array:
    """Run a kernel whose residuals are stored as [B, N, heads * head_dim].

    In the kernel's layout, [B, heads, N, head_dim], every head fills registers of 128
    lanes: heads of 64 or 32 channels would take two or four times the memory.

    Args:
      run: maps q, k and v to the output, all in the kernel's layout.
      operands: q, k and v, padded with zeros.
      n, m: number of real queries and of real keys.

    Returns:
      Tokens [B, n, heads * head_dim].
    """
    _, heads, padded_n, _ = operands[0].shape
    counts = {padded_n: n}
    # If both are padded to the same length, they share a count, and a few zeros are
    # stored with the shorter one.
    counts[operands[1].shape[2]] = max(m, counts.get(operands[1].shape[2], 0))

    @jax.custom_vjp
    def attend(*operands):
        return _to_tokens(run(*operands), n)

    def forward(*operands):
        out, backward = jax.vjp(run, *operands)
        tokens = checkpoint_name(_to_tokens(out, n), OUTPUT_NAME)

        def keep(x):
            if x is out:
                return _Kept(tokens, x.shape)
            if x.ndim == 4:
                return _Kept(_to_tokens(x, counts[x.shape[2]]), x.shape)
            is_normaliser = jnp.issubdtype(x.dtype, jnp.floating)
            return checkpoint_name(x, OUTPUT_NAME) if is_normaliser else x

        # The function that `jax.vjp` returns is a tree of its residuals.
        return tokens, jax.tree.map(keep, backward)

    def backward(kept, d_tokens):
        restored = jax.tree.map(
            lambda x: x.restore() if isinstance(x, _Kept) else x,
            kept,
            is_leaf=lambda x: isinstance(x, _Kept),
        )
        return restored(_to_heads(d_tokens, heads, padded_n))

    attend.defvjp(forward, backward)
    return attend(*operands)
