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


def plain_trilinear(table, grid, base):
    """Interpolate [*base, D] between cell centres, output cell by output cell."""
    out = np.empty((*grid, table.shape[-1]))
    for cell in np.ndindex(grid):
        corners = []
        for place, size, stored in zip(cell, grid, base, strict=True):
            at = (place + 0.5) * stored / size - 0.5
            at = min(max(at, 0), stored - 1)
            low = math.floor(at)
            high = min(low + 1, stored - 1)
            corners.append([(low, 1 - (at - low)), (high, at - low)])
        out[cell] = sum(
            wt * wh * ww * table[t, h, w]
            for (t, wt), (h, wh), (w, ww) in itertools.product(*corners)
        )
    return out.reshape(-1, table.shape[-1])


@pytest.mark.parametrize(
    "grid", [(2, 5, 7), (3, 2, 3), (1, 3, 4), (5, 3, 4), (1, 1, 1), (2, 3, 8)]
)
def test_sincos_table_of_another_grid_is_interpolated(grid):
    base, dim = (2, 3, 4), 18
    if grid[1:] == base[1:] and grid[0] < base[0]:
        # Fewer frames of the same size take the first rows, as officially.
        expected = plain_sincos(range(math.prod(grid)), base, dim)
    else:
        table = plain_sincos(range(math.prod(base)), base, dim)
        expected = plain_trilinear(table.reshape(*base, dim), grid, base)
    actual = positions.sincos_table(grid, dim, base)
    assert actual.shape == (math.prod(grid), dim) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_array_equal(
        positions.sincos_table(base, dim, base), positions.sincos_table(base, dim)
    )


def test_rope_stretches_rows_and_columns_to_its_base_grid(rng):
    grid, base, head_dim = (3, 4, 5), (8, 16, 9), 20
    idx = rng.integers(0, 60, (1, 7))
    cos, sin = positions.rope_tables(jnp.asarray(idx), grid, head_dim, base_grid=base)
    assert cos.shape == sin.shape == (1, 7, 1, head_dim)
    for n, number in enumerate(idx[0]):
        t, h, w = np.unravel_index(number, grid)
        # The last row and column lie where the base grid's do; time is as it is.
        places = (t, h * 15 / 3, w * 8 / 4)
        for axis, place in enumerate(places):
            for i in range(3):
                angle = place * 10000 ** (-i / 3)
                for channel in (6 * axis + 2 * i, 6 * axis + 2 * i + 1):
                    np.testing.assert_allclose(
                        cos[0, n, 0, channel], math.cos(angle), atol=1e-5
                    )
                    np.testing.assert_allclose(
                        sin[0, n, 0, channel], math.sin(angle), atol=1e-5
                    )


def test_a_stretched_grid_of_one_row_stays_where_it_is():
    single = positions.rope_tables(jnp.arange(2), (2, 1, 1), 12, base_grid=(2, 8, 8))
    plain = positions.rope_tables(jnp.arange(2), (2, 1, 1), 12)
    for a, b in zip(single, plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_tiled_rope_turns_the_channels_of_a_pair_by_different_angles(rng):
    """V-JEPA 2's released form, reference inventory 2.4."""
    grid, head_dim, m = (3, 4, 5), 26, 8
    idx = rng.integers(0, 60, 5)
    x = rng.normal(size=(1, 5, 1, head_dim)).astype(np.float32)
    tables = positions.rope_tables(jnp.asarray(idx)[None], grid, head_dim, tiled=True)
    actual = np.asarray(positions.rotate(jnp.asarray(x), tables))[0, :, 0]
    expected = x[0, :, 0].astype(np.float64)
    for row, number in zip(expected, idx, strict=True):
        for axis, p in enumerate(np.unravel_index(number, grid)):
            old = row[axis * m : (axis + 1) * m].copy()
            for i in range(m // 2):
                even = p * 10000 ** (-((2 * i) % (m // 2)) / (m / 2))
                odd = p * 10000 ** (-((2 * i + 1) % (m // 2)) / (m / 2))
                a, b = old[2 * i], old[2 * i + 1]
                row[axis * m + 2 * i] = a * math.cos(even) - b * math.sin(even)
                row[axis * m + 2 * i + 1] = b * math.cos(odd) + a * math.sin(odd)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


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
