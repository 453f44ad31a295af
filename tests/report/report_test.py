"""The report page shows what the files of a run contain, and executes none of it."""

import html.parser
import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
import report_files
from damaged_files import damage, halve, largest
from report_files import HOSTILE

from vjepa_jax import probe
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals import frozen, registry
from vjepa_jax.report import __main__ as report
from vjepa_jax.report import surprise

MATRIX = [[1, 1], [0, 2]]
# Links that load nothing.
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
def text(pages):
    return pathlib.Path(pages["one"]).read_text()


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_every_section_is_there(page):
    assert [*page.text][1:] == [
        *("features", "results", "neighbours", "physics"),
        *("training", "resources", "masks", "bad-videos"),
        "run",
    ]
    for key, text in page.text.items():
        assert "missing" not in text and "damaged" not in text, key
    assert "100 of 100" in page.text[""] and "3 m 20 s" in page.text[""]
    assert "jax" in page.text["run"] and "masks.short" in page.text["run"]
    assert "12 frames of 16 x 16" in page.text["run"]
    assert "empty 2" in " ".join(page.text["bad-videos"].split())


def test_tables_show_values_with_intervals(page):
    text = " ".join(page.text["results"].split())
    assert "44.4% (37.7% to 51.4%)" in text  # Wilson's, 88 of 198
    assert "position R² 0.123 0.000" in text
    assert "gravity 90.0% 50.0% (± 3.0%)" in text
    assert "knn 10 accuracy 50.0% (40.4% to 59.6%)" in text


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


def test_text_of_a_run_is_not_executed(text, page):
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


def test_two_runs_stand_side_by_side(run, other, pages):
    assert pages["both"] == str(run.parent / "new folder" / "both.html")
    page = Page(pathlib.Path(pages["both"]).read_text())
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
def test_what_is_missing_is_named_in_a_line(tmp_path, is_world):
    config = report_files.make_config(tmp_path / "gone.csv", is_world)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(config.to_dict()))
    page = written(bare)
    text = " ".join(" ".join(page.text.values()).split())
    assert "no checkpoint" in text and "No metrics were written yet" in text
    assert "No evaluation was run" in text and "bare: none" in text
    assert not page.figures() and not page.count("img")
    report_files.write_checkpoint(bare, config)
    (bare / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"st')
    (bare / "results.json").write_text("{")
    (bare / "confusion.json").write_text('{"pretrained": 3}')
    page = written(bare)
    text = " ".join(" ".join(page.text.values()).split())
    assert "results.json is damaged" in text and "confusion.json is damaged" in text
    assert "gone.csv' does not exist" in text
    # The loss; and of the world's pairs, which need no data, one for each law.
    assert len(page.figures()) == 1 + 9 * is_world


def test_a_damaged_checkpoint_is_named_and_another_can_be_chosen(tmp_path):
    config = report_files.make_config(tmp_path / "gone.csv", is_world=False)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    report_files.write_checkpoint(tmp_path, config)
    steps = tmp_path / "checkpoints"
    shutil.copytree(steps / "0", steps / "1")
    damage(largest(steps / "1/target"), halve)
    text = pathlib.Path(report.write_report(str(tmp_path))).read_text()
    assert f"{steps / '1'} is damaged" in text
    assert "step 0 is intact: choose it with step=0" in text
    text = pathlib.Path(report.write_report(str(tmp_path), step=0)).read_text()
    assert "is damaged" not in text and "no checkpoint" not in text


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


def test_probe_writes_the_confusion_that_the_page_shows(run, tmp_path, monkeypatch):
    """It is in a separate file, so that results contain numbers only."""
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    confusion = {"pretrained": MATRIX, "class_names": ["put", "take"]}
    found = {"accuracy": {"pretrained": 0.75}, "confusion": confusion}
    monkeypatch.setitem(registry.EVALUATIONS, "fake", lambda model, config: found)
    config = ConfigDict({"evaluation": "fake", "step": -1})
    assert probe.probe(config, str(workdir)) == {"accuracy": {"pretrained": 0.75}}
    page = written(workdir)
    assert "results_fake.json" in page.text["results"]
    drawn = [f["data"][0] for f in page.figures() if f["data"][0]["type"] == "heatmap"]
    assert [d["customdata"] for d in drawn][1:] == [MATRIX]
    assert drawn[1]["z"] == [[0.5, 0.5], [0, 1]] and drawn[1]["y"] == ["put", "take"]


@pytest.fixture(scope="module")
def model(run):
    return frozen.load(str(run))


@pytest.mark.parametrize("num_context", [2, 4, 10, 12])
def test_surprise_of_a_frame_is_that_of_the_tubelet_it_ends(model, rng, num_context):
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


def test_surprise_of_frames_needs_two_tubelets(model):
    with pytest.raises(UserError, match="3 frames of a video are fewer than two"):
        surprise.per_frame(model, [np.zeros((3, 16, 16, 3), np.uint8)], 2)


@pytest.mark.parametrize("num_context", [0, 1, 5])
def test_context_of_frames_is_of_whole_tubelets(model, num_context):
    with pytest.raises(ValueError, match="not whole tubelets of 2"):
        surprise.per_frame(model, [np.zeros((12, 16, 16, 3), np.uint8)], num_context)
