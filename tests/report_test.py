"""The report page says what the files of a run say, and nothing in it is executed."""

import html.parser
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import report_files
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from report_files import HOSTILE

from vjepa_jax import probe, report, sharding
from vjepa_jax.default_config import ConfigDict, UserError, get_config, mask
from vjepa_jax.evals import features, frozen, registry, world
from vjepa_jax.reporting import clips, figures, media, results, surprise, tables

MATRIX = [[1, 1], [0, 2]]
# What a page may refer to without loading anything.
HARMLESS = re.compile(r"data:|#")


def written(workdir):
    """Write the report of a run and read it."""
    return Page(pathlib.Path(report.write_report(str(workdir))).read_text())


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text by section."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.text = [], [], {"": ""}
        self._section, self._inside = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag == "section":
            self._section = attrs["id"]
            self.text[self._section] = ""
        if tag in ("script", "style"):
            self._inside.append(tag)
            self.scripts.append((attrs, ""))

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        else:
            self.text[self._section] += f" {data.strip()}"

    def count(self, tag, name=""):
        found = [a for t, a in self.elements if t == tag]
        return len([a for a in found if name in a.get("class", "").split() or not name])

    def figures(self):
        return [
            json.loads(text)
            for attrs, text in self.scripts
            if attrs.get("type") == "application/json" and "id" not in attrs
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    # A folder's name may hold all of HOSTILE but the slash.
    name = HOSTILE.replace("/", "|")
    data = report_files.write_videos(root / f"videos {name}")
    return report_files.make_run(root / f"run {name}", data)


@pytest.fixture(scope="module")
def text(run):
    return pathlib.Path(report.write_report(str(run))).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_section_is_there(page):
    assert [*page.text][1:] == [
        *("run", "training", "masks", "features", "neighbours", "results", "physics"),
        "bad-videos",
    ]
    for key, said in page.text.items():
        assert "missing" not in said and "damaged" not in said, key
    assert "100 of 100" in page.text[""] and "3 m 20 s" in page.text[""]
    assert "jax" in page.text["run"] and "masks.short" in page.text["run"]
    assert "12 frames of 16 x 16" in page.text["run"]
    assert "empty 2" in " ".join(page.text["bad-videos"].split())


def test_tables_show_values_with_intervals(page):
    said = " ".join(page.text["results"].split())
    assert "44.4% (37.7% to 51.4%)" in said  # Wilson's, 88 of 198
    assert "position R² 0.123 0.000" in said
    assert "gravity 90.0% 50.0% (± 3.0%)" in said
    assert "knn 10 accuracy 50.0% (40.4% to 59.6%)" in said


def test_figures_hold_the_metrics(page):
    by_axis = {
        f["layout"]["yaxis"]["title"]["text"]: f
        for f in page.figures()
        if f["data"][0]["type"] == "scatter"
    }
    (loss,) = by_axis["L1 to normalised targets"]["data"]  # that of its only mask
    assert loss["x"] == [*range(2, 101, 2)]
    assert loss["y"][0] == pytest.approx(np.exp(-0.05), rel=1e-4)
    assert sum(f["data"][0]["type"] == "heatmap" for f in page.figures()) == 1
    evaluated = next(
        f
        for f in page.figures()
        if len(f["data"][0].get("y", [])) == 50
        and f["data"][-1]["name"].endswith("random init")
    )
    assert [line["y"][0] for line in evaluated["data"]] == [0.5, 0.3]
    gradient = next(f for f in page.figures() if None in f["data"][0].get("y", []))
    assert gradient["data"][0]["y"].index(None) == 4


def test_what_a_run_says_is_text(text, page):
    assert HOSTILE not in text
    assert "alert(1)" in page.text["run"] and "alert(2)" in page.text["bad-videos"]
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") for name in attrs), tag
    executed = [text for attrs, text in page.scripts if "type" not in attrs]
    assert len(executed) == 3  # the style, Plotly and the page's own
    assert not any("alert(" in text for text in executed[::2])
    assert page.count("img") == page.count("div", "frames")


def test_nothing_is_loaded(text, page):
    for tag, attrs in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert name not in attrs or HARMLESS.match(attrs[name]), (tag, attrs)
    style = next(text for attrs, text in page.scripts if "type" not in attrs)
    assert "url(" not in style and "@import" not in style
    own = page.scripts[-1][1]
    assert "fetch(" not in own and "http" not in own
    policy = next(a["content"] for t, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert len(text) < 15e6


def test_page_can_be_read_without_seeing_it(page):
    assert all(a["alt"] for t, a in page.elements if t == "img")
    assert all(a["aria-label"] for t, a in page.elements if a.get("role") == "img")
    assert page.count("caption") == page.count("table") > 0
    levels = [int(t[1]) for t, _ in page.elements if re.fullmatch("h[1-6]", t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_two_runs_stand_side_by_side(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    other = report_files.make_run(
        tmp_path / "other", config["data"]["path"], scale=2.0, seed=1
    )
    output = tmp_path / "new" / "both.html"
    assert report.write_report(str(run), str(other), str(output)) == str(output)
    page = Page(output.read_text())
    assert not (other / report.FILE).exists()
    (losses,) = (
        f["data"]
        for f in page.figures()
        if f["layout"]
        .get("yaxis", {})
        .get("title", {})
        .get("text", "")
        .startswith("L1 to")
    )
    assert [line["name"] for line in losses] == [run.name, "other"]
    starts = sorted({line["y"][0] for line in losses})
    assert starts == pytest.approx([np.exp(-0.05), 2 * np.exp(-0.05)], rel=1e-4)
    assert "other" in page.text["features"] and "other" in page.text["neighbours"]
    assert page.text["masks"].count("as run") == 1  # the same masks


@pytest.mark.parametrize("is_world", [False, True])
def test_what_is_missing_is_said_in_a_line(tmp_path, is_world):
    config = report_files.make_config(tmp_path / "gone.csv", is_world)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(config.to_dict()))
    page = written(bare)
    said = " ".join(" ".join(page.text.values()).split())
    assert "no checkpoint" in said and "No metrics were written yet" in said
    assert "No evaluation was run" in said and "bare: none" in said
    assert not page.figures() and not page.count("img")
    report_files.write_checkpoint(bare, config)
    (bare / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"st')
    (bare / "results.json").write_text("{")
    (bare / "confusion.json").write_text('{"pretrained": 3}')
    page = written(bare)
    said = " ".join(" ".join(page.text.values()).split())
    assert "results.json is damaged" in said and "confusion.json is damaged" in said
    assert "gone.csv' does not exist" in said
    # The loss; and of the world's pairs, which need no data, one for each law.
    assert len(page.figures()) == 1 + 9 * is_world


def test_real_videos_have_no_pairs(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    real = report_files.make_run(
        tmp_path / "real", config["data"]["path"], is_world=False
    )
    page = written(real)
    assert "not of the synthetic world" in page.text["physics"]
    assert page.text["neighbours"].count("class 0") > 0


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_folder_without_a_run_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        report.write_report(str(tmp_path / name))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "empty"]


def test_output_that_cannot_be_written_is_named(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n')
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder cannot be written"):
        report.write_report(str(workdir), output=str(tmp_path / "folder"))


# ------------------------------------------------------------------------------- parts


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


def test_probe_writes_the_confusion_that_the_page_shows(run, tmp_path, monkeypatch):
    """In a file of its own, so that results stay numbers."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    found = {"accuracy": {"pretrained": 0.75}, "confusion": {"pretrained": MATRIX}}
    monkeypatch.setitem(registry.EVALUATIONS, "fake", lambda model, config: found)
    config = ConfigDict({"evaluation": "fake", "step": -1})
    assert probe.probe(config, str(workdir)) == {"accuracy": {"pretrained": 0.75}}
    page = written(workdir)
    assert "results_fake.json" in page.text["results"]
    drawn = [f["data"][0] for f in page.figures() if f["data"][0]["type"] == "heatmap"]
    assert [d["customdata"] for d in drawn][1:] == [MATRIX]
    assert drawn[1]["z"] == [[0.5, 0.5], [0, 1]] and drawn[1]["y"] == ["0", "1"]


def test_confusion_of_the_world_counts_the_attentive_probe(rng, monkeypatch):
    said = rng.integers(0, 11, 25)
    monkeypatch.setattr(world.probes, "attentive_classes", lambda *_: said)
    state = dict.fromkeys(("position", "velocity", "time_to_collision"), 0.0)
    monkeypatch.setattr(world.probes, "attentive_r2", lambda *_: state)
    training = world.Training(
        num_heads=2,
        epochs=1,
        batch_size=8,
        learning_rates=(1e-2,),
        weight_decay=0.0,
        seed=0,
        mesh=sharding.make_mesh(),
    )

    def split(count):
        labels = np.arange(count) % 11
        tokens = rng.normal(size=(count, 2, 2, 4)).astype(np.float32)
        tokens[..., 0] += labels[:, None, None]
        of_clips = features.Features(tokens, labels, np.arange(count))
        state = rng.normal(size=(count, 2, 2))
        return of_clips, world.State(state, state, np.zeros((count, 2)), state[..., :1])

    names = ("probe_train", "probe_test", "hidden_train", "hidden_test")
    found = world.measure(
        {
            name: split(count)
            for name, count in zip(names, (44, 25, 22, 22), strict=True)
        },
        labels_per_class=2,
        draws=1,
        hidden_visibility=0.5,
        attentive=training,
        regression=training,
        seed=0,
    )
    wanted = np.zeros((11, 11), int)
    np.add.at(wanted, (np.arange(25) % 11, said), 1)
    assert found["confusion"] == wanted.tolist()
    assert found["attentive_accuracy"] == pytest.approx(np.trace(wanted) / 25)


def test_lines_that_never_change_have_a_range():
    for value, wanted in ((0.04, (0, 0.08)), (-1.0, (-2, 0)), (0.0, (0, 1))):
        line = figures.Line("a", [1, 2], [value, value])
        found = figures.lines("title", [line]).plot["layout"]["yaxis"]["range"]
        assert found == pytest.approx(wanted)
    other = figures.Line("b", [1, 2], [1.0, float("nan")])
    assert "range" not in figures.lines("title", [line, other]).plot["layout"]["yaxis"]


def opened(film):
    data = film.uri.removeprefix("data:image/webp;base64,")
    return np.asarray(Image.open(media.io.BytesIO(media.base64.b64decode(data))))


@pytest.mark.parametrize("channels", [3, 4])
def test_small_films_keep_every_pixel(rng, channels):
    frames = rng.integers(0, 256, (5, 12, 10, channels), np.uint8)
    frames[..., 3:] |= 1  # what is wholly transparent may have any colour
    film = media.film(frames, "alt")
    np.testing.assert_array_equal(opened(film), np.concatenate([*frames], axis=1))


def test_large_and_long_films_shrink(rng):
    frames = rng.integers(0, 256, (64, 300, 200, 3), np.uint8)
    frames[32:] //= 4
    film = media.film(frames, "alt")
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
        "masks.short": ("there", "—"),
        "masks.tubes": ("—", "there"),
        "masks.tubes.kind": ("multiblock", "tube"),
        "masks.long.num_blocks": ("2", "3"),
    }


def test_neighbours_are_those_of_the_largest_cosine(rng):
    pooled = rng.normal(size=(9, 4)).astype(np.float32)
    places, cosines = clips._nearest(pooled)
    pooled = pooled.astype(np.float64)
    for i, (row, values) in enumerate(zip(places, cosines, strict=True)):
        norms = np.linalg.norm(pooled, axis=1) * np.linalg.norm(pooled[i])
        cosine = pooled @ pooled[i] / norms
        others = sorted((j for j in range(9) if j != i), key=lambda j: -cosine[j])
        assert row.tolist() == others[:5]
        # The terms of a cosine are at most one and may cancel: rounding is absolute.
        np.testing.assert_allclose(values, cosine[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_context", [2, 4, 10, 12])
def test_surprise_of_a_frame_is_that_of_the_tubelet_it_ends(run, rng, num_context):
    model = frozen.load(str(run))
    video = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    frames, (found,) = surprise.per_frame(model, [video], num_context)
    assert frames.tolist() == [*range(3, 12)]
    for frame, value in zip(frames, found, strict=True):
        # Whole tubelets of two frames, of four tokens each.
        seen = min(num_context, (frame - 1) // 2 * 2)
        window = video[None, frame - 1 - seen : frame + 1]
        tokens = range(2 * seen + 4)
        error = np.subtract(*model.predict(window, tokens[:-4], tokens[-4:]))
        np.testing.assert_allclose(np.abs(error).mean(), value, rtol=1e-4)


def test_surprise_of_frames_wants_two_tubelets(run):
    model = frozen.load(str(run))
    with pytest.raises(UserError, match="3 frames of a video are fewer than two"):
        surprise.per_frame(model, [np.zeros((3, 16, 16, 3), np.uint8)], 2)


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
