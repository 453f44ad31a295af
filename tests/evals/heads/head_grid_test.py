"""A grid of heads trains and classifies as its heads would one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import top_k_accuracy_score
from step_setup import one_device

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals.heads import head_grid
from vjepa_jax.evals.heads.head_grid import GridTraining, HeadGrid, Schedules
from vjepa_jax.models.attention import dispatch
from vjepa_jax.models.heads import AttentiveClassifier, LinearClassifier
from vjepa_jax.parallel import sharding


@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_grid_equals_heads_trained_one_by_one(rng, kind):
    """With warm-up, decay and clipping; also where some are in memory together."""
    head = LinearClassifier(5)
    if kind == "attentive":
        head = AttentiveClassifier(5, num_heads=2)
    groups = [
        Schedules((3e-3,), (0.1, 0.8)),
        Schedules((1e-2,), (0.5,), 1e-3, warmup_steps=2, final_weight_decay_share=0.1),
    ]
    steps, num_tokens = 4, 6
    batches = [
        (
            rng.normal(size=(11, num_tokens, 8)).astype(np.float32),
            rng.integers(0, 5, 11),
            np.arange(11) != rng.integers(11),
        )
        for _ in range(steps)
    ]

    def make(groups, heads_at_once=0):
        return HeadGrid(
            head,
            GridTraining(tuple(groups), steps, 0.05, heads_at_once),
            (num_tokens, 8),
            seed=3,
            mesh=sharding.make_mesh() if kind == "linear" else one_device(),
        )

    at_once = make(groups)
    grids = [at_once] + [make(groups, heads_at_once=2)] * (kind == "linear")
    initial = jax.tree.map(np.array, at_once.state[0])
    for batch in batches:
        for grid in grids:
            grid.update(*batch)

    adam = optax.scale_by_adam()

    def loss_fn(params, tokens, labels, weights):
        logits = head.apply({"params": params}, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (each * weights).sum() / jnp.maximum(weights.sum(), 1)

    @jax.jit
    def reference(params, moments, batch, rate, decay):
        gradient = jax.grad(loss_fn)(params, *batch)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1, 0.05 / norm), gradient)
        change, moments = adam.update(gradient, moments)
        params = jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, change)
        return params, moments

    def learning_rate(peak, start, warmup, step):
        step += 1
        if step < warmup:
            return start + step / warmup * (peak - start)
        return peak * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))

    plans = [(r, d, 0, 0, 1) for r in (3e-3,) for d in (0.1, 0.8)]
    plans.append((1e-2, 0.5, 1e-3, 2, 0.1))
    assert at_once.heads == [plan[:2] for plan in plans]
    for number, (peak, decay, start, warmup, share) in enumerate(plans):
        params = jax.tree.map(lambda x, i=number: x[i], initial)
        moments = jax.jit(adam.init)(params)
        for step, batch in enumerate(batches):
            rate = learning_rate(peak, start, warmup, step)
            cosine = 0.5 * (1 + np.cos(np.pi * (step + 1) / steps))
            decayed = decay * (share + (1 - share) * cosine)
            params, moments = reference(params, moments, batch, rate, decayed)
        for grid in grids:
            trained = jax.device_get(grid.state[0])
            trained = jax.tree.map(lambda x, i=number: x[i], trained)
            jax.tree.map(
                # Adam divides small gradients by their size: rounding grows.
                lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
                trained,
                params,
            )


def test_labels_may_be_shares_of_classes(rng):
    """One-hot shares teach what the classes do, and all others something else."""
    tokens = rng.normal(size=(16, 1, 8)).astype(np.float32)
    labels = rng.integers(0, 4, 16)
    one_hot = np.eye(4, dtype=np.float32)[labels]
    trained = []
    for targets, loss in (
        (labels, optax.softmax_cross_entropy_with_integer_labels),
        (one_hot, optax.softmax_cross_entropy),
        ((1 - one_hot) / 3, optax.softmax_cross_entropy),
    ):
        grid = HeadGrid(
            LinearClassifier(4),
            GridTraining((Schedules((1e-2,), (0.1,)),), 3, loss_fn=loss),
            (1, 8),
            seed=0,
            mesh=sharding.make_mesh(),
        )
        for _ in range(3):
            grid.update(tokens, targets, np.ones(16))
        trained.append(np.asarray(grid.state[0]["linear"]["kernel"]))
    np.testing.assert_allclose(trained[1], trained[0], atol=1e-5)
    assert np.abs(trained[2] - trained[0]).max() > 1e-3


def test_losses_of_which_none_is_finite_are_refused(rng):
    training = GridTraining((Schedules((1e-2, np.inf), (0.1,)),), total_steps=4)
    grid = HeadGrid(
        LinearClassifier(4), training, (1, 8), seed=0, mesh=sharding.make_mesh()
    )
    tokens = rng.normal(size=(16, 1, 8)).astype(np.float32)
    batch = tokens, rng.integers(0, 4, 16), np.ones(16)
    grid.fit([batch] * 2, steps_per_epoch=2)
    losses = np.asarray(grid.update(*batch))
    assert np.isfinite(losses).tolist() == [True, False]
    with pytest.raises(UserError, match=r"lower .* config\.grids\.\*\.learning_rates"):
        grid.fit([(tokens * np.nan, *batch[1:])], steps_per_epoch=1)


class TwoOutputs(nn.Module):
    """A head with logits of two names."""

    @nn.compact
    def __call__(self, tokens):
        pooled = tokens.mean(1)
        return {"one": nn.Dense(3)(pooled), "other": nn.Dense(7)(pooled)}


@pytest.mark.parametrize("heads_at_once", [0, 1])
def test_a_head_may_have_several_outputs_and_a_loss_of_its_own(rng, heads_at_once):
    head = TwoOutputs()
    tokens = rng.normal(size=(11, 6, 8)).astype(np.float32)
    labels, weights = rng.integers(0, 3, 11), np.arange(11) % 3 > 0
    seen = []

    def loss(logits, labels):
        seen.append({name: x.shape for name, x in logits.items()})
        first = optax.softmax_cross_entropy_with_integer_labels(logits["one"], labels)
        return first + jnp.square(logits["other"]).sum(-1)

    grid = HeadGrid(
        head,
        GridTraining(
            (Schedules((1e-2,), (0.1, 0.3)),),
            total_steps=9,
            heads_at_once=heads_at_once,
            loss_fn=loss,
        ),
        (6, 8),
        seed=0,
        mesh=sharding.make_mesh(),
    )
    for number, found in enumerate(grid.classify(tokens[:, None], 5).items()):
        name, best = found
        params = jax.tree.map(lambda x: x[1], jax.device_get(grid.state[0]))
        logits = np.asarray(head.apply({"params": params}, tokens)[name])
        assert best.shape == (2, 11, (3, 5)[number])
        np.testing.assert_array_equal(best[1], np.argsort(-logits)[:, :5])
    params = jax.tree.map(lambda x: x[0], jax.device_get(grid.state[0]))
    each = loss(head.apply({"params": params}, tokens), labels)
    losses = grid.update(tokens, labels, weights)
    assert losses.shape == (2,) and seen[-1] == {"one": (16, 3), "other": (16, 7)}
    np.testing.assert_allclose(losses[0], np.asarray(each)[weights].mean(), rtol=1e-4)


def test_heads_start_differently():
    grid = HeadGrid(
        LinearClassifier(4),
        GridTraining((Schedules((1e-3,), (0.0, 0.0)),), total_steps=1),
        (2, 8),
        seed=0,
        mesh=sharding.make_mesh(),
    )
    kernel = np.asarray(grid.state[0]["linear"]["kernel"])
    assert (kernel[0] != kernel[1]).mean() > 0.9


def test_head_computes_the_same_in_other_ways(rng):
    """In bfloat16 but for rounding, and with blocks computed anew in the backward."""
    tokens = rng.normal(size=(2, 6, 16)).astype(np.float32)
    head = AttentiveClassifier(5, num_heads=2, depth=2)
    params = nn.unbox(jax.jit(head.init)(jax.random.key(0), tokens))
    params = jax.device_get(params)
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), params
    )

    def of(head):
        def total(params):
            logits = head.apply(params, tokens)
            return jnp.square(logits).sum(), logits

        return jax.jit(jax.grad(total, has_aux=True))(params)

    gradient, logits = of(head)
    again, same = of(head.clone(remat="full"))
    np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        again,
        gradient,
    )
    rounded = jax.jit(head.clone(dtype="bfloat16").apply)(params, tokens)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - logits).max() / np.abs(logits).max()
    assert 1e-5 < error < 0.05


def test_long_clips_are_attended_to_without_all_scores_in_memory(rng, monkeypatch):
    """On every device its share of the batch, and as the plain way computes it."""
    head = AttentiveClassifier(5, num_heads=2, depth=2)
    mesh, shape = sharding.make_mesh(), (1700, 8)  # three blocks of queries
    tokens = rng.normal(size=(mesh.size, *shape)).astype(np.float32)
    labels, weights = rng.integers(0, 5, mesh.size), np.ones(mesh.size, np.float32)

    def compiled():
        """Return a grid, a batch on its devices and the compiled update."""
        grid = HeadGrid(
            head,
            GridTraining((Schedules((1e-3, 1e-2), (0.1,)),), total_steps=1),
            shape,
            seed=1,
            mesh=mesh,
        )
        batch = grid._place(tokens, labels, weights)
        with sharding.use(mesh):
            lowered = grid._compiled.update.lower(grid.state, *batch)
        return grid, batch, lowered.compile()

    grid, batch, update = compiled()
    params = jax.tree.map(lambda x: x[0], jax.device_get(grid.state[0]))
    found = grid.classify(tokens[:, None], num_best=5)
    _, losses = update(grid.state, *batch)

    monkeypatch.setattr(dispatch, "choose", lambda *_: "xla")
    head_grid._make_functions.cache_clear()
    plain_bytes = compiled()[2].memory_analysis().temp_size_in_bytes
    assert update.memory_analysis().temp_size_in_bytes < plain_bytes / 3
    logits = np.asarray(jax.jit(head.apply)({"params": params}, tokens))
    np.testing.assert_array_equal(found[0], np.argsort(-logits))
    wanted = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(losses[0], wanted, rtol=1e-4)


def test_softmax_is_averaged_over_views(rng):
    head = LinearClassifier(7)
    mesh = sharding.make_mesh()
    training = GridTraining((Schedules((1e-3, 1e-2), (0.1,)),), total_steps=1)
    grid = HeadGrid(head, training, (5, 8), seed=1, mesh=mesh)
    # Far apart, so that a mean of softmax and one of logits do not agree.
    tokens = rng.normal(0, 60, (59, 3, 5, 8)).astype(np.float32)
    found = grid.classify(tokens, num_best=3)
    for number in range(2):
        params = jax.tree.map(lambda x, i=number: x[i], grid.state[0])
        logits = np.asarray(head.apply({"params": params}, tokens.reshape(-1, 5, 8)))
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = (shares / shares.sum(-1, keepdims=True)).reshape(59, 3, 7).mean(1)
        np.testing.assert_array_equal(found[number], np.argsort(-shares)[:, :3])
        labels = rng.integers(0, 7, 59)
        top = (found[number] == labels[:, None]).any(1).mean()
        assert top == pytest.approx(
            top_k_accuracy_score(labels, shares, k=3, labels=np.arange(7))
        )
