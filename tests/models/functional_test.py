"""Layers with custom derivatives against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from vjepa_jax.models import functional, layers, positions


def plain_layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred / jnp.sqrt(variance + 1e-6) * scale + bias


def plain_dense(x, kernel, bias):
    return jnp.einsum("...i,io->...o", x, kernel) + bias


CASES = {
    "layer_norm": (
        lambda *x: functional.layer_norm(*x, 1e-6, jnp.float32),
        plain_layer_norm,
        [(2, 5, 12), (12,), (12,)],
    ),
    "dense": (
        lambda *x: functional.dense(*x, jnp.float32),
        plain_dense,
        [(2, 5, 12), (12, 7), (7,)],
    ),
    "widening dense": (
        lambda *x: functional.dense(*x, jnp.float32),
        plain_dense,
        [(2, 5, 7), (7, 12), (12,)],
    ),
    "gelu": (
        functional.gelu,
        lambda x: jax.nn.gelu(x, approximate=False),
        [(2, 5, 12)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_formula(rng, name):
    ours, plain, shapes = CASES[name]
    args = [jnp.asarray(rng.normal(1, 2, shape), jnp.float32) for shape in shapes]
    out, pullback = jax.vjp(ours, *args)
    wanted, plain_pullback = jax.vjp(plain, *args)
    np.testing.assert_allclose(out, wanted, rtol=1e-5, atol=1e-5)
    d_out = jnp.asarray(rng.normal(size=out.shape), jnp.float32)
    for a, b in zip(pullback(d_out), plain_pullback(d_out), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gelu_is_right_far_from_zero():
    x = jnp.array([-1e30, -50.0, -6.0, 0.0, 6.0, 50.0, 1e30])
    np.testing.assert_allclose(functional.gelu(x), jax.nn.relu(x), atol=1e-6)
    slope = jax.vmap(jax.grad(functional.gelu))(x)
    np.testing.assert_allclose(slope, [0, 0, 0, 0.5, 1, 1, 1], atol=1e-6)


def test_gradients_of_kernels_are_not_rounded(rng):
    """Many small products: a bf16 gradient would show in its lower mantissa bits."""
    x = jnp.asarray(rng.normal(size=(512, 8)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    d_y = jnp.asarray(rng.normal(size=(512, 4)), jnp.bfloat16)
    _, pullback = jax.vjp(
        lambda k: functional.dense(x, k, jnp.zeros(4), jnp.bfloat16), kernel
    )
    (d_kernel,) = pullback(d_y)
    wanted = np.asarray(x, np.float64).T @ np.asarray(d_y, np.float64)
    assert d_kernel.dtype == jnp.float32
    np.testing.assert_allclose(d_kernel, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("matmul_dtype", "tolerance"), [("int8", 0.012), ("float8_e4m3fn", 0.04)]
)
def test_quantised_dense_is_close_whatever_the_scale(rng, matmul_dtype, tolerance):
    tokens = 10.0 ** rng.uniform(-3, 3, (2, 50, 1))
    columns = 10.0 ** rng.uniform(-3, 3, (1, 32))
    x = jnp.asarray(rng.normal(size=(2, 50, 64)) * tokens, jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(64, 32)) * columns, jnp.float32)
    bias = jnp.zeros(32)
    wanted = np.asarray(plain_dense(x, kernel, bias)) / (tokens * columns)
    out = functional.quantised_dense(x, kernel, bias, jnp.float32, matmul_dtype)
    error = np.asarray(out) / (tokens * columns) - wanted
    relative = np.sqrt(np.square(error).mean() / np.square(wanted).mean())
    assert 1e-4 < relative < tolerance
    out = functional.quantised_dense(0 * x, kernel, bias, jnp.bfloat16, matmul_dtype)
    assert out.dtype == jnp.bfloat16
    assert not out.any()


def test_rotation_by_the_matrix_unit_is_the_same(rng, monkeypatch):
    x = jnp.asarray(rng.normal(size=(2, 6, 3, 20)), jnp.float32)
    tables = positions.rope_tables(jnp.arange(6)[None], (1, 2, 3), 20)
    wanted = positions.rotate(x, tables)
    monkeypatch.setattr(positions, "platform", lambda: "tpu")
    np.testing.assert_allclose(positions.rotate(x, tables), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("remat", "forward_kernels"),
    [("none", 1), ("full", 2), ("attention", 1), ("dots", 1), ("dots_no_batch", 1)],
)
def test_policies_run_the_attention_kernel_once(remat, forward_kernels):
    """Otherwise the most expensive part of a block would run again in the backward."""
    config = layers.TransformerConfig(
        1, 16, 2, 32, scan_layers=True, remat=remat, attention="splash"
    )
    stack = layers.Stack(config)
    x = jax.ShapeDtypeStruct((1, 128, 16), jnp.float32)
    params = jax.eval_shape(stack.init, jax.random.key(0), x)
    loss = jax.grad(lambda params, x: stack.apply(params, x)[0].sum())
    jaxpr = jax.make_jaxpr(loss)(params, x).jaxpr
    # What nothing reads is left out, as the compiler does.
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    kernels = str(jaxpr).count("pallas_call[")
    assert kernels == forward_kernels + 1  # one kernel makes all gradients


def test_cpus_compute_in_single_precision():
    """XLA for CPUs fails at some products of bf16, depending on what is beside them."""
    for dtype in ("float32", "bfloat16"):
        assert functional.computation_dtype(dtype, "cpu") == jnp.float32
        for platform in ("gpu", "tpu"):
            assert functional.computation_dtype(dtype, platform) == jnp.dtype(dtype)
