"""Models against a plain double-precision re-implementation, and what must not leak."""

import dataclasses
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_models import (
    GRID,
    HEADS,
    double,
    plain_linear,
    plain_norm,
    plain_sincos,
    plain_stack,
    plain_tubelets,
)

from vjepa_jax.models import layers, positions, registry
from vjepa_jax.models.encoder import VideoEncoder, normalise, token_grid
from vjepa_jax.models.layers import take_tokens
from vjepa_jax.models.predictor import ActionPredictor, Predictor

NUM_TOKENS = 24
VIDEO = (4, 12, 16, 3)  # tubelets of 2 x 4 x 4: GRID
WIDTH = 24
SIZE = {"num_heads": HEADS, "scan_layers": True}


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def filled(module, rng, *args, scale=0.3):
    """Return parameters of a module with random numbers in every one of them."""
    shapes = jax.eval_shape(lambda key: module.init(key, *args), jax.random.key(0))
    return jax.tree.map(lambda x: normal(rng, *x.shape) * scale, nn.unbox(shapes))


def subsets(rng, batch, count, num_tokens=NUM_TOKENS):
    """Draw token indices without repetition, in random order: [batch, count]."""
    return np.stack([rng.permutation(num_tokens)[:count] for _ in range(batch)])


def make_encoder(pos_embed="rope", **kwargs):
    return VideoEncoder(
        2, WIDTH, mlp_dim=40, patch_size=4, pos_embed=pos_embed, **{**SIZE, **kwargs}
    )


@pytest.mark.parametrize("pos_embed", ["rope", "sincos"])
def test_encoder_equals_plain_numpy(pos_embed, rng):
    encoder = make_encoder(pos_embed)
    video, idx = normal(rng, 2, *VIDEO), subsets(rng, 2, 9)
    params = filled(encoder, rng, video)["params"]
    actual = jax.jit(encoder.apply)({"params": params}, video, idx)
    params = double(params)
    for clip, chosen, tokens in zip(double(video), idx, actual, strict=True):
        x = plain_linear(plain_tubelets(clip), params["embed"]["proj"])
        if pos_embed == "sincos":
            x = x + plain_sincos(range(NUM_TOKENS), GRID, WIDTH)
        rope_idx = chosen if pos_embed == "rope" else None
        x = plain_norm(
            plain_stack(x[chosen], params["stack"], rope_idx), params["norm"]
        )
        # Single precision through two blocks whose values are of order ten.
        np.testing.assert_allclose(tokens, x, atol=2e-4)


@pytest.mark.parametrize("pos_embed", ["rope", "sincos"])
def test_predictor_equals_plain_numpy(pos_embed, rng):
    predictor = Predictor(
        2, 12, mlp_dim=20, out_dim=WIDTH, num_mask_tokens=3, pos_embed=pos_embed, **SIZE
    )
    context, idx = normal(rng, 2, 7, WIDTH), subsets(rng, 2, 12)
    ctx_idx, tgt_idx = idx[:, :7], idx[:, 7:]
    params = filled(predictor, rng, context, ctx_idx, tgt_idx, GRID)["params"]
    actual, _ = jax.jit(predictor.apply, static_argnums=(4, 5))(
        {"params": params}, context, ctx_idx, tgt_idx, GRID, 1
    )
    params = double(params)
    for seen, order, tokens in zip(double(context), idx, actual, strict=True):
        hidden = np.tile(params["mask_tokens"][1], (5, 1))
        x = np.concatenate([plain_linear(seen, params["embed"]), hidden])
        if pos_embed == "sincos":
            x = x + plain_sincos(order, GRID, 12)
        x = plain_stack(x, params["stack"], order if pos_embed == "rope" else None)
        x = plain_linear(plain_norm(x[7:], params["norm"]), params["proj"])
        np.testing.assert_allclose(tokens, x, atol=2e-4)


def test_tubelet_embedding_equals_a_strided_convolution(rng):
    video = normal(rng, 2, 4, 12, 16, 3)
    module = layers.TubeletEmbed(width=10, patch_size=4, tubelet_size=2)
    params = filled(module, rng, video)
    proj = params["params"]["proj"]
    convolved = jax.lax.conv_general_dilated(
        video,
        proj["kernel"].reshape(2, 4, 4, 3, 10),
        window_strides=(2, 4, 4),
        padding="VALID",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision="highest",
    )
    expected = convolved.reshape(2, NUM_TOKENS, 10) + proj["bias"]
    np.testing.assert_allclose(module.apply(params, video), expected, atol=1e-5)


# ---------------------------------------------------------------------------- positions


# ------------------------------------------------------------------- visible and hidden


@pytest.fixture(scope="module", params=["rope", "sincos"])
def encode(request):
    """Return an encoder with random parameters, as a compiled function."""
    rng = np.random.default_rng()
    encoder = make_encoder(request.param)
    params = filled(encoder, rng, normal(rng, 1, *VIDEO))
    apply = jax.jit(encoder.apply)
    return lambda *args: apply(params, *args)


def test_seeing_all_tokens_equals_seeing_the_clip(encode, rng):
    video = normal(rng, 2, *VIDEO)
    everything = np.tile(np.arange(NUM_TOKENS), (2, 1))
    # The same sums, but compiled apart.
    np.testing.assert_allclose(encode(video, everything), encode(video), atol=2e-5)


def test_permuting_what_is_seen_permutes_the_output(encode, rng):
    video, idx = normal(rng, 2, *VIDEO), subsets(rng, 2, 9)
    order = rng.permutation(9)
    # Attention sums in another order, in single precision.
    np.testing.assert_allclose(
        encode(video, idx[:, order]), encode(video, idx)[:, order], atol=1e-4
    )


def test_hidden_pixels_cannot_influence_the_context(encode, rng):
    video, idx = normal(rng, 2, *VIDEO), subsets(rng, 2, 9)
    hidden = np.ones((2, NUM_TOKENS), bool)
    np.put_along_axis(hidden, idx, False, axis=1)
    per_pixel = hidden.reshape(2, *GRID)
    for axis, size in ((1, 2), (2, 4), (3, 4)):
        per_pixel = per_pixel.repeat(size, axis)
    changed = np.where(per_pixel[..., None], 1000 * normal(rng, *video.shape), video)
    assert (changed != video).any()
    tokens = np.asarray(encode(video, idx))
    # Bit for bit: not even a rounding error may come from what is hidden.
    np.testing.assert_array_equal(encode(changed, idx), tokens)
    # And every visible token matters to all tokens of its clip, and of no other.
    place = idx[0, 0] if idx[0, 0] < 12 else idx[0, 0] - 12
    t, (h, w) = idx[0, 0] // 12, divmod(place, 4)
    changed[0, 2 * t, 4 * h, 4 * w] += 1
    others = np.asarray(encode(changed, idx))
    assert (others[0] != tokens[0]).any(-1).all()
    np.testing.assert_array_equal(others[1], tokens[1])


@pytest.mark.parametrize("pos_embed", ["rope", "sincos"])
def test_permuting_targets_permutes_predictions(pos_embed, rng):
    predictor = Predictor(2, 12, mlp_dim=20, out_dim=WIDTH, pos_embed=pos_embed, **SIZE)
    context, idx = normal(rng, 2, 7, WIDTH), subsets(rng, 2, 14)
    ctx_idx, tgt_idx = idx[:, :7], idx[:, 7:]
    # Large, so that attention and with it the output depend on places.
    params = filled(predictor, rng, context, ctx_idx, tgt_idx, GRID, scale=0.8)
    apply = jax.jit(predictor.apply, static_argnums=4)
    predicted = np.asarray(apply(params, context, ctx_idx, tgt_idx, GRID)[0])
    order = rng.permutation(7)
    permuted, _ = apply(params, context, ctx_idx, tgt_idx[:, order], GRID)
    # Attention sums in another order, in single precision.
    np.testing.assert_allclose(permuted, predicted[:, order], atol=1e-3)
    # The order of the context does not matter either.
    permuted, _ = apply(params, context[:, order], ctx_idx[:, order], tgt_idx, GRID)
    np.testing.assert_allclose(permuted, predicted, atol=1e-3)
    assert np.abs(np.diff(predicted, axis=1)).max() > 0.03


# ------------------------------------------------------------------- how it is computed


def make_stack(**fields):
    return layers.Stack(layers.TransformerConfig(2, 12, 2, 20, **fields))


@pytest.fixture(scope="module")
def stack_case():
    rng = np.random.default_rng()
    x = normal(rng, 2, 6, 12)
    tables = positions.rope_tables(jnp.arange(6)[None], (1, 2, 3), 6)
    params = filled(make_stack(), rng, x, tables)
    return params, x, tables


def output_and_gradient(stack_case, **how):
    stack = make_stack(**how)

    def loss(params, x, tables):
        y, _ = stack.apply(params, x, tables)
        return (y**2).mean(), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*stack_case)
    return [np.asarray(a) for a in (y, *jax.tree.leaves(grads))]


@pytest.fixture(scope="module")
def unrolled(stack_case):
    return output_and_gradient(stack_case)


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [(False, "full"), *((True, name) for name in layers.REMAT_POLICIES)],
)
def test_scan_and_rematerialisation_change_nothing(
    scan_layers, remat, stack_case, unrolled
):
    actual = output_and_gradient(stack_case, scan_layers=scan_layers, remat=remat)
    assert len(actual) == len(unrolled) == 13
    for a, b in zip(actual, unrolled, strict=True):
        # Compiled apart: single-precision sums in another order.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_full_rematerialisation_keeps_less_between_the_passes(stack_case):
    """Count the residuals; otherwise the option might have no effect."""

    def saved(remat):
        stack = make_stack(scan_layers=True, remat=remat)

        def residuals(params, x, tables):
            _, pullback = jax.vjp(lambda p: stack.apply(p, x, tables)[0], params)
            return pullback

        return sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(residuals, *stack_case))
        )

    sizes = {name: saved(name) for name in layers.REMAT_POLICIES}
    assert sizes["full"] < sizes["dots_no_batch"] <= sizes["dots"] < sizes["none"]


def test_half_precision_computes_in_it_and_keeps_single_precision_parameters(rng):
    encoder = make_encoder(dtype=jnp.bfloat16)
    video = normal(rng, 1, *VIDEO)
    params = nn.unbox(jax.jit(encoder.init)(jax.random.key(0), video))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = jax.jit(encoder.apply)(params, video)
    assert tokens.dtype == jnp.bfloat16
    exact = jax.jit(make_encoder().apply)(params, video)
    error = np.abs(np.asarray(tokens, np.float32) - exact)
    # Eight bits of mantissa, a few roundings deep; tokens are of order one.
    assert 0 < error.mean() < 0.02


def test_initial_output_projections_shrink_with_depth():
    stack = layers.Stack(layers.TransformerConfig(3, 48, 4, 192, scan_layers=True))
    x = jnp.zeros((1, 2, 48))
    blocks = nn.unbox(stack.init(jax.random.key(1), x))["params"]["blocks"]
    for name, expected in (
        ("qkv", [0.02] * 3),
        ("fc1", [0.02] * 3),
        ("proj", 0.02 / np.sqrt([2, 4, 6])),
        ("fc2", 0.02 / np.sqrt([2, 4, 6])),
    ):
        std = np.asarray(blocks[name]["kernel"]).std(axis=(1, 2))
        # 2304 weights or more a layer: a standard error of 1.5 %.
        np.testing.assert_allclose(std, expected, rtol=0.075)
        assert (np.asarray(blocks[name]["bias"]) == 0).all()


# -------------------------------------------------------------------------------- sizes

# Millions of parameters of the released encoders: the reference's inventory, 1.3.
MILLIONS = {
    "tiny": (5.63, 0.005),
    "small": (21.9, 0.05),
    "base": (86.2, 0.05),
    "large": (303.9, 0.05),
    "huge": (631.6, 0.05),
    "giant": (1012.2, 0.05),
}


def number_of_parameters(size):
    encoder = registry.make_encoder(size, scan_layers=True)
    video = jnp.zeros((1, 2, 16, 16, 3))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), video)
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", MILLIONS)
def test_sizes_have_the_reference_number_of_parameters(size):
    millions, rounding = MILLIONS[size]
    assert abs(number_of_parameters(size) / 1e6 - millions) <= rounding


@pytest.mark.parametrize("size", registry.SIZES)
def test_sizes_have_the_parameters_that_their_fields_tell(size):
    depth, width, heads, mlp = (
        getattr(registry.SIZES[size], name)
        for name in ("depth", "width", "num_heads", "mlp_dim")
    )
    assert width % heads == 0
    block = 4 * width * width + 2 * width * mlp + 4 * width + width + mlp + 4 * width
    expected = depth * block + (2 * 16 * 16 * 3 + 1) * width + 2 * width
    assert number_of_parameters(size) == expected


def test_an_unknown_size_is_refused_by_name():
    with pytest.raises(ValueError, match="'enormous' is unknown; known: nano, tiny"):
        registry.make_encoder("enormous")


# ---------------------------------------------------------------------------- functions


def test_gathered_tokens_are_those_of_the_indices(rng):
    x, idx = normal(rng, 3, 7, 2), subsets(rng, 3, 4, 7)
    expected = np.stack([row[i] for row, i in zip(x, idx, strict=True)])
    np.testing.assert_array_equal(take_tokens(jnp.asarray(x), idx), expected)


def test_video_is_normalised_by_imagenets_statistics(rng):
    video = rng.integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    expected = (video / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    actual = normalise(jnp.asarray(video))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_an_action_predictor_spreads_columns_over_as_many_places_as_rows(rng):
    """As `ACRoPEAttention` does: of a grid 2 x 4, columns are half a step apart."""
    predictor = registry.make_action_predictor(
        depth=1, width=12, num_heads=2, out_dim=8
    )
    tokens = jnp.asarray(rng.normal(size=(1, 8, 8)), jnp.float32)
    action = jnp.asarray(rng.normal(size=(1, 1, 7)), jnp.float32)
    given = (tokens, action, action, None)
    params = predictor.init(jax.random.key(0), *given, (1, 2, 4))
    seen = []
    rope_at = positions.rope_at

    def record(coordinates, head_dim, tiled):
        seen.append([np.asarray(c) for c in coordinates])
        return rope_at(coordinates, head_dim, tiled)

    with mock.patch.object(positions, "rope_at", record):
        predictor.apply(params, *given, (1, 2, 4))
    columns = [0, 0, 0, 0.5, 1, 1.5, 0, 0.5, 1, 1.5]  # after action and state
    np.testing.assert_array_equal(seen[0][2], columns)


def test_clips_that_tubelets_do_not_tile_are_refused():
    assert token_grid((7, 4, 12, 16, 3), 4, 2) == GRID
    for shape in ((3, 12, 16, 3), (4, 13, 16, 3), (4, 12, 18, 3)):
        with pytest.raises(ValueError, match="cannot be cut into tubelets of 2x4x4"):
            token_grid(shape, 4, 2)


def test_models_have_the_fields_of_a_transformer():
    """`TransformerConfig.of` takes defaults where names differ: they must not."""
    shape = {"depth": 3, "width": 12, "num_heads": 2, "mlp_dim": 20}
    encoder = VideoEncoder(**shape)
    predictors = Predictor(**shape, out_dim=8), ActionPredictor(**shape, out_dim=8)
    config = layers.TransformerConfig(**shape)
    for module in (encoder, *predictors):
        assert layers.TransformerConfig.of(module) == config
    without_gradient = {"matmul_dtype"}
    names = {field.name for field in dataclasses.fields(config)}
    assert names - vars(encoder).keys() == set()
    assert names - vars(predictors[0]).keys() == without_gradient
    assert names - vars(predictors[1]).keys() == without_gradient | {"scale_init"}


@pytest.mark.parametrize(
    ("size", "published"), [("base", 86_833_152), ("giant", 1_013_267_968)]
)
def test_sizes_are_the_published_ones_to_the_last_parameter(size, published):
    """Sizes published for 2.1, which adds an image embedding, 3 norms, 2 modalities."""
    encoder = registry.make_encoder(size, scan_layers=True)
    video = jnp.zeros((1, 2, 16, 16, 3))
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), video)
    added = (16 * 16 * 3 + 1 + 3 * 2 + 2) * encoder.width
    assert sum(x.size for x in jax.tree.leaves(shapes)) + added == published
