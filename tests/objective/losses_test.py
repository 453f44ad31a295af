"""Losses and statistics against plain double-precision NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vjepa_jax.objective import losses


def normal(rng, *shape):
    """Return the same normal numbers as fp64 for NumPy and as fp32 for JAX."""
    x = rng.normal(size=shape).astype(np.float32)
    return x.astype(np.float64), jnp.asarray(x)


def test_target_is_normalised_over_channels_in_single_precision(rng):
    x, x_jax = normal(rng, 3, 5, 64)
    scale, shift = 10.0 ** rng.uniform(-1, 2, (3, 5, 1)), rng.normal(size=(3, 5, 1))
    h = (x * scale + shift).astype(np.float32).astype(np.float64)
    h[0, 0] = 3.0  # a token without any spread stays finite
    expected = (h - h.mean(-1, keepdims=True)) / np.sqrt(
        h.var(-1, keepdims=True) + 1e-5
    )
    actual = losses.normalise_target(jnp.asarray(h, jnp.float32))
    # Single precision, cancelling a mean that may be tens of times the spread.
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    half = losses.normalise_target(x_jax.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    rounded = np.asarray(x_jax.astype(jnp.bfloat16), np.float64)
    expected = (rounded - rounded.mean(-1, keepdims=True)) / np.sqrt(
        rounded.var(-1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(half, expected, atol=1e-5)


def test_every_level_of_a_target_is_normalised_by_itself(rng):
    h, h_jax = normal(rng, 2, 5, 36)
    scale = np.repeat([0.1, 3.0, 50.0], 12)
    h, h_jax = h * scale + 2, h_jax * jnp.asarray(scale, jnp.float32) + 2
    levels = []
    for part in np.split(h, 3, axis=-1):
        spread = np.sqrt(part.var(-1, keepdims=True) + 1e-5)
        levels.append((part - part.mean(-1, keepdims=True)) / spread)
    actual = losses.normalise_target(h_jax, num_levels=3)
    # Single precision around a mean of twenty times the smallest spread.
    np.testing.assert_allclose(actual, np.concatenate(levels, -1), atol=1e-4)
    together = losses.normalise_target(h_jax)
    assert np.abs(np.asarray(together) - np.asarray(actual)).max() > 0.5


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_weights_multiply_tokens_and_do_not_divide_the_mean(exponent, rng):
    (a, a_jax), (b, b_jax) = normal(rng, 2, 7, 16), normal(rng, 2, 7, 16)
    weights = rng.uniform(0.1, 3, (2, 7))
    total = 0.0
    for sample, token, channel in np.ndindex(a.shape):
        error = abs(a[sample, token, channel] - b[sample, token, channel])
        total += weights[sample, token] * error**exponent / exponent
    weights = jnp.asarray(weights, jnp.float32)
    actual = losses.regression(a_jax, b_jax, exponent, weights)
    np.testing.assert_allclose(actual, total / a.size, rtol=1e-5)


def test_distances_are_those_to_the_nearest_predicted_token(rng):
    grid, num_tokens = (3, 4, 5), 60
    order = np.stack([rng.permutation(num_tokens) for _ in range(3)])
    context, target = order[:, :9], order[:, 9:15]
    actual = losses.distance_to_targets(jnp.asarray(context), jnp.asarray(target), grid)
    assert actual.dtype == jnp.float32
    for b in range(3):
        for i, seen in enumerate(context[b]):
            place = np.unravel_index(seen, grid)
            nearest = min(
                math.dist(place, np.unravel_index(wanted, grid)) for wanted in target[b]
            )
            np.testing.assert_allclose(actual[b, i], nearest, rtol=1e-6)
    assert np.asarray(actual).min() >= 1


def test_prediction_variance_is_the_official_hinge(rng):
    """The hinge is of unbiased deviations, averaged over mask types first."""
    sizes, deviations = (4, 9), []
    predictions = [normal(rng, 3, m, 6) for m in sizes]
    scale = rng.uniform(0.2, 1.5, 6)
    for z, _ in predictions:
        mean = (z * scale).mean(1, keepdims=True)
        variance = ((z * scale - mean) ** 2).sum(1) / (z.shape[1] - 1)
        deviations.append(np.sqrt(variance + 1e-4))
    expected = np.maximum(0, 1 - np.mean(deviations, axis=0)).mean()
    scaled = [z_jax * jnp.asarray(scale, jnp.float32) for _, z_jax in predictions]
    actual = losses.prediction_variance(scaled)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert expected > 0


@pytest.mark.parametrize("exponent", [1.0, 1.5, 2.0])
def test_regression_is_the_mean_power_over_its_exponent(exponent, rng):
    (a, a_jax), (b, b_jax) = normal(rng, 2, 7, 16), normal(rng, 2, 7, 16)
    expected = (np.abs(a - b) ** exponent).mean() / exponent
    actual = losses.regression(a_jax, b_jax, exponent)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    assert losses.regression(a_jax, a_jax, exponent) == 0


def test_regression_of_half_precision_is_summed_in_single(rng):
    # 200 000 errors of 0.5: a sum in bfloat16 would stall at a few hundred.
    prediction = jnp.full((10, 200, 100), 0.5, jnp.bfloat16)
    loss = losses.regression(prediction, jnp.zeros((10, 200, 100)))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.5, rtol=1e-5)


def test_gradient_of_the_l1_loss_is_the_sign_of_the_error(rng):
    (a, a_jax), (b, b_jax) = normal(rng, 2, 3, 4), normal(rng, 2, 3, 4)
    grad = jax.grad(losses.regression)(a_jax, b_jax)
    np.testing.assert_allclose(grad, np.sign(a - b) / a.size, rtol=1e-6)


def test_variance_and_covariance_are_vicregs(rng):
    z, z_jax = normal(rng, 4, 9, 8)
    spread = rng.uniform(0.2, 2.0, 8)
    z, z_jax = z * spread + 5, z_jax * jnp.asarray(spread, jnp.float32) + 5
    flat = z.reshape(36, 8)
    covariance = np.cov(flat, rowvar=False)
    hinge = np.maximum(0, 1 - np.sqrt(flat.var(0, ddof=1) + 1e-4)).mean()
    off_diagonal = (covariance - np.diag(np.diag(covariance))) ** 2
    actual = losses.variance_covariance(z_jax)
    # Single precision around a mean of five.
    np.testing.assert_allclose(actual, (hinge, off_diagonal.sum() / 8), rtol=1e-3)


def test_collapsed_features_are_penalised_with_a_finite_gradient():
    def hinge(z):
        return losses.variance_covariance(z)[0]

    z = jnp.ones((2, 5, 6))
    np.testing.assert_allclose(hinge(z), 1 - 1e-2, rtol=1e-6)
    assert np.isfinite(jax.grad(hinge)(z)).all()


def test_gradient_of_the_hinge_spreads_what_is_too_narrow(rng):
    _, z = normal(rng, 50, 4)
    z = z * jnp.asarray([0.1, 0.5, 3.0, 5.0])
    grad = jax.grad(lambda z: losses.variance_covariance(z)[0])(z)
    outwards = np.asarray((-grad * (z - z.mean(0))).sum(0))
    assert (outwards[:2] > 0).all()
    np.testing.assert_array_equal(outwards[2:], 0)


def test_collapse_statistics_follow_their_definitions(rng):
    h, h_jax = normal(rng, 3, 20, 6)
    h, h_jax = h + 0.5, h_jax + 0.5
    flat = h.reshape(60, 6)
    covariance = np.cov(flat, rowvar=False, bias=True)
    mean = flat.mean(0)
    expected = {
        "std": flat.std(0).mean(),
        "effective_rank": np.trace(covariance) ** 2 / np.trace(covariance @ covariance),
        "cosine": (
            flat @ mean / np.linalg.norm(flat, axis=1) / np.linalg.norm(mean)
        ).mean(),
    }
    actual = losses.collapse_statistics(h_jax)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, err_msg=name)


def test_collapse_statistics_reveal_a_collapse():
    rng = np.random.default_rng()
    one_point = losses.collapse_statistics(jnp.full((2, 50, 8), 2.0))
    assert one_point["std"] < 1e-6 and abs(one_point["cosine"] - 1) < 1e-5
    line = rng.normal(size=(2, 50, 1)) * rng.normal(size=8)
    one_line = losses.collapse_statistics(jnp.asarray(line, jnp.float32))
    np.testing.assert_allclose(one_line["effective_rank"], 1, rtol=1e-4)
    ball = losses.collapse_statistics(jnp.asarray(rng.normal(size=(40, 100, 8))))
    # 4000 samples of an isotropic cloud: off by 8 / 4000 on average.
    np.testing.assert_allclose(ball["effective_rank"], 8, rtol=0.02)
    assert abs(ball["cosine"]) < 0.1


def test_collapse_statistics_take_evenly_spaced_tokens(rng):
    h, h_jax = normal(rng, 4, 100, 5)
    actual = losses.collapse_statistics(h_jax, max_tokens=50)
    # 12 of each clip, in steps of 8, each clip beginning one later.
    few = np.concatenate([clip[b : b + 96 : 8] for b, clip in enumerate(h)])
    assert len(few) == 48
    np.testing.assert_allclose(actual["std"], few.std(0).mean(), rtol=1e-5)


def test_sparse_statistics_see_every_position():
    """A feature at one position only must show, however few tokens are used."""
    h = jnp.zeros((64, 32, 2)).at[:, 5, 0].set(1.0)
    whole = losses.collapse_statistics(h)["std"]
    sparse = losses.collapse_statistics(h, max_tokens=128)["std"]
    # 128 of the 2048 tokens: 1/32 of them carry the feature, to within rounding.
    np.testing.assert_allclose(sparse, whole, rtol=0.3)


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
