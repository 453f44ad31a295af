"""All implementations of attention give the same outputs and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax.models import layers
from vjepa_jax.models.attention import dispatch as attention_lib
from vjepa_jax.models.attention.dispatch import attention
from vjepa_jax.parallel import sharding


def operands(rng, n, m, head_dim, batch=2, heads=2, dtype=np.float32):
    lengths = (n, m, m)
    return [
        jnp.asarray(rng.normal(size=(batch, x, heads, head_dim)), dtype)
        for x in lengths
    ]


def reference(q, k, v, mask=None):
    """Attention in float64, one row of scores at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", weights, v)


def with_gradients(impl, weights, mask=None):
    def loss(q, k, v):
        out = attention(q, k, v, impl, mask)
        return (out.astype(jnp.float32) * weights).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 900),  # more than one block of queries
    st.integers(1, 300),
    st.sampled_from((3, 16, 24)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_blockwise_equals_plain_attention(n, m, head_dim, has_mask, seed):
    rng = np.random.default_rng(seed)
    q, k, v = operands(rng, n, m, head_dim)
    weights = rng.normal(size=q.shape).astype(np.float32)
    mask = None
    if has_mask:
        mask = rng.random((n, m)) < 0.5
        mask[:, 0] = True
    grads, out = with_gradients("blockwise", weights, mask)(q, k, v)
    wanted, _ = with_gradients("xla", weights, mask)(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


@pytest.mark.parametrize(
    ("n", "m", "head_dim"), [(37, 150, 24), (256, 128, 64), (130, 200, 16), (90, 70, 8)]
)
def test_splash_equals_plain_attention(rng, n, m, head_dim):
    q, k, v = operands(rng, n, m, head_dim)
    weights = rng.normal(size=q.shape).astype(np.float32)
    grads, out = with_gradients("splash", weights)(q, k, v)
    wanted, _ = with_gradients("xla", weights)(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v), atol=1e-5)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)


def held_by_tpu(arrays):
    """Bytes of arrays whose last axis fills whole registers of 128 lanes."""
    return sum(
        math.prod(x.shape[:-1]) * -(-x.shape[-1] // 128) * 128 * x.dtype.itemsize
        for x in arrays
        if x.ndim
    )


@pytest.mark.parametrize(("policy", "tokens"), [("none", 4), ("attention", 2)])
def test_splash_stores_its_residuals_without_padding(policy, tokens):
    """Of q, k, v and the output, or of the input and the output."""
    batch, n, heads, head_dim = 2, 200, 4, 32

    def attend(x):
        x = x.reshape(batch, n, heads, head_dim)
        return attention(2 * x, 3 * x, 4 * x, "splash").sum()

    if policy != "none":
        attend = jax.checkpoint(attend, policy=layers.REMAT_POLICIES[policy])
    x = jax.ShapeDtypeStruct((batch, n, heads * head_dim), jnp.bfloat16)
    kept = jax.eval_shape(lambda x: jax.vjp(attend, x)[1], x)
    normalisers = 4 * batch * heads * 256
    wanted = tokens * 2 * batch * n * heads * head_dim + normalisers
    assert wanted <= held_by_tpu(jax.tree.leaves(kept)) < wanted + 2**13


@pytest.mark.parametrize("batch", [8, 1])
def test_splash_computes_every_sample_on_its_device(rng, batch):
    q, k, v = operands(rng, 20, 30, 8, batch)
    mesh = sharding.make_mesh(2, 4)
    with sharding.use(mesh):
        if batch == 8:
            q, k, v = jax.device_put((q, k, v), sharding.batch_sharding(mesh))
        compute = jax.jit(lambda *x: attention(*x, "splash")).lower(q, k, v).compile()
        out = compute(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v), atol=1e-5)
    if batch == 8:
        assert out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
        assert "all-gather" not in compute.as_text()


@pytest.mark.parametrize("impl", ["blockwise", "splash"])
def test_half_precision_loses_no_more_than_plain_attention(rng, impl):
    q, k, v = operands(rng, 150, 130, 16, dtype=jnp.bfloat16)
    wanted = reference(q, k, v)
    errors = {
        name: np.abs(np.asarray(attention(q, k, v, name), np.float64) - wanted).max()
        for name in (impl, "xla")
    }
    assert attention(q, k, v, impl).dtype == jnp.bfloat16
    assert errors[impl] < 2 * errors["xla"] + 1e-3


def test_long_rows_of_keys_are_cut_into_equal_blocks():
    for length in (1, 128, 129, 1568, 2048, 2049, 4608, 18432):
        block = attention_lib.splash.block_kv(length)
        padded = -(-length // block) * block
        assert block % 128 == 0
        assert block <= 2048
        assert padded - length < 128 * (padded // block)


def test_unsupported_arguments_are_refused(rng):
    q, k, v = operands(rng, 4, 4, 8)
    with pytest.raises(ValueError, match=r"splash.*takes no mask"):
        attention(q, k, v, "splash", np.ones((4, 4), bool))
    with pytest.raises(ValueError, match=r"cudnn.*not float32"):
        attention(q, k, v, "cudnn")


def test_auto_goes_by_the_mesh_and_not_by_the_machine(monkeypatch):
    def chosen(n, platform, dtype=jnp.bfloat16, head_dim=64, mask=None):
        monkeypatch.setattr(attention_lib, "platform", lambda: platform)
        q = jax.ShapeDtypeStruct((1, n, 2, head_dim), dtype)
        return attention_lib.choose(q, q, mask)

    assert chosen(1568, "cpu") == "blockwise"
    assert chosen(64, "cpu") == "xla"
    assert chosen(1568, "tpu") == "splash"
    assert chosen(1568, "tpu", mask=np.ones((1568, 1568), bool)) == "xla"
    # A described GPU on a machine that has none.
    assert chosen(1568, "gpu") == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen(1568, "gpu") == "cudnn"
    assert chosen(1568, "gpu", dtype=jnp.float32) == "xla"
    assert chosen(1568, "gpu", head_dim=20) == "xla"


def test_an_unknown_implementation_is_refused(rng):
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(
        ValueError,
        match="'flash' is unknown; known: auto, xla, blockwise, cudnn, splash",
    ):
        attention(q, q, q, "flash")
