"""Layer norm and GELU that keep little for their backward pass.

Differentiated as written they would keep every intermediate result: the norm three
fp32 copies of its input, GELU four of the largest activation there is.
"""

import functools
import math

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: jnp.dtype
) -> jax.Array:
    """Layer-normalise over channels in fp32; keeps its input and two numbers a token.

    Args:
      x: [..., D].
      scale, bias: [D].
      eps: added to the variance.
      dtype: of the output [..., D].
    """
    return _layer_norm_forward(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(x, scale, bias, eps, dtype):
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(variance + eps)
    y = (wide - mean) * rstd * scale + bias
    return y.astype(dtype), (x, mean, rstd, scale, bias)


def _layer_norm_backward(eps, dtype, saved, d_y):
    del eps, dtype
    x, mean, rstd, scale, bias = saved
    normed = (x.astype(jnp.float32) - mean) * rstd
    d_y = d_y.astype(jnp.float32)
    tokens = tuple(range(x.ndim - 1))
    d_normed = d_y * scale
    along = (d_normed * normed).mean(-1, keepdims=True)
    d_x = rstd * (d_normed - d_normed.mean(-1, keepdims=True) - normed * along)
    return (
        d_x.astype(x.dtype),
        (d_y * normed).sum(tokens).astype(scale.dtype),
        d_y.sum(tokens).astype(bias.dtype),
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Return x times the normal distribution's function of x, in fp32; keeps its slope.

    The exact form (arXiv 1606.08415), by erf as in PyTorch.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (d_x,) = primals, tangents
    wide = x.astype(jnp.float32)
    cdf = _normal_cdf(wide)
    density = jnp.exp(-0.5 * jnp.square(wide)) / math.sqrt(2 * math.pi)
    slope = (cdf + wide * density).astype(x.dtype)
    return (wide * cdf).astype(x.dtype), slope * d_x
