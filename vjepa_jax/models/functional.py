"""Dense layer, layer norm and GELU with custom derivatives that save memory.

Automatic differentiation would keep every intermediate result: three fp32 copies of a
norm's input, four copies of the largest activation for GELU, and a rounded copy of each
dense kernel. It would also round the kernels' gradients to bf16 before they are
summed over devices.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Largest magnitude of each 8-bit dtype, see `quantised_dense`.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def platform() -> str:
    """Return the platform to compile for: `cpu`, `gpu` or `tpu`.

    It is the platform of the mesh in use; without a mesh, that of the default backend.
    The two differ when a step is compiled for a machine that is not present.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def computation_dtype(dtype: str | jnp.dtype, on: str) -> jnp.dtype:
    """Return the dtype in which models compute: `dtype`, but float32 on CPUs.

    XLA does not run every product of bf16 on a CPU, and those that it runs are slow.

    Args:
      dtype: as the user asks for, such as `bfloat16`.
      on: platform of the devices, see `platform`.
    """
    return jnp.dtype(jnp.float32 if on == "cpu" else dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Return x @ kernel + bias, computed in `dtype`: [..., in] -> [..., out].

    Gradients of kernel and bias are fp32 sums of products in `dtype`.

    Args:
      x: [..., in].
      kernel: float32 [in, out].
      bias: float32 [out].
      dtype: dtype of the operands and of the output.
    """
    return _dense_forward(x, kernel, bias, dtype)[0]


def _dense_forward(x, kernel, bias, dtype):
    y = x.astype(dtype) @ kernel.astype(dtype) + bias.astype(dtype)
    return y, (x, kernel)


def _dense_backward(dtype, saved, d_y):
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    d_x = (d_y @ kernel.astype(dtype).T).astype(x.dtype)
    # CPUs copy the transpose of the first operand: make that the narrower one.
    is_narrowing = x.shape[-1] > d_y.shape[-1]
    first, second = (d_y, x.astype(dtype)) if is_narrowing else (x.astype(dtype), d_y)
    d_kernel = jax.lax.dot_general(
        first,
        second,
        ((leading, leading), ((), ())),
        preferred_element_type=jnp.float32,
    )
    d_kernel = d_kernel.T if is_narrowing else d_kernel
    return d_x, d_kernel, d_y.astype(jnp.float32).sum(leading)


dense.defvjp(_dense_forward, _dense_backward)


def quantised_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    dtype: jnp.dtype,
    matmul_dtype: str,
) -> jax.Array:
    """Return x @ kernel + bias with operands rounded to 8 bits; it has no gradient.

    Every token and every column of the kernel is scaled to the dtype's range. Sums are
    int32 or fp32.

    Args:
      x, kernel, bias: see `dense`.
      dtype: dtype of the output.
      matmul_dtype: one of `choices.QUANTISED_DTYPES`.
    """
    x, x_scale = _quantise(x, -1, matmul_dtype)
    kernel, kernel_scale = _quantise(kernel, 0, matmul_dtype)
    wide = jnp.int32 if matmul_dtype == "int8" else jnp.float32
    y = jnp.matmul(x, kernel, preferred_element_type=wide).astype(jnp.float32)
    return (y * x_scale * kernel_scale + bias).astype(dtype)


def _quantise(x, axis, dtype):
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis, keepdims=True)
    scale = jnp.maximum(largest, 1e-30) / _LARGEST[dtype]
    x = x / scale
    return (jnp.round(x) if dtype == "int8" else x).astype(dtype), scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, dtype: jnp.dtype
) -> jax.Array:
    """Layer-normalise over channels in fp32.

    The backward pass keeps the input and two numbers per token.

    Args:
      x: [..., D].
      scale, bias: [D].
      eps: added to the variance.
      dtype: dtype of the output [..., D].
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
    """Return the exact GELU, computed in fp32 by erf as in PyTorch (arXiv 1606.08415).

    The backward pass keeps the slope only.
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
