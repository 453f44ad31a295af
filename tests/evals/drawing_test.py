"""Pictures of masks and features show the right pixels."""

import sys

import jax
import numpy as np
import pytest
from PIL import Image

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import drawing
from vjepa_jax.objective import masking

GRID = (2, 4, 4)


@pytest.fixture
def clip(rng):
    return rng.integers(0, 256, (4, 16, 16, 3), np.uint8)


def test_masks_show_context_and_targets(clip):
    spec = masking.MaskSpec(num_blocks=2, num_context=8, num_target=12)
    key = jax.random.key(3)
    rows = drawing.mask_rows(clip, GRID, {"short": spec}, key)
    names = ["clip", "short: context 25%", "short: targets 38%"]
    assert [*rows] == names
    sampled = masking.sample(jax.random.fold_in(key, 0), key, 1, GRID, spec)
    for name, (idx,) in zip(names[1:], sampled, strict=True):
        np.testing.assert_array_equal(rows[name][..., :3], clip)
        # A token is 2 frames of 4 x 4 pixels.
        opacity = rows[name][::2, ::4, ::4, 3].reshape(-1)
        assert np.flatnonzero(opacity == 255).tolist() == idx.tolist()
        full = opacity.reshape(GRID).repeat(2, 0).repeat(4, 1).repeat(4, 2)
        np.testing.assert_array_equal(rows[name][..., 3], full)


def test_colours_are_principal_components(rng):
    tokens = rng.normal(size=(5, 2, 16, 8))
    tokens[..., 2] *= 20  # this direction has the largest variance
    colours = drawing.principal_colours(tokens, GRID)
    assert colours.shape == (5, *GRID, 3) and colours.dtype == np.uint8
    red, values = colours[..., 0].reshape(-1), tokens[..., 2].reshape(-1)
    assert abs(np.corrcoef(red, values)[0, 1]) > 0.95
    assert red.min() == 0 and red.max() == 255


def test_rows_of_different_rates_show_the_same_times(clip):
    tubelets = clip[::2, ::4, ::4]
    transparent = np.pad(clip, ((0, 0),) * 3 + ((0, 1),))
    picture = drawing.make_picture(
        {"clip": clip, "tokens": tubelets, "hidden": transparent}
    )
    assert picture.mode == "RGB"
    side, gap, margin, caption = 128, drawing._GAP, drawing._MARGIN, 32
    assert picture.width == 2 * margin + 2 * side + gap
    for row, frames in enumerate((clip, tubelets)):
        for column in range(2):
            left = margin + column * (side + gap)
            top = margin + row * (side + caption) + caption
            shown = picture.crop((left, top, left + side, top + side))
            frame = Image.fromarray(frames[:: len(frames) // 2][column])
            wanted = frame.resize((side, side), Image.Resampling.NEAREST)
            np.testing.assert_array_equal(shown, wanted)
    bottom = np.asarray(picture)[-margin - side : -margin, margin : margin + side]
    assert (bottom == 255).all()  # a transparent frame on the white background


def test_missing_packages_are_named_with_the_extra(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(UserError, match=r'sklearn.*pip install "vjepa_jax\[report\]"'):
        drawing.principal_colours(rng.normal(size=(1, 2, 16, 4)), GRID)
