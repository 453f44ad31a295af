"""Sin-cos tables and rotations against plain loops."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_models import GRID, plain_rope, plain_sincos

from vjepa_jax.models import positions

NUM_TOKENS = math.prod(GRID)


@pytest.mark.parametrize("dim", [12, 24, 32, 50])
@pytest.mark.parametrize("grid", [(2, 3, 4), (5, 1, 2)])
def test_sincos_table_equals_a_plain_loop(dim, grid):
    table = positions.sincos_table(grid, dim)
    assert table.shape == (math.prod(grid), dim) and table.dtype == np.float32
    expected = plain_sincos(range(math.prod(grid)), grid, dim)
    np.testing.assert_allclose(table, expected, atol=1e-6)


@pytest.mark.parametrize(("head_dim", "per_axis"), [(64, 20), (80, 26), (32, 10)])
def test_rope_rotates_the_channels_of_the_reference(head_dim, per_axis, rng):
    """Splits 20/20/20 + 4, 26 x 3 + 2 and 10 x 3 + 2 (reference inventory, 1.3)."""
    grid, idx = (3, 4, 5), rng.integers(0, 60, (2, 6))
    x = rng.normal(size=(2, 6, 3, head_dim)).astype(np.float32)
    tables = positions.rope_tables(jnp.asarray(idx), grid, head_dim)
    actual = np.asarray(positions.rotate(jnp.asarray(x), tables))
    np.testing.assert_array_equal(actual[..., 3 * per_axis :], x[..., 3 * per_axis :])
    for b, head in itertools.product(range(2), range(3)):
        expected = plain_rope(x[b, :, head].astype(np.float64), idx[b], grid)
        np.testing.assert_allclose(actual[b, :, head], expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rotated_products_depend_on_the_difference_of_positions_only(data):
    grid, head_dim = (8, 16, 16), 26
    places = [[data.draw(st.integers(0, n // 2 - 1)) for n in grid] for _ in range(2)]
    shift = [data.draw(st.integers(0, n // 2)) for n in grid]
    moved = np.array(places) + shift
    both = [np.ravel_multi_index(np.transpose(p), grid) for p in (places, moved)]
    q, k = np.random.default_rng().normal(size=(2, 1, 1, 1, head_dim))

    def product(idx):
        rotated = [
            positions.rotate(
                jnp.asarray(x, jnp.float32),
                positions.rope_tables(jnp.asarray([[i]]), grid, head_dim),
            )
            for x, i in zip((q, k), idx, strict=True)
        ]
        return float((rotated[0] * rotated[1]).sum())

    # Single precision: angles up to 16 are known to 1e-6.
    np.testing.assert_allclose(product(both[0]), product(both[1]), atol=1e-4)


def test_grid_coordinates_invert_the_numbering():
    t, h, w = positions.grid_coordinates(jnp.arange(NUM_TOKENS), GRID)
    expected = np.unravel_index(np.arange(NUM_TOKENS), GRID)
    for actual, axis in zip((t, h, w), expected, strict=True):
        np.testing.assert_array_equal(actual, axis)
