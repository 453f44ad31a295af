"""The objective against its terms: context, levels, regularisers, streams."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_setup import (
    MASKS,
    Setup,
    as_batch,
    copy_to_host,
    fixed_masks,
    random_like,
    videos,
)

from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses
from vjepa_jax.objective.masked import LossTerms, MaskedObjective, Stream
from vjepa_jax.objective.masking import MaskSpec

GRID = (2, 4, 4)
SMALL = {"depth": 1, "width": 16, "mlp_dim": 32}
NARROW = {"width": 12, "mlp_dim": 24}


def plain_targets(features, num_levels):
    """Normalise every level of features [B, N, D] by itself, in double precision."""
    levels = []
    for level in np.split(np.asarray(features, float), num_levels, axis=-1):
        spread = np.sqrt(level.var(-1, keepdims=True) + 1e-5)
        levels.append((level - level.mean(-1, keepdims=True)) / spread)
    return np.concatenate(levels, -1)


def take(x, idx):
    return np.take_along_axis(x, np.asarray(idx)[..., None], 1)


def distances(ctx_idx, tgt_idx, grid):
    """Return the distance from every visible token to the nearest predicted one."""
    return np.array(
        [
            [
                min(
                    math.dist(np.unravel_index(i, grid), np.unravel_index(j, grid))
                    for j in targets
                )
                for i in seen
            ]
            for seen, targets in zip(
                np.asarray(ctx_idx), np.asarray(tgt_idx), strict=True
            )
        ]
    )


# ------------------------------------------------------------------------------ weights


def test_the_context_weight_rises_between_its_steps():
    terms = LossTerms(context_weight=0.5, context_warmup=(10, 20))
    steps = [0, 9, 10, 11, 15, 19, 20, 21, 1000]
    factors = [float(terms.context_factor(step)) for step in steps]
    expected = [0, 0, 0, 0.05, 0.25, 0.45, 0.5, 0.5, 0.5]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)
    # Without a warm-up it acts from the start, or from its step.
    assert LossTerms(context_weight=0.5).context_factor(0) == 0.5
    late = LossTerms(context_weight=0.5, context_warmup=(7, 7))
    assert [float(late.context_factor(step)) for step in (6, 7, 8)] == [0, 0.5, 0.5]


# -------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("context_distance", [True, False])
def test_the_loss_is_the_weighted_sum_of_its_terms(context_distance, rng):
    terms = LossTerms(
        exponent=2.0,
        context_weight=0.5,
        context_warmup=(10, 20),
        context_distance=context_distance,
        prediction_variance_weight=0.3,
        variance_weight=0.1,
        covariance_weight=0.01,
    )
    setup = Setup(
        terms=terms,
        encoder={"width": 16, "mlp_dim": 32, "levels": (0, 1)},
        predictor={"input_dim": 16, "predict_context": True, "num_mask_tokens": 2},
    )
    assert setup.encoder.out_dim == setup.predictor.out_dim == 32
    state = setup.random_state(rng)
    video, masks = videos(rng, 3), fixed_masks(rng, 3)
    clip = normalise(jnp.asarray(video))
    encode = jax.jit(setup.encoder.apply)
    predict = jax.jit(setup.predictor.apply, static_argnums=(4, 5))
    features = plain_targets(encode({"params": state.target}, clip), 2)
    terms = {name: [] for name in ("hidden", "visible", "variance", "covariance")}
    predictions = []
    for index, (ctx_idx, tgt_idx) in enumerate(masks.values()):
        context = encode({"params": state.params["encoder"]}, clip, ctx_idx)
        hidden, visible = predict(
            {"params": state.params["predictor"]},
            context,
            ctx_idx,
            tgt_idx,
            GRID,
            index,
        )
        predictions.append(np.asarray(hidden, float))
        terms["hidden"].append((predictions[-1] - take(features, tgt_idx)) ** 2 / 2)
        error = (np.asarray(visible, float) - take(features, ctx_idx)) ** 2 / 2
        if context_distance:
            error /= np.sqrt(distances(ctx_idx, tgt_idx, GRID))[..., None]
        terms["visible"].append(error)
        variance, covariance = losses.variance_covariance(context)
        terms["variance"].append(variance)
        terms["covariance"].append(covariance)
    means = {name: np.mean([np.mean(x) for x in xs]) for name, xs in terms.items()}
    deviations = [np.sqrt(z.var(1, ddof=1) + 1e-4) for z in predictions]
    hinge = np.maximum(0, 1 - np.mean(deviations, axis=0)).mean()
    for step, weight in ((0, 0), (5, 0), (15, 0.25), (20, 0.5)):
        total, metrics = setup.compiled_loss(
            state.params, state.target, as_batch(video), {"video": masks}, step
        )
        # Single precision through three blocks.
        for name, value in (
            ("loss", means["hidden"]),
            ("context_term", means["visible"]),
            ("prediction_variance_term", hinge),
            ("variance_term", means["variance"]),
            ("covariance_term", means["covariance"]),
        ):
            np.testing.assert_allclose(metrics[f"train/{name}"], value, rtol=1e-4)
        expected = means["hidden"] + weight * means["visible"] + 0.3 * hinge
        expected += 0.1 * means["variance"] + 0.01 * means["covariance"]
        np.testing.assert_allclose(total, expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["train/total_loss"], total, rtol=1e-6)


def test_pixels_are_predicted_tubelet_by_tubelet(rng):
    """Each hidden token's own pixels, normalised; the target encoder is not used."""
    setup = Setup(terms=LossTerms(target="pixels"), predictor={"out_dim": 96})
    state = setup.random_state(rng)
    video, masks = videos(rng, 3), fixed_masks(rng, 3)
    tokens = [
        clip[t : t + 2, h : h + 4, w : w + 4].reshape(-1)
        for clip in np.asarray(normalise(jnp.asarray(video)))
        for t in range(0, 4, 2)
        for h in range(0, 16, 4)
        for w in range(0, 16, 4)
    ]
    wanted = plain_targets(np.reshape(tokens, (3, 32, 96)), 1)
    clip, losses = normalise(jnp.asarray(video)), []
    for index, (ctx_idx, tgt_idx) in enumerate(masks.values()):
        params = dict(state.params["predictor"])
        params["mask_tokens"] = params["mask_tokens"][[index, 1 - index]]
        context = setup.encoder.apply(
            {"params": state.params["encoder"]}, clip, ctx_idx
        )
        hidden, _ = setup.predictor.apply(
            {"params": params}, context, ctx_idx, tgt_idx, GRID
        )
        losses.append(np.abs(np.asarray(hidden) - take(wanted, tgt_idx)).mean())
    others = random_like(state.target, rng)
    for target in (state.target, others):
        total, metrics = setup.compiled_loss(
            state.params, target, as_batch(video), {"video": masks}, 0
        )
        # Single precision through three blocks.
        np.testing.assert_allclose(total, np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(metrics["repr/target_std"], 1, atol=0.1)


# ------------------------------------------------------------------------------ streams

IMAGE = {"whole": MaskSpec(4, 9)}
LENGTHS = {
    "video": Stream({"short": MASKS["short"]}, 3.0),
    "video_long": Stream(MASKS, 1.5),
    "image": Stream(IMAGE, 0.5, mask_indices=(2,)),
}
SHAPES = {
    "video": (4, 16, 16, 3),
    "video_long": (8, 16, 16, 3),
    "image": (1, 16, 16, 3),
}
WITH_IMAGES = {
    "encoder": SMALL | {"image_embed": True},
    "predictor": NARROW | {"image_embed": True, "num_mask_tokens": 3},
}


def test_lengths_and_images_add_up_by_their_weights(rng):
    setup = Setup(LENGTHS, LossTerms(), **WITH_IMAGES)
    state = setup.random_state(rng)
    sizes = {"video": 3, "video_long": 2, "image": 4}
    batch = {k: videos(rng, n, SHAPES[k]) for k, n in sizes.items()}
    masks = {
        name: fixed_masks(
            rng,
            sizes[name],
            stream.masks,
            math.prod(setup.encoder.grid(SHAPES[name])),
        )
        for name, stream in LENGTHS.items()
    }
    assert [math.prod(setup.encoder.grid(SHAPES[k])) for k in SHAPES] == [32, 64, 16]
    loss, metrics = setup.compiled_loss(state.params, state.target, batch, masks, 0)
    total = 0.0
    for name, stream in LENGTHS.items():
        alone = MaskedObjective(setup.encoder, setup.predictor, {name: stream})
        own, _ = jax.jit(alone.loss)(
            state.params,
            state.target,
            {name: batch[name]},
            {name: masks[name]},
            None,
            0,
        )
        np.testing.assert_allclose(metrics[f"train/loss_of_{name}"], own, rtol=1e-5)
        total += stream.weight / 5.0 * own
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    # The step accepts all of them together.
    new, _ = jax.eval_shape(setup.step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_streams_take_the_mask_tokens_that_they_name(monkeypatch, rng):
    seen = set()

    def record(predictor, _, context, ctx_idx, tgt_idx, grid, mask_index, is_image):
        seen.add((grid, ctx_idx.shape[1], mask_index, is_image))
        return jnp.zeros((*tgt_idx.shape, predictor.out_dim)), None

    setup = Setup(LENGTHS, LossTerms(), **WITH_IMAGES)
    state = setup.random_state(rng)
    monkeypatch.setattr(Predictor, "apply", record)
    batch = {k: videos(rng, 2, shape) for k, shape in SHAPES.items()}
    jax.eval_shape(setup.step, state, batch)
    assert seen == {
        ((2, 4, 4), 10, 0, False),
        ((4, 4, 4), 10, 0, False),
        ((4, 4, 4), 4, 1, False),
        ((1, 4, 4), 4, 2, True),
    }


# ------------------------------------------------------------------------------ teacher


def test_a_teacher_is_predicted_and_left_alone_while_the_target_follows(rng):
    teacher = VideoEncoder(
        1, 24, num_heads=3, mlp_dim=40, patch_size=4, scan_layers=True, levels=(0,)
    )
    streams = {"video": Stream({"long": MASKS["long"]})}
    setup = Setup(
        streams, LossTerms(), encoder=SMALL, predictor=NARROW, teacher=teacher
    )
    assert setup.predictor.out_dim == 24 and setup.encoder.out_dim == 16
    state = setup.random_state(rng)
    video = videos(rng, 4)
    clip = normalise(jnp.asarray(video))
    shapes = jax.eval_shape(teacher.init, jax.random.key(0), clip)["params"]
    frozen = random_like(shapes, rng)
    kept = copy_to_host(frozen)

    masks = fixed_masks(rng, 4, streams["video"].masks)
    grad = jax.jit(jax.grad(setup.loss_fn, argnums=(0, 1), has_aux=True))
    (online, of_teacher), metrics = grad(
        state.params, frozen, as_batch(video), {"video": masks}, 0
    )
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(of_teacher))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(online))
    ctx_idx, tgt_idx = masks["long"]
    features = plain_targets(teacher.apply({"params": frozen}, clip), 1)
    context = setup.encoder.apply({"params": state.params["encoder"]}, clip, ctx_idx)
    prediction, _ = setup.predictor.apply(
        {"params": state.params["predictor"]}, context, ctx_idx, tgt_idx, GRID
    )
    expected = np.abs(np.asarray(prediction) - take(features, tgt_idx)).mean()
    np.testing.assert_allclose(metrics["train/loss"], expected, rtol=1e-4)

    new, metrics = jax.jit(setup.step)(state, as_batch(video), frozen)
    momentum = float(setup.schedules["ema_momentum"](0))
    expected = jax.tree.map(
        lambda old, online: momentum * old + (1 - momentum) * np.asarray(online),
        state.target,
        new.params["encoder"],
    )
    chex.assert_trees_all_close(new.target, expected, rtol=1e-7, atol=1e-6)
    chex.assert_trees_all_equal(kept, frozen)
    assert jax.tree.structure(new) == jax.tree.structure(state)
