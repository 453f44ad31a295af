"""Attention by the splash kernel (Pallas) that jax ships for TPUs."""

import jax
import jax.numpy as jnp

from vjepa_jax.models.blockwise import OUTPUT_NAME

# Both from compilations for TPU v5e: whole rows of keys leave no partial sums of the
# queries' gradient to write and add up, until they no longer fit the vector memory.
_BLOCK_Q = 128
_MAX_BLOCK_KV = 2048
_LANES = 128  # lengths are multiples of the vector registers' width


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
    """Return the block of keys for a length: as equal as multiples of 128 allow."""
    blocks = -(-length // _MAX_BLOCK_KV)
    return _round_up(-(-length // blocks), _LANES)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False
) -> jax.Array:
    """Attend without a mask, see `attention.attention`.

    Lengths are padded to whole blocks, and segment numbers keep queries from what was
    padded.

    Args:
      q: [B, N, heads, head_dim].
      k, v: [B, M, heads, head_dim].
      interpret: run without a TPU, slowly.

    Raises:
      ValueError: this jax has no such kernel.
    """
    kernels = _kernels()
    (_, n, heads, head_dim), m = q.shape, k.shape[1]
    kv = block_kv(m)
    padded_n, padded_m = _round_up(n, _BLOCK_Q), _round_up(m, kv)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.FullMask((padded_n, padded_m))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=_BLOCK_Q,
            block_kv=kv,
            block_q_dkv=_BLOCK_Q,
            block_kv_dkv=kv,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=OUTPUT_NAME,
        interpret=interpret,
    )
    segments = None
    if padded_m != m:
        # Padded queries are dropped; all of them are in the real keys' segment, so
        # that no row is empty.
        segments = kernels.SegmentIds(
            jnp.zeros(padded_n, jnp.int32),
            (jnp.arange(padded_m) >= m).astype(jnp.int32),
        )

    def pad(x, length):
        x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))
        return x.swapaxes(1, 2)

    q = pad(q * head_dim**-0.5, padded_n)  # the kernel does not scale
    k, v = pad(k, padded_m), pad(v, padded_m)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return out.swapaxes(1, 2)[:, :n]
