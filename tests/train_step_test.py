"""One step computes the same on any mesh, moves the target by EMA alone, and learns."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import video_files

from vjepa_jax import losses, optim, sharding, train_step
from vjepa_jax.masking import MaskSpec
from vjepa_jax.models.encoder import VideoEncoder, take_tokens
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.train_state import make_init
from vjepa_jax.train_step import Objective, Stream, make_loss_fn, make_train_step

BATCH = 16
SHAPE = (4, 16, 16, 3)  # a grid of 2 x 4 x 4 tokens
MASKS = {
    "short": MaskSpec(10, 12, num_blocks=3, spatial_scale=(0.2, 0.2)),
    "long": MaskSpec(4, 18, num_blocks=1, spatial_scale=(0.7, 0.7)),
}
STREAMS = {"video": Stream(MASKS)}


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"numpy seed {seed}")  # shown where a test fails
    return np.random.default_rng(seed)


def make_models(scan_layers=False, mask_tokens=2):
    kwargs = {"num_heads": 2, "scan_layers": scan_layers}
    encoder = VideoEncoder(2, 32, mlp_dim=64, patch_size=4, **kwargs)
    predictor = Predictor(
        2, 16, mlp_dim=32, out_dim=32, num_mask_tokens=mask_tokens, **kwargs
    )
    return encoder, predictor


def make_schedules(rate=1e-2):
    return {
        "learning_rate": optim.warmup_cosine(rate / 10, rate, 0.0, 2, 200),
        "weight_decay": optim.cosine(0.04, 0.4, 200),
        "ema_momentum": optim.linear(0.9, 1.0, 50),
    }


class Setup:
    """A model with its state and step function, as the training script builds them."""

    def __init__(
        self,
        scan_layers=False,
        accumulate_steps=1,
        streams=STREAMS,
        objective=Objective(),  # noqa: B008  frozen
        rate=1e-2,
        eps=1e-3,
    ):
        self.encoder, self.predictor = make_models(scan_layers)
        self.schedules = make_schedules(rate)
        # A large epsilon: Adam divides gradients that are zero but for rounding (those
        # of the keys' biases) by their own size, and would make them large.
        self.tx = optim.make_optimizer(
            self.schedules["learning_rate"], self.schedules["weight_decay"], eps=eps
        )
        self.init = make_init(self.encoder, self.predictor, self.tx, SHAPE)
        self.step = make_train_step(
            self.encoder,
            self.predictor,
            self.tx,
            self.schedules,
            streams,
            objective,
            seed=5,
            accumulate_steps=accumulate_steps,
        )

    def new_state(self, seed=0):
        return nn.unbox(jax.jit(self.init)(jax.random.key(seed)))


def videos(rng, batch=BATCH, shape=SHAPE):
    return rng.integers(0, 256, (batch, *shape), dtype=np.uint8)


def as_batch(video):
    return {"video": {"video": video}}


def one_device():
    return jax.make_mesh(
        (1, 1),
        ("data", "fsdp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )


def run_on(mesh, clips, **kwargs):
    """Make len(clips) updates; return the losses and the final state as NumPy."""
    setup = Setup(**kwargs)
    shardings = sharding.state_shardings(setup.init, mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        state = nn.unbox(
            jax.jit(setup.init, out_shardings=shardings)(jax.random.key(0))
        )
        step = jax.jit(
            setup.step,
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        values = []
        for video in clips:
            state, metrics = step(state, sharding.shard_batch(as_batch(video), mesh))
            values.append(float(metrics["train/loss"]))
    return values, jax.device_get(state)


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng()
    return [videos(rng) for _ in range(3)]


@pytest.fixture(scope="module")
def reference(clips):
    return run_on(one_device(), clips)


@pytest.mark.parametrize(
    ("mesh", "accumulate_steps", "scan_layers"),
    [
        ((1, 1), 2, True),
        ((4, 2), 1, True),
        ((4, 2), 2, False),
        ((8, 1), 1, False),
        ((8, 1), 2, True),
    ],
)
def test_mesh_accumulation_and_scan_do_not_change_the_run(
    mesh, accumulate_steps, scan_layers, clips, reference
):
    mesh = one_device() if mesh == (1, 1) else sharding.make_mesh(*mesh)
    values, state = run_on(
        mesh, clips, accumulate_steps=accumulate_steps, scan_layers=scan_layers
    )
    # Single precision sums in another order; three updates hardly amplify that.
    np.testing.assert_allclose(values, reference[0], rtol=1e-5)
    for path, (ours, theirs) in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        zip(
            jax.tree.leaves((state.params, state.target)),
            jax.tree.leaves((reference[1].params, reference[1].target)),
            strict=True,
        ),
        strict=False,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=str(path[0]))
    # The updates were far larger than what the comparison lets pass.
    start = Setup(scan_layers=scan_layers).new_state()
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), jax.device_get(start.params), state.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert int(state.step) == len(clips)


def test_target_is_the_moving_average_of_the_encoder(rng):
    setup = Setup()
    state = setup.new_state()
    step = jax.jit(setup.step)
    start = jax.device_get(state.params["encoder"])
    for leaf, copy in zip(
        jax.tree.leaves(start), jax.tree.leaves(state.target), strict=True
    ):
        np.testing.assert_array_equal(leaf, copy)
    history, momenta = [], []
    for k in range(4):
        state, metrics = step(state, as_batch(videos(rng)))
        history.append(jax.device_get(state.params["encoder"]))
        momenta.append(0.9 + 0.1 * k / 50)
        np.testing.assert_allclose(metrics["optim/ema_momentum"], momenta[-1], 1e-6)
    # sum_i (1 - m_i) prod_{j > i} m_j theta_i, the start having the rest of the weight.
    later = np.cumprod([1.0, *momenta[::-1]])[::-1]
    weights = [later[0], *((1 - np.array(momenta)) * later[1:])]
    np.testing.assert_allclose(sum(weights), 1.0)

    def average(*leaves):
        return sum(
            w * x.astype(np.float64) for w, x in zip(weights, leaves, strict=True)
        )

    expected = jax.tree.map(average, start, *history)
    for a, b in zip(
        jax.tree.leaves(state.target), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)  # four single-precision sums
    moved = np.abs(
        state.target["embed"]["proj"]["kernel"] - start["embed"]["proj"]["kernel"]
    )
    assert moved.max() > 1e-4


def fixed_masks(rng, batch, specs=MASKS, num_tokens=32):
    """Draw arbitrary disjoint index sets of the sizes that `specs` asks for."""
    out = {}
    for name, spec in specs.items():
        order = np.stack([rng.permutation(num_tokens) for _ in range(batch)])
        context = np.sort(order[:, : spec.num_context], -1)
        target = np.sort(order[:, spec.num_context :][:, : spec.num_target], -1)
        out[name] = (jnp.asarray(context), jnp.asarray(target))
    return out


def perturbed(state, rng):
    """Return the state with target and encoder apart, mask tokens other than zero."""

    def shift(tree):
        return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape), tree)

    return state.replace(params=shift(state.params), target=shift(state.target))


def test_loss_is_the_mean_over_masks_of_the_error_at_hidden_tokens(rng):
    setup = Setup()
    state = perturbed(setup.new_state(), rng)
    video = videos(rng, 3)
    masks = fixed_masks(rng, 3)
    loss_fn = make_loss_fn(setup.encoder, setup.predictor, STREAMS, Objective())
    loss, metrics = loss_fn(
        state.params, state.target, as_batch(video), {"video": masks}
    )
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    clip = jnp.asarray((video / 255 - mean) / std, jnp.float32)
    features = np.asarray(setup.encoder.apply({"params": state.target}, clip), float)
    spread = features.var(-1, keepdims=True)
    features = (features - features.mean(-1, keepdims=True)) / np.sqrt(spread + 1e-5)
    terms = []
    for index, (name, (ctx_idx, tgt_idx)) in enumerate(masks.items()):
        context = setup.encoder.apply(
            {"params": state.params["encoder"]}, clip, ctx_idx
        )
        prediction = setup.predictor.apply(
            {"params": state.params["predictor"]},
            context,
            ctx_idx,
            tgt_idx,
            (2, 4, 4),
            mask_index=index,
        )
        rows = np.arange(3)[:, None]
        terms.append(np.abs(np.asarray(prediction) - features[rows, tgt_idx]).mean())
        # Tolerances: single precision through five blocks.
        np.testing.assert_allclose(metrics[f"train/loss_{name}"], terms[-1], rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], np.mean(terms), rtol=1e-5)


def test_regularisers_enter_the_loss_with_their_weights(rng):
    setup = Setup()
    state = perturbed(setup.new_state(), rng)
    batch, masks = as_batch(videos(rng, 3)), {"video": fixed_masks(rng, 3)}
    apply = functools.partial(make_loss_fn, setup.encoder, setup.predictor, STREAMS)
    objective = Objective(variance_weight=0.7, covariance_weight=0.3)
    loss, metrics = apply(objective)(state.params, state.target, batch, masks)
    clip = train_step.normalise(batch["video"]["video"])
    terms = [
        losses.variance_covariance(
            setup.encoder.apply({"params": state.params["encoder"]}, clip, ctx_idx)
        )
        for ctx_idx, _ in masks["video"].values()
    ]
    variance, covariance = np.mean(terms, axis=0)
    expected = metrics["train/loss"] + 0.7 * variance + 0.3 * covariance
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_there_is_no_gradient_to_the_target(rng):
    setup = Setup()
    state = perturbed(setup.new_state(), rng)
    batch, masks = as_batch(videos(rng, 3)), {"video": fixed_masks(rng, 3)}
    loss_fn = make_loss_fn(
        setup.encoder,
        setup.predictor,
        STREAMS,
        Objective(variance_weight=1.0, covariance_weight=1.0),
    )
    grad = jax.grad(lambda *args: loss_fn(*args, batch, masks)[0], argnums=(0, 1))
    online, target = grad(state.params, state.target)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(target))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(online))


def test_five_steps_compile_once_and_give_the_state_away(rng):
    setup = Setup()
    state = setup.new_state()
    step = jax.jit(setup.step, donate_argnums=0)
    with warnings.catch_warnings():
        # JAX warns of donated buffers that it cannot reuse.
        warnings.filterwarnings("error", message=".*donated.*")
        for _ in range(5):
            old = jax.tree.leaves(state)
            state, _ = step(state, as_batch(videos(rng)))
            assert all(leaf.is_deleted() for leaf in old)
    assert step._cache_size() == 1


def test_masks_depend_on_seed_and_step_and_share_their_box_shape(monkeypatch, rng):
    seen = []
    sample = train_step.masking.sample

    def record(key, shape_key, *args):
        seen.append([jax.random.key_data(k).tolist() for k in (key, shape_key)])
        return sample(key, shape_key, *args)

    monkeypatch.setattr(train_step.masking, "sample", record)
    encoder, _ = make_models()
    batch = as_batch(videos(rng, 2))
    draw = functools.partial(train_step._sample_masks, streams=STREAMS, encoder=encoder)
    for step in (0, 1, 0):
        draw(jax.random.fold_in(jax.random.key(5), step), batch)
    (short, long), (later, _), (again, _) = zip(seen[::2], seen[1::2], strict=True)
    assert short[1] == long[1] and short[0] != long[0]
    assert later[0] != short[0] and later[1] != short[1]
    assert again == short


def test_streams_of_two_shapes_add_up_by_their_weights(rng):
    encoder, predictor = make_models()
    image = {"short": MaskSpec(5, 6), "long": MaskSpec(3, 9)}
    streams = {"video": Stream(MASKS, 3.0), "image": Stream(image, 1.0)}
    setup = Setup(streams=streams)
    state = perturbed(setup.new_state(), rng)
    batch = {
        "video": {"video": videos(rng, 4)},
        "image": {"video": videos(rng, 6, (2, 16, 16, 3))},
    }
    masks = {
        "video": fixed_masks(rng, 4),
        "image": fixed_masks(rng, 6, image, num_tokens=16),
    }

    def loss_and_grad(chosen):
        loss_fn = make_loss_fn(encoder, predictor, chosen, Objective())
        return jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.target, batch, masks
        )

    (both, metrics), grads = loss_and_grad(streams)
    parts = [loss_and_grad({name: stream}) for name, stream in streams.items()]
    ((video, _), of_video), ((picture, _), of_picture) = parts
    np.testing.assert_allclose(both, 0.75 * video + 0.25 * picture, rtol=1e-5)
    np.testing.assert_allclose(metrics["train/loss"], both, rtol=1e-5)
    for a, b, c in zip(
        *map(jax.tree.leaves, (grads, of_video, of_picture)), strict=True
    ):
        np.testing.assert_allclose(a, 0.75 * b + 0.25 * c, atol=1e-6)
    state, metrics = jax.jit(setup.step)(state, batch)
    assert int(state.step) == 1 and np.isfinite(metrics["train/loss"])


def test_a_tiny_run_learns_a_batch_without_collapse():
    """Seeded: whether a run of 80 steps gets below a number is not a property."""
    clips = np.stack(
        [video_files.moving_frames(4, 16, 16, seed=i) for i in range(BATCH)]
    )
    objective = Objective(variance_weight=0.1, covariance_weight=0.01)
    setup = Setup(objective=objective, rate=3e-3, eps=1e-8)
    state = setup.new_state()
    step = jax.jit(setup.step, donate_argnums=0)
    history = []
    for _ in range(80):
        state, metrics = step(state, as_batch(clips))
        history.append({k: float(v) for k, v in metrics.items()})
    first = np.mean([row["train/loss"] for row in history[:5]])
    last = np.mean([row["train/loss"] for row in history[-5:]])
    print(first, last, history[0], history[-1])
    # Targets have unit variance: predicting zero costs about 0.8.
    assert last < 0.75 * first
    assert history[-1]["repr/target_std"] > 0.3
    assert history[-1]["repr/target_effective_rank"] > 3


def test_gathered_tokens_are_those_of_the_indices(rng):
    x = rng.normal(size=(3, 7, 2)).astype(np.float32)
    idx = np.stack([rng.permutation(7)[:4] for _ in range(3)])
    expected = np.stack([row[i] for row, i in zip(x, idx, strict=True)])
    np.testing.assert_array_equal(take_tokens(jnp.asarray(x), idx), expected)
