"""Analytic FLOPs agree with the compiler's count; device peaks are found by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.config.defaults import get_config, stream
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.program import build, flops

# Lowering runs nothing, so real widths cost nothing. Stacks are unrolled: the compiler
# counts the body of a scan once. Norms, softmax and GELU, which do not count, are below
# this share.
TOLERANCE = 0.02
SIZE = flops.Transformer(depth=2, width=768, mlp_dim=3072)
NARROW = flops.Transformer(depth=2, width=384, mlp_dim=1536)
VIDEO = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
GRID = (8, 14, 14)
NUM_TOKENS, PATCH_DIM = 8 * 14 * 14, 2 * 16 * 16 * 3


def counted(function, *args) -> float:
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def indices(num: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, num), jnp.int32)


@pytest.fixture(scope="module")
def encoder():
    model = VideoEncoder(num_heads=12, **vars(SIZE))
    return model, nn.unbox(jax.eval_shape(model.init, jax.random.key(0), VIDEO))


@pytest.fixture(scope="module")
def predictor():
    model = Predictor(num_heads=12, out_dim=SIZE.width, **vars(NARROW))

    def init(key, context, ctx_idx, tgt_idx):
        return model.init(key, context, ctx_idx, tgt_idx, GRID)

    context = jax.ShapeDtypeStruct((1, 4, SIZE.width), jnp.float32)
    key = jax.random.key(0)
    return model, nn.unbox(jax.eval_shape(init, key, context, indices(4), indices(4)))


def test_plain_transformer_agrees_with_compiler():
    t, d, h, m = 256, 512, 8, 2048

    def block(x, qkv, out, up, down):
        q, k, v = jnp.moveaxis((x @ qkv).reshape(t, 3, h, d // h), 1, 0)
        weights = jax.nn.softmax(jnp.einsum("qhc,khc->hqk", q, k))
        x = x + jnp.einsum("hqk,khc->qhc", weights, v).reshape(t, d) @ out
        return x + jax.nn.relu(x @ up) @ down

    shapes = [(t, d), (d, 3 * d), (d, d), (d, m), (m, d)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    analytic = flops.Transformer(depth=1, width=d, mlp_dim=m).forward(t)
    np.testing.assert_allclose(analytic, counted(block, *args), rtol=TOLERANCE)


def test_encoder_agrees_with_compiler(encoder):
    model, params = encoder
    analytic = flops.encoder_flops(SIZE, NUM_TOKENS, PATCH_DIM)
    np.testing.assert_allclose(
        analytic, counted(model.apply, params, VIDEO), rtol=TOLERANCE
    )


def test_train_step_agrees_with_compiler(encoder, predictor):
    (enc, enc_params), (pred, pred_params) = encoder, predictor
    masks = [(368, 752), (96, 1104)]

    def update(params, target, video, idx):
        wanted = jax.lax.stop_gradient(enc.apply(target, video))

        def loss(params):
            total = 0.0
            for i, (ctx_idx, tgt_idx) in enumerate(idx):
                context = enc.apply(params[0], video, ctx_idx)
                out, _ = pred.apply(params[1], context, ctx_idx, tgt_idx, GRID, i)
                total += jnp.abs(out - wanted[:, : tgt_idx.shape[1]]).mean()
            return total

        return jax.value_and_grad(loss)(params)

    params = (enc_params, pred_params)
    idx = [tuple(map(indices, counts)) for counts in masks]
    analytic = flops.train_step_flops(
        SIZE,
        NARROW,
        num_tokens=NUM_TOKENS,
        patch_dim=PATCH_DIM,
        masks=masks,
        target=SIZE,
    )
    np.testing.assert_allclose(
        analytic, counted(update, params, enc_params, VIDEO, idx), rtol=TOLERANCE
    )


def test_gated_mlp_agrees_with_compiler():
    size = flops.Transformer(depth=2, width=768, mlp_dim=2048, mlp="swiglu")
    model = VideoEncoder(num_heads=12, **vars(size))
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), VIDEO))
    analytic = flops.encoder_flops(size, NUM_TOKENS, PATCH_DIM)
    np.testing.assert_allclose(
        analytic, counted(model.apply, params, VIDEO), rtol=TOLERANCE
    )


def test_predictor_of_levels_and_context_agrees_with_compiler():
    """The form of V-JEPA 2.1: four levels in, and every token out."""
    # Wide, and few tokens: operations that do not count are a small share.
    feature_dim, num_context, num_target = 4 * SIZE.width, 100, 200
    model = Predictor(
        num_heads=12,
        out_dim=feature_dim,
        input_dim=SIZE.width,
        predict_context=True,
        **vars(SIZE),
    )
    context = jax.ShapeDtypeStruct((1, num_context, feature_dim), jnp.float32)
    idx = indices(num_context), indices(num_target)

    def init(key, context, ctx_idx, tgt_idx):
        return model.init(key, context, ctx_idx, tgt_idx, GRID)

    params = nn.unbox(jax.eval_shape(init, jax.random.key(0), context, *idx))
    expected = counted(
        lambda p, c, i, j: model.apply(p, c, i, j, GRID), params, context, *idx
    )
    analytic = flops.predictor_flops(
        SIZE, num_context, num_target, feature_dim, SIZE.width, True
    )
    np.testing.assert_allclose(analytic, expected, rtol=TOLERANCE)


def test_step_counts_the_clips_of_every_stream():
    config = get_config()
    config.batch_size, config.model.encoder.size = 8, "tiny"
    config.model.image_embed = True

    def count():
        return build.step_flops(config, build.make_objective(config))

    videos = count()
    with config.unlocked():
        config.streams.image = stream(
            num_frames=1, batch_size=24, masks={"whole": config.masks.short}
        )
    both = count()
    config.streams.image.batch_size = 48
    assert count() - both == both - videos > 0
    # An image has 196 tokens of the video's 1568, and one mask of its two.
    assert 24 * 196 / (8 * 1568) / 4 < (both - videos) / videos < 24 * 196 / (8 * 1568)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
        ("TPU v99", None),
    ],
)
def test_peak_is_found_by_device_kind(kind, peak):
    assert flops.peak_flops(kind) == peak
