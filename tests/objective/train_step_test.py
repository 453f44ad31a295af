"""One step computes the same on any mesh, moves the target by EMA alone, and learns."""

import dataclasses
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_files
from step_setup import (
    MASKS,
    STEPS,
    Setup,
    as_batch,
    copy_to_host,
    fixed_masks,
    one_device,
    videos,
)

from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses, masked
from vjepa_jax.objective.masked import LossTerms, Stream
from vjepa_jax.objective.masking import MaskSpec
from vjepa_jax.objective.state import TrainState
from vjepa_jax.parallel import sharding

BATCH = 16


@pytest.fixture(scope="module")
def setup():
    return Setup()


class Run(NamedTuple):
    losses: list[float]
    state: TrainState  # NumPy arrays
    donated: list[bool]  # whether a step's old state was deleted


def run_on(mesh, clips, **kwargs):
    """Make len(clips) updates by one trace of the step, as the training loop does."""
    # A large epsilon: gradients of the keys' biases are zero except for rounding. Adam
    # divides them by their own size, which would make them large.
    #
    # Plain objective: the regularisers are not linear in the samples, so accumulation
    # changes them.
    streams = {"video": Stream({"short": MASKS["short"]})}
    setup = Setup(streams, LossTerms(), eps=1e-3, **kwargs)
    shardings = sharding.state_shardings(setup.init, mesh)
    chex.clear_trace_counter()  # it counts by the function's name
    with sharding.use(mesh):
        state = jax.device_put(setup.initial_state, shardings)
        step = jax.jit(
            chex.assert_max_traces(setup.step, n=1),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        values, donated = [], []
        for video in clips:
            old = jax.tree.leaves(state)
            state, metrics = step(state, sharding.shard_batch(as_batch(video), mesh))
            values.append(float(metrics["train/loss"]))
            donated.append(all(leaf.is_deleted() for leaf in old))
    return Run(values, copy_to_host(state), donated)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng()
    return [videos(rng, BATCH) for _ in range(5)]


@pytest.fixture(scope="module")
def reference(clips):
    return run_on(one_device(), clips)


@pytest.mark.parametrize(
    ("mesh", "accumulate_steps", "scan_layers", "remat"),
    [
        ((2, 4), 1, True, "full"),
        ((4, 2), 2, False, "dots"),
        ((8, 1), 2, True, "attention"),
        ((8, 1), 1, False, "dots_no_batch"),
    ],
)
def test_mesh_accumulation_scan_and_remat_do_not_change_the_run(
    mesh, accumulate_steps, scan_layers, remat, setup, clips, reference
):
    run = run_on(
        sharding.make_mesh(*mesh),
        clips,
        accumulate_steps=accumulate_steps,
        scan_layers=scan_layers,
        encoder={"remat": remat},
        predictor={"remat": remat},
    )
    state = run.state
    # Single precision sums in another order; five updates hardly amplify that.
    np.testing.assert_allclose(run.losses, reference.losses, rtol=1e-5)
    assert int(state.step) == len(clips)
    moved = []
    for (path, ours), theirs, start in zip(
        jax.tree_util.tree_leaves_with_path((state.params, state.target)),
        jax.tree.leaves((reference.state.params, reference.state.target)),
        jax.tree.leaves((setup.initial_state.params, setup.initial_state.target)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
        moved.append(np.abs(ours - start).max())
    # The updates were far larger than the tolerance.
    assert np.median(moved) > 1e-4


def test_target_is_the_moving_average_of_the_encoder(setup, rng):
    start = setup.initial_state.params["encoder"]
    chex.assert_trees_all_equal(start, setup.initial_state.target)
    state, history, momenta = setup.initial_state, [], []
    for k in range(4):
        state, metrics = setup.compiled_step(state, as_batch(videos(rng, BATCH)))
        history.append(copy_to_host(state.params["encoder"]))
        momenta.append(0.99 + 0.01 * k / STEPS)
        np.testing.assert_allclose(metrics["optim/ema_momentum"], momenta[-1], 1e-6)
    # sum_i (1 - m_i) prod_{j > i} m_j theta_i; the start has the remaining weight.
    later = np.cumprod([1.0, *momenta[::-1]])[::-1]
    weights = [later[0], *((1 - np.array(momenta)) * later[1:])]
    np.testing.assert_allclose(sum(weights), 1.0)

    def average(*leaves):
        terms = zip(weights, leaves, strict=True)
        return sum(w * x.astype(np.float64) for w, x in terms)

    expected = jax.tree.map(average, start, *history)
    for a, b, c in zip(
        *map(jax.tree.leaves, (state.target, expected, start)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)  # four single-precision sums
        assert np.abs(a - c).max() > 1e-5


def perturbed(state, rng):
    """Return the state with other targets and with mask tokens other than zero."""

    def shift(tree):
        def shifted(x):
            return x + rng.normal(0, 0.05, x.shape).astype(np.float32)

        return jax.tree.map(shifted, tree)

    return state.replace(params=shift(state.params), target=shift(state.target))


def test_loss_is_the_mean_over_masks_of_the_error_at_hidden_tokens(setup, rng):
    state = perturbed(setup.initial_state, rng)
    video = videos(rng, 3)
    masks = fixed_masks(rng, 3)
    loss, metrics = setup.compiled_loss(
        state.params, state.target, as_batch(video), {"video": masks}, 0
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    clip = jnp.asarray((video / 255 - mean) / std, jnp.float32)
    encode = jax.jit(setup.encoder.apply)
    predict = jax.jit(setup.predictor.apply, static_argnums=4)
    features = np.asarray(encode({"params": state.target}, clip), float)
    spread = features.var(-1, keepdims=True)
    features = (features - features.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)
    terms, regularisers = [], []
    for index, (name, (ctx_idx, tgt_idx)) in enumerate(masks.items()):
        context = encode({"params": state.params["encoder"]}, clip, ctx_idx)
        # Each mask type has its token: the first stands for all of them in `predict`.
        params = dict(state.params["predictor"])
        params["mask_tokens"] = params["mask_tokens"][[index, 1 - index]]
        prediction, _ = predict(
            {"params": params}, context, ctx_idx, tgt_idx, (2, 4, 4)
        )
        wanted = np.take_along_axis(features, np.asarray(tgt_idx)[..., None], 1)
        terms.append(np.abs(np.asarray(prediction) - wanted).mean())
        regularisers.append(losses.variance_covariance(context))
        # Tolerances: single precision through three blocks.
        np.testing.assert_allclose(metrics[f"train/loss_{name}"], terms[-1], rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], np.mean(terms), rtol=1e-5)
    variance, covariance = np.mean(regularisers, axis=0)
    expected = np.mean(terms) + 0.1 * variance + 0.01 * covariance
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert variance > 0 and covariance > 0


def test_there_is_no_gradient_to_the_target(setup, rng):
    state = perturbed(setup.initial_state, rng)
    batch, masks = as_batch(videos(rng, 3)), {"video": fixed_masks(rng, 3)}
    grad = jax.jit(jax.grad(setup.loss_fn, argnums=(0, 1), has_aux=True))
    (online, target), _ = grad(state.params, state.target, batch, masks, 0)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(target))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(online))


def test_steps_donate_the_state(reference):
    # The first step gets arrays of the host.
    assert all(reference.donated[1:])


def test_masks_depend_on_seed_and_step_and_share_their_box_shape(
    setup, monkeypatch, rng
):
    seen = []

    def record(key, shape_key, *_):
        seen.append([jax.random.key_data(k).tolist() for k in (key, shape_key)])

    monkeypatch.setattr(masked.masking, "sample", record)
    batch = as_batch(videos(rng, 2))
    for step in (0, 1, 0):
        key = jax.random.fold_in(jax.random.key(5), step)
        setup.objective.sample(key, batch)
    (short, long), (later, _), (again, _) = zip(seen[::2], seen[1::2], strict=True)
    assert short[1] == long[1] and short[0] != long[0]
    assert later[0] != short[0] and later[1] != short[1]
    assert again == short


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_mask_types_keep_their_mask_tokens(accumulate_steps, monkeypatch, rng):
    """JAX sorts dictionaries by name, which must not change the tokens."""
    seen = set()

    def record(predictor, _, context, ctx_idx, tgt_idx, grid, mask_index, is_image):
        seen.add((ctx_idx.shape[1], mask_index))
        return jnp.zeros((*tgt_idx.shape, predictor.out_dim)), None

    setup = Setup(accumulate_steps=accumulate_steps)
    state = jax.eval_shape(setup.init, jax.random.key(0))
    monkeypatch.setattr(Predictor, "apply", record)
    jax.eval_shape(setup.step, nn.unbox(state), as_batch(videos(rng, 4)))
    expected = enumerate(MASKS.values())
    assert seen == {(spec.num_context, index) for index, spec in expected}


def test_streams_of_two_shapes_add_up_by_their_weights(setup, rng):
    image = {"short": MaskSpec(5, 6), "long": MaskSpec(3, 9)}
    streams = {"video": Stream(MASKS, 3.0), "image": Stream(image, 1.0)}
    both, pictures = Setup(streams), Setup({"image": Stream(image)})
    state = perturbed(setup.initial_state, rng)
    batch = {
        "video": videos(rng, 3),
        "image": videos(rng, 6, (2, 16, 16, 3)),
    }
    masks = {
        "video": fixed_masks(rng, 3),
        "image": fixed_masks(rng, 6, image, num_tokens=16),
    }

    def loss_of(setup, *names):
        part = [{name: tree[name] for name in names} for tree in (batch, masks)]
        return setup.compiled_loss(state.params, state.target, *part, 0)

    loss, metrics = loss_of(both, "video", "image")
    (of_video, video), (of_image, picture) = (
        loss_of(setup, "video"),
        loss_of(pictures, "image"),
    )
    np.testing.assert_allclose(loss, 0.75 * of_video + 0.25 * of_image, rtol=1e-5)
    for name, own in (("video", video), ("image", picture)):
        reported = metrics.pop(f"train/loss_of_{name}")
        np.testing.assert_allclose(reported, own["train/loss"], rtol=1e-5)
    for name, value in metrics.items():
        shares = 0.75 * video[name] + 0.25 * picture[name]
        np.testing.assert_allclose(value, shares, rtol=1e-4, err_msg=name)
    # The step accepts such a batch and keeps the state's structure.
    new, _ = jax.eval_shape(both.step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_a_tiny_run_learns_a_batch_without_collapse(setup):
    """Nothing here is random, since the bound is no general property."""
    clips = np.stack(
        [video_files.moving_frames(4, 16, 16, seed=i) for i in range(BATCH)]
    )
    state, history = setup.initial_state, []
    for _ in range(STEPS):
        state, metrics = setup.compiled_step(state, as_batch(clips))
        history.append({k: float(v) for k, v in metrics.items()})
    first, last = (
        np.mean([row["train/loss"] for row in rows])
        for rows in (history[:5], history[-5:])
    )
    # Predicting zero costs about 0.8, as targets have unit variance; a run without
    # gradients stays there, to 0.01. Targets move, so it cannot become much lower.
    assert last < 0.93 * first
    assert history[-1]["repr/target_std"] > 0.3
    assert history[-1]["repr/target_effective_rank"] > 3


@pytest.mark.parametrize("target_dtype", ["int8", "float8_e4m3fn"])
def test_a_target_in_8_bits_changes_the_loss_little(setup, target_dtype, rng):
    state, video = setup.random_state(rng), videos(rng, 4)
    masks = {"video": fixed_masks(rng, 4)}
    args = state.params, state.target, as_batch(video), masks
    exact, _ = setup.compiled_loss(*args, 0)
    rounded = dataclasses.replace(setup.objective, target_dtype=target_dtype)
    loss, _ = jax.jit(rounded.loss)(*args, None, 0)
    assert 0 < abs(float(loss) / float(exact) - 1) < 0.02
