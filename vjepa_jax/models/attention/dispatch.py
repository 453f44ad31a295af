"""Multi-head attention: one function, several implementations.

V-JEPA gathers visible tokens and never pads, so pretraining needs no attention mask.
"""

import functools
import math
from typing import Literal, cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vjepa_jax.base.choices import ATTENTIONS
from vjepa_jax.models.attention import blockwise, splash
from vjepa_jax.models.attention.blockwise import OUTPUT_NAME
from vjepa_jax.models.functional import platform

# Up to this many scores per head fit a CPU's cache, and one matmul is faster.
_BLOCKWISE_SCORES = 256 * 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    impl: str = "auto",
    mask: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Attend from every query to every key with scale `head_dim ** -0.5`.

    All implementations compute the softmax in fp32 and agree up to rounding:
      `xla`: stores all scores; on any device, with any mask.
      `blockwise`: plain JAX, two heads and a block of queries at a time. For CPUs, slow
        elsewhere. With any mask; has a gradient but no forward-mode derivative.
      `cudnn`: NVIDIA's kernel; bf16 or fp16, head_dim a multiple of 8 up to 128 (256
        from Hopper on), even lengths with a mask.
      `splash`: Pallas kernel for TPUs; without a mask. On CPUs it is interpreted, which
        is slow and meant for tests.
      `auto`: depends on `functional.platform`. TPUs: `splash`. GPUs that are present:
        `cudnn` for what it supports. CPUs: `blockwise` for long sequences. Otherwise,
        and with a mask on TPUs and GPUs: `xla`.

    Args:
      q: [B, N, heads, head_dim].
      k, v: [B, M, heads, head_dim].
      impl: one of `choices.ATTENTIONS`.
      mask: bool [N, M], which keys a query may attend to, at least one; None: all.

    Returns:
      [B, N, heads, head_dim] in the dtype of `q`. The output, and the other residuals
      of a kernel, are named `OUTPUT_NAME` for rematerialisation policies.

    Raises:
      ValueError: `impl` is unknown or does not support the arguments.
    """
    chex.assert_rank([q, k, v], 4)
    chex.assert_equal_shape([k, v])
    if impl == "auto":
        impl = choose(q, k, mask)
    if impl == "blockwise":
        return _over_batch(blockwise.attention, q, k, v, mask)
    if impl == "splash":
        if mask is not None:
            raise ValueError("attention 'splash' takes no mask: use auto or xla")
        kernel = functools.partial(splash.attention, interpret=platform() == "cpu")
        return _over_batch(kernel, q, k, v)
    if impl not in ("xla", "cudnn"):
        raise ValueError(
            f"attention '{impl}' is unknown; known: {', '.join(ATTENTIONS)}"
        )
    if impl == "cudnn" and q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"attention 'cudnn' takes bfloat16 or float16, not {q.dtype}: use auto or "
            "xla, or set the dtype"
        )
    if mask is not None:
        mask = jnp.asarray(mask)[None, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, implementation=cast(Literal["xla", "cudnn"], impl)
    )
    return checkpoint_name(out, OUTPUT_NAME)


def choose(q: jax.Array, k: jax.Array, mask: jax.Array | np.ndarray | None) -> str:
    """Return the implementation that `auto` stands for, see `attention`."""
    kind = platform()
    if kind == "cpu":
        is_long = q.shape[1] * k.shape[1] > _BLOCKWISE_SCORES
        return "blockwise" if is_long else "xla"
    if mask is not None:
        return "xla"
    if kind == "tpu":
        return "splash"
    # For a GPU that is not present, jax cannot look up cuDNN, and tracing would fail.
    is_here = kind == "gpu" and jax.default_backend() == "gpu"
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if is_here and is_half and fits else "xla"


def _over_batch(function, q, k, v, *replicated):
    """Run a function on each device's shard of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, k, v, *replicated)
    spec = nn.logical_to_mesh_axes(("act_batch",)) or jax.P()
    names = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    if len(q) % math.prod(mesh.shape[name] for name in names if name):
        spec = jax.P()  # initialisation runs on one sample: every device computes it
    return jax.shard_map(
        function,
        in_specs=(spec,) * 3 + (jax.P(),) * len(replicated),
        out_specs=spec,
        check_vma=False,
    )(q, k, v, *replicated)
