"""Encoders of several levels, with images, and other MLPs, against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_models import HEADS, double, plain_block, plain_linear, plain_norm
from step_setup import random_like

from vjepa_jax.models.encoder import VideoEncoder

GRID = (2, 3, 4)
VIDEO = (4, 12, 16, 3)  # tubelets of 2 x 4 x 4: GRID
IMAGE = (1, 12, 16, 3)
WIDTH = 24


def make_encoder(**fields):
    defaults = {"depth": 3, "width": WIDTH, "num_heads": HEADS, "mlp_dim": 40}
    defaults |= {"patch_size": 4, "scan_layers": True}
    return VideoEncoder(**defaults | fields)


def filled(encoder, rng, shape=VIDEO):
    """Return random parameters, for clips of any shape."""
    clip = jnp.zeros((1, *shape))
    return random_like(jax.eval_shape(encoder.init, jax.random.key(0), clip), rng)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def plain_outputs(clip, params, tubelet_size=2, embed="embed", added=0.0):
    """Return what every block of one clip puts out, before any last norm."""
    t, h, w = len(clip) // tubelet_size, clip.shape[1] // 4, clip.shape[2] // 4
    tubelets = [
        clip[
            tubelet_size * i : tubelet_size * (i + 1),
            4 * j : 4 * j + 4,
            4 * k : 4 * k + 4,
        ].ravel()
        for i, j, k in np.ndindex(t, h, w)
    ]
    x = plain_linear(np.stack(tubelets), params[embed]["proj"]) + added
    outputs = []
    for layer in range(3):
        block = jax.tree.map(lambda p, i=layer: p[i], params["stack"]["blocks"])
        x = plain_block(x, block, range(len(x)), (t, h, w))
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_outputs_of_chosen_blocks_equal_plain_numpy(mlp, rng):
    encoder, video = make_encoder(mlp=mlp), normal(rng, 2, *VIDEO)
    params = filled(encoder, rng)
    assert ("fc3" in params["params"]["stack"]["blocks"]) == (mlp == "swiglu")
    apply = jax.jit(encoder.apply, static_argnames="out_layers")
    kept = apply(params, video, out_layers=(0, 2))
    assert kept.shape == (2, 2, 24, WIDTH)
    # By default the encoder returns the last block's output.
    np.testing.assert_allclose(kept[1], apply(params, video), atol=1e-4)
    params = double(params["params"])
    for b, clip in enumerate(double(video)):
        outputs = plain_outputs(clip, params)
        for slot, layer in enumerate((0, 2)):
            expected = plain_norm(outputs[layer], params["norm"])
            # Single precision through three blocks whose values are of order ten.
            np.testing.assert_allclose(kept[slot, b], expected, atol=5e-4)


def test_levels_are_block_outputs_each_through_its_norm(rng):
    encoder, video = make_encoder(levels=(0, 2)), normal(rng, 2, *VIDEO)
    assert encoder.out_dim == 2 * WIDTH and encoder.num_levels == 2
    variables = filled(encoder, rng)
    params = variables["params"]
    assert {"norm_0", "norm_1"} <= set(params) and "norm" not in params
    apply = jax.jit(encoder.apply, static_argnames="out_layers")
    features = np.asarray(apply(variables, video))
    assert features.shape == (2, 24, 2 * WIDTH)
    levels = np.split(features, 2, axis=-1)
    for number, level in enumerate(levels):
        # `out_layers` go through the last norm: put the level's own norm there.
        swapped = {"params": params | {"norm_1": params[f"norm_{number}"]}}
        kept = apply(swapped, video, out_layers=(0, 2))
        np.testing.assert_allclose(kept[number], level, atol=1e-5)
    plain = double(params)
    outputs = plain_outputs(double(video)[0], plain)
    for number, layer in enumerate((0, 2)):
        expected = plain_norm(outputs[layer], plain[f"norm_{number}"])
        np.testing.assert_allclose(levels[number][0], expected, atol=5e-4)
    # The same levels for the tokens that are seen, if these are all of them.
    everything = np.tile(np.arange(24), (2, 1))
    np.testing.assert_allclose(apply(variables, video, everything), features, atol=1e-4)
    # The last levels alone: the others' norms stay parameters.
    last = make_encoder(levels=(0, 2), output_levels=1)
    shapes = jax.eval_shape(last.init, jax.random.key(0), video)["params"]
    assert jax.tree.structure(random_like(shapes, rng)) == jax.tree.structure(params)
    assert last.out_dim == WIDTH
    np.testing.assert_allclose(last.apply(variables, video), levels[1], atol=1e-4)


def test_images_and_videos_have_their_own_embeddings(rng):
    encoder = make_encoder(image_embed=True)
    variables = filled(encoder, rng)
    # Whatever the first clip is, there are parameters for both.
    of_image = filled(encoder, rng, IMAGE)
    assert jax.tree.structure(of_image) == jax.tree.structure(variables)
    params = double(variables["params"])
    apply = jax.jit(encoder.apply)
    for shape, name, tubelet_size, row in (
        (IMAGE, "image_embed", 1, 0),
        (VIDEO, "embed", 2, 1),
    ):
        clip = normal(rng, 1, *shape)
        grid = (shape[0] // tubelet_size, 3, 4)
        assert encoder.grid(clip.shape) == grid
        assert encoder.is_image(clip.shape) == (shape is IMAGE)
        tokens = apply(variables, clip)
        added = params["modality"][row]
        outputs = plain_outputs(double(clip)[0], params, tubelet_size, name, added)
        expected = plain_norm(outputs[-1], params["norm"])
        np.testing.assert_allclose(tokens[0], expected, atol=5e-4)
    # Without image embedding, one frame is no whole tubelet.
    with pytest.raises(ValueError, match="cannot be cut into tubelets"):
        make_encoder().grid((1, *IMAGE))


def test_levels_do_not_depend_on_how_they_are_computed(rng):
    """Loop or unroll, with or without recomputation: features and gradients."""
    video = normal(rng, 1, *VIDEO)
    params = filled(make_encoder(levels=(0, 1)), rng)
    runs = []
    for how in (
        {"scan_layers": False},
        {"scan_layers": True},
        {"scan_layers": True, "remat": "full"},
        {"scan_layers": False, "remat": "dots"},
    ):
        encoder = make_encoder(levels=(0, 1), **how)

        def loss(params, encoder=encoder):
            features = encoder.apply(params, video)
            return (features**3).mean(), features

        grads, features = jax.jit(jax.grad(loss, has_aux=True))(params)
        runs.append([np.asarray(x) for x in (features, *jax.tree.leaves(grads))])
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            # Compiled apart: single-precision sums in another order.
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
