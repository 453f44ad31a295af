"""The parts of a page: figures, films, tables, and the numbers in them."""

import base64
import importlib.resources
import io
import re

import numpy as np
import pytest
import video_files
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from vjepa_jax.config.defaults import get_config, mask
from vjepa_jax.report import clips, figures, films, results, tables
from vjepa_jax.run import goodput


def test_each_part_of_the_wall_time_has_its_own_colour():
    style = importlib.resources.files("vjepa_jax.report") / "templates/page.css"
    light, dark = re.findall("--series: (.+);", style.read_text())
    for colours in (light.split(), dark.split()):
        assert len(set(colours)) == len(colours) >= len([*goodput.PARTS, "other"])


@settings(deadline=None, max_examples=40)
@given(
    arrays.arrays(
        float,
        st.integers(1, 5000),
        elements=st.floats(-1e6, 1e6) | st.just(float("nan")),
        fill=st.floats(-1, 1),
    )
)
def test_thin_lines_keep_extremes_and_gaps(y):
    x = np.arange(len(y)) * 7.0
    kept_x, kept_y = figures.thinned(x, y)
    assert len(kept_x) <= 1002 and np.all(np.diff(kept_x) > 0)
    np.testing.assert_array_equal(y[(kept_x / 7).astype(int)], kept_y)
    assert kept_x[0] == x[0] and kept_x[-1] == x[-1]
    assert np.isnan(kept_y).any() == np.isnan(y).any()
    if not np.isnan(y).all():
        assert np.nanmax(kept_y) == np.nanmax(y) and np.nanmin(kept_y) == np.nanmin(y)


def test_lines_that_never_change_have_a_range():
    for value, wanted in ((0.04, (0, 0.08)), (-1.0, (-2, 0)), (0.0, (0, 1))):
        line = figures.Line("a", [1, 2], [value, value])
        assert y_axis(line)["range"] == pytest.approx(wanted)
    other = figures.Line("b", [1, 2], [1.0, float("nan")])
    assert "range" not in y_axis(line, other)


def y_axis(*lines):
    axis = figures.Axis("a title")
    return figures.make_lines("title", lines, axis, axis).plot["layout"]["yaxis"]


def opened(film):
    data = film.uri.removeprefix("data:image/webp;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("channels", [3, 4])
def test_small_films_keep_every_pixel(rng, channels):
    frames = rng.integers(0, 256, (5, 12, 10, channels), np.uint8)
    frames[..., 3:] |= 1  # what is wholly transparent may have any colour
    film = films.make_film(frames, "alt")
    np.testing.assert_array_equal(opened(film), np.concatenate([*frames], axis=1))


def test_large_and_long_films_shrink(rng):
    frames = rng.integers(0, 256, (64, 300, 200, 3), np.uint8)
    frames[32:] //= 4
    film = films.make_film(frames, "alt")
    strip = opened(film)
    assert film.num_frames == 16 and strip.shape == (128, 16 * 85, 3)
    halves = [half.mean() for half in np.split(strip, 2, axis=1)]
    assert halves[0] > 3 * halves[1]  # the order of time is kept


def test_differences_name_keys_masks_and_streams():
    config = get_config()
    assert tables.flat_differences(config) == {}
    with config.unlocked():
        del config.masks.short
        config.masks.tubes = mask(kind="tube")
        config.masks.long.num_blocks = 3
    config.optim.learning_rate = 1e-5
    assert tables.flat_differences(config) == {
        "optim.learning_rate": ("0.000625", "1e-05"),
        "masks.short": ("present", "—"),
        "masks.tubes": ("—", "present"),
        "masks.tubes.kind": ("multiblock", "tube"),
        "masks.long.num_blocks": ("2", "3"),
    }


def test_clips_have_the_classes_of_their_own_folder(tmp_path):
    files = ("1/put", "1/take", "2/open", "2/put", "2/take")
    for seed, name in enumerate(files):
        (tmp_path / name).mkdir(parents=True)
        frames = video_files.moving_frames(8, height=16, width=16, seed=seed)
        video_files.write_video(tmp_path / name / "0.mp4", frames)
    config = get_config()
    config.data.update(path=f"{tmp_path}/1,{tmp_path}/2", num_frames=2, resolution=16)
    read = clips.read_clips(config)
    assert sorted(zip(read.paths, read.names, strict=True)) == [
        (f"{tmp_path}/{name}/0.mp4", name.split("/")[1]) for name in files
    ]
    (tmp_path / "2/cover.mp4").write_bytes((tmp_path / "2/put/0.mp4").read_bytes())
    read = clips.read_clips(config)  # the second folder has no classes now
    assert sorted(read.names) == ["", "", "", "", "put", "take"]


def test_neighbours_are_those_of_the_largest_cosine(rng):
    pooled = rng.normal(size=(9, 4)).astype(np.float32)
    indices, cosines = clips.nearest(pooled)
    pooled = pooled.astype(np.float64)
    for i, (row, values) in enumerate(zip(indices, cosines, strict=True)):
        norms = np.linalg.norm(pooled, axis=1) * np.linalg.norm(pooled[i])
        cosine = pooled @ pooled[i] / norms
        others = sorted((j for j in range(9) if j != i), key=lambda j: -cosine[j])
        assert row.tolist() == others[:5]
        # The terms of a cosine are at most one and may cancel: rounding is absolute.
        np.testing.assert_allclose(values, cosine[row], rtol=0, atol=1e-6)


@settings(deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1))
def test_interval_is_wilsons(count, share):
    right = round(share * count)
    matrix = [[right, count - right], [0, 0]]
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(p * (1 - p) / count + (z / 2 / count) ** 2)
    low, high = results._wilson(p, results._count(matrix)).split(" to ")
    wanted = max(middle - half, 0), min(middle + half, 1)
    found = [float(text.rstrip("%")) / 100 for text in (low, high)]
    np.testing.assert_allclose(found, wanted, atol=0.00051)
