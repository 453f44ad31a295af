"""Details across modules: published sizes, shardings by name, edges of the losses."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_setup import make_init_of

from vjepa_jax.models import layers, registry
from vjepa_jax.models.attention.dispatch import attention
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses, optim
from vjepa_jax.objective.state import init_shapes
from vjepa_jax.parallel import sharding


def make_state_init(tx):
    encoder = VideoEncoder(2, 24, num_heads=2, mlp_dim=40, patch_size=4)
    predictor = Predictor(2, 16, num_heads=2, mlp_dim=32, out_dim=24)
    return make_init_of(encoder, predictor, tx, (2, 8, 8, 3))


def named_leaves(tree):
    return {
        "/".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


# losses


def test_regularisers_vanish_for_white_features(rng):
    z = rng.normal(size=(64, 6))
    q, _ = np.linalg.qr(z - z.mean(0))
    white = jnp.asarray(1.1 * math.sqrt(63) * q + 3, jnp.float32)
    hinge, covariance = losses.variance_covariance(white)
    assert hinge == 0
    np.testing.assert_allclose(covariance, 0, atol=1e-5)


def test_statistics_are_finite_at_zero():
    for name, value in losses.collapse_statistics(jnp.zeros((2, 3, 4))).items():
        assert np.isfinite(value), name


# optim


def test_decay_moves_what_it_should_from_the_state_that_a_run_starts_with(rng):
    """A run's optimiser state is made from boxed parameters, see `train_state`."""
    tx = optim.make_optimizer(lambda _: 0.1, lambda _: 0.5, clip_norm=1.0)
    state = init_shapes(make_state_init(tx))
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params
    )
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.opt_state)
    # Zero gradients: clipping must not divide by their norm either.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, new_state = jax.jit(tx.update)(zeros, opt_state, params, step=0)
    assert jax.tree.structure(new_state) == jax.tree.structure(opt_state)
    leaves = named_leaves(params)
    for name, update in named_leaves(updates).items():
        decays = "bias" not in name and leaves[name].ndim - ("stack" in name) > 1
        share = -0.1 * 0.5 if decays else 0.0
        np.testing.assert_allclose(
            update, share * leaves[name], rtol=1e-5, err_msg=name
        )


# sharding

BLOCK = {
    "norm1/scale": (None,),
    "norm1/bias": (None,),
    "qkv/kernel": ("fsdp", None),
    "qkv/bias": (None,),
    "proj/kernel": ("fsdp", None),
    "proj/bias": (None,),
    "norm2/scale": (None,),
    "norm2/bias": (None,),
    "fc1/kernel": ("fsdp", None),
    "fc1/bias": (None,),
    "fc2/kernel": ("fsdp", None),
    "fc2/bias": (None,),
}
STACK = {f"stack/blocks/{name}": (None, *spec) for name, spec in BLOCK.items()}
NORM = {"norm/scale": (None,), "norm/bias": (None,)}
EMBED = {"embed/proj/kernel": (None, "fsdp"), "embed/proj/bias": (None,)}
ENCODER = EMBED | STACK | NORM
PREDICTOR = {
    "mask_tokens": (None, None),
    "embed/kernel": ("fsdp", None),
    "embed/bias": (None,),
    **STACK,
    **NORM,
    "proj/kernel": ("fsdp", None),
    "proj/bias": (None,),
}


def test_fsdp_splits_the_input_of_every_kernel():
    init = make_state_init(optim.make_optimizer(lambda _: 0.1, lambda _: 0.1))
    mesh = sharding.make_mesh(2, 4)
    shapes, specs = init_shapes(init), sharding.state_shardings(init, mesh)
    for name, expected in (("encoder", ENCODER), ("predictor", PREDICTOR)):
        ndim = {k: x.ndim for k, x in named_leaves(shapes.params[name]).items()}
        got = {
            # Trailing None may be left out.
            k: (*s.spec, *[None] * (ndim[k] - len(s.spec)))
            for k, s in named_leaves(specs.params[name]).items()
        }
        assert got == expected


def test_activations_are_split_over_the_batch(rng):
    """Without the constraint the compiler could gather the batch."""
    mesh = sharding.make_mesh(2, 4)
    stack = layers.Stack(layers.TransformerConfig(1, 16, 2, 32, scan_layers=True))
    x = jnp.asarray(rng.normal(size=(8, 3, 16)), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def shape_per_device(context):
        with context:
            # The input is whole: only the constraint can split the output.
            whole = jax.device_put(x, sharding.replicated(mesh))
            y = jax.jit(lambda p, x: stack.apply(p, x)[0])(params, whole)
            return y.sharding.shard_shape(x.shape)

    assert shape_per_device(sharding.use(mesh)) == (1, 3, 16)
    assert shape_per_device(jax.set_mesh(mesh)) == x.shape


# models


@pytest.mark.parametrize(
    ("size", "published"), [("base", 86_833_152), ("giant", 1_013_267_968)]
)
def test_sizes_are_the_published_ones_to_the_last_parameter(size, published):
    """Published of 2.1, which adds an image embedding, three norms and two codes."""
    encoder = registry.make_encoder(size, scan_layers=True)
    video = jnp.zeros((1, 2, 16, 16, 3))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), video)
    added = (16 * 16 * 3 + 1 + 3 * 2 + 2) * encoder.width
    assert sum(x.size for x in jax.tree.leaves(shapes)) + added == published


def test_attention_of_an_unknown_kind_is_refused(rng):
    q = jnp.zeros((1, 2, 1, 4))
    with pytest.raises(
        ValueError,
        match="'flash' is unknown; known: auto, xla, blockwise, cudnn, splash",
    ):
        attention(q, q, q, "flash")


def test_attentive_classifier_equals_plain_numpy_and_ignores_order(rng):
    head = AttentiveClassifier(num_classes=5, num_heads=2)
    tokens = rng.normal(size=(3, 7, 8)).astype(np.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), tokens)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes
    )
    logits = jax.jit(head.apply)(params, tokens)
    p = jax.tree.map(lambda x: x.astype(np.float64), params)["params"]

    def linear(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p[name]["scale"] + p[name]["bias"]

    for clip, got in zip(tokens.astype(np.float64), logits, strict=True):
        q = linear(p["query"][0, 0], "q").reshape(2, 4)
        # The keys of all heads, then their values.
        kv = linear(norm(clip, "norm1"), "kv").reshape(7, 2, 2, 4)
        pooled = []
        for i in range(2):
            weights = np.exp(kv[:, 0, i] @ q[i] / 2)
            pooled.append(weights / weights.sum() @ kv[:, 1, i])
        x = p["query"][0, 0] + np.concatenate(pooled)
        y = linear(norm(x, "norm2"), "fc1")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        # Single precision; the logits are of order one.
        np.testing.assert_allclose(
            got, linear(x + linear(y, "fc2"), "linear"), atol=1e-4
        )
    shuffled = head.apply(params, tokens[:, rng.permutation(7)])
    np.testing.assert_allclose(shuffled, logits, atol=1e-5)
