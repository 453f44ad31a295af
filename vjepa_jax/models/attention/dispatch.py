"""Multi-head attention, one function and several ways to compute it.

V-JEPA gathers visible tokens and never pads, so that there is no mask in pretraining.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from vjepa_jax.base.choices import ATTENTIONS
from vjepa_jax.models.attention import blockwise, splash
from vjepa_jax.models.attention.blockwise import OUTPUT_NAME
from vjepa_jax.models.platform import platform

# Below so many scores per head they fit a CPU's cache, and one matmul is faster.
_BLOCKWISE_SCORES = 256 * 256


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    impl: str = "auto",
    mask: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """Attend from every query to every key with scale `head_dim ** -0.5`.

    The softmax is fp32 in all of them, and all agree up to rounding:
      `xla`: scores in memory; on any device, with any mask.
      `blockwise`: plain JAX, two heads and a block of queries at a time; for CPUs,
        slow elsewhere. With any mask; has a gradient but no forward-mode derivative.
      `cudnn`: NVIDIA's kernel; bf16 or fp16, head_dim a multiple of 8 up to 128 (256
        from Hopper on), even lengths where there is a mask.
      `splash`: Pallas kernel of TPUs; without a mask. On CPUs it is interpreted, which
        is slow and meant for tests.
      `auto`: by the platform of the mesh that is set, else of the default backend:
        `splash` on TPUs; `cudnn` on GPUs that are there for what it takes; `blockwise`
        on CPUs for long sequences; else `xla`, as with a mask on TPUs and GPUs.

    Args:
      q: [B, N, heads, head_dim].
      k: [B, M, heads, head_dim].
      v: [B, M, heads, head_dim].
      impl: one of `choices.ATTENTIONS`.
      mask: bool [N, M], where a query may attend, to one key at least; None:
        everywhere.

    Returns:
      [B, N, heads, head_dim] in the dtype of `q`. It is named `OUTPUT_NAME` for
      policies of rematerialisation, and so is what else the backward pass needs of a
      forward kernel.

    Raises:
      ValueError: `impl` is unknown, or cannot do this; says what can.
    """
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
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=impl)
    return checkpoint_name(out, OUTPUT_NAME)


def choose(q: jax.Array, k: jax.Array, mask: jax.Array | np.ndarray | None) -> str:
    """Return what `auto` stands for; the arguments are those of `attention`."""
    kind = platform()
    if kind == "cpu":
        is_long = q.shape[1] * k.shape[1] > _BLOCKWISE_SCORES
        return "blockwise" if is_long else "xla"
    if mask is not None:
        return "xla"
    if kind == "tpu":
        return "splash"
    # A GPU that is only described has no cuDNN to ask, and tracing would fail.
    is_here = kind == "gpu" and jax.default_backend() == "gpu"
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if is_here and is_half and fits else "xla"


def _over_batch(function, q, k, v, *whole):
    """Run a function on each device's share of the batch; `whole` goes to all."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(q, k, v, *whole)
    spec = nn.logical_to_mesh_axes(("act_batch",))
    names = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    if len(q) % math.prod(mesh.shape[name] for name in names if name):
        spec = jax.P()  # initialisation runs on one sample: everyone computes it
    return jax.shard_map(
        function,
        in_specs=(spec,) * 3 + (jax.P(),) * len(whole),
        out_specs=spec,
        check_vma=False,
    )(q, k, v, *whole)
