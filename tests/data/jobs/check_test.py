"""`check`: a readable file gives clips, any other gives a reason, none stops it."""

import collections
import json
import multiprocessing
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import bad_files
import pytest
import video_files
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax import check
from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults
from vjepa_jax.data.clips import media
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.jobs import survey
from vjepa_jax.data.jobs.survey import Output, Summary
from vjepa_jax.data.jobs.worker_pool import CRASHED, TIMED_OUT
from vjepa_jax.data.sources.open import open_mixture, open_source
from vjepa_jax.data.sources.records import Joined, Record
from vjepa_jax.data.transforms.transforms import ClipTransform
from vjepa_jax.run import cli


def run(*arguments, **options):
    command = [sys.executable, "-m", "vjepa_jax.check", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, **options
    )


def read_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad files")
    return folder, bad_files.make_all(folder)


@pytest.mark.parametrize("deep", [False, True])
def test_every_kind_of_file_has_its_outcome(bad_folder, deep):
    folder, cases = bad_folder
    source = open_source(str(folder / "list.csv"))
    reader = ClipReader(Sampling(16, 4), 32, limits=Limits(time_limit_secs=30))
    examine = survey.Examination(reader, ClipTransform(32), deep)
    findings = dict(
        survey.survey(
            source, examine, range(len(source)), num_workers=2, timeout_secs=60
        )
    )
    assert sorted(findings) == list(range(len(cases)))
    for i, (path, case) in enumerate(cases.items()):
        finding = findings[i]
        outcomes = (deep and case.deep_outcomes) or case.outcomes
        assert finding.path == path
        assert (finding.error or bad_files.GOOD) in outcomes, finding
        facts = finding.frames, finding.width, finding.height, finding.codec
        if finding.error:
            assert facts == (None,) * 4
        else:
            assert min(facts[:3]) > 0 and finding.codec and finding.clip_secs > 0
    assert {case.name: findings[i].frames for i, case in enumerate(cases.values())}[
        "hidden_start.mp4"
    ] == 35


def test_command_on_bad_files(bad_folder, tmp_path):
    folder, cases = bad_folder
    output = tmp_path / "new" / "findings.jsonl"
    done = run(f"--data={folder}/list.csv", f"--output={output}", "--workers=2")
    assert done.returncode == check.EXIT_TOO_MANY_BAD
    assert "Traceback" not in done.stderr and "unreadable, more than" in done.stderr
    lines = read_lines(output)
    assert [line["path"] for line in lines] == list(cases)
    for line, case in zip(lines, cases.values(), strict=True):
        assert list(line) == [
            *("path", "frames", "width", "height", "fps", "codec", "error")
        ]
        assert (line["error"] or bad_files.GOOD) in case.outcomes
    num_bad = sum(line["error"] is not None for line in lines)
    num_good = len(lines) - num_bad
    assert f"{len(lines)} videos: {num_good} readable, {num_bad} not" in done.stdout
    assert "clips/s per core" in done.stdout
    assert os.listdir(output.parent) == [output.name]


def test_folder_under_the_limit_and_needs_of_a_config(tmp_path):
    for name in "abc":
        path = tmp_path / f"{name}.mp4"
        video_files.write_video(path, video_files.moving_frames(8))
    (tmp_path / "d.mp4").touch()
    large = video_files.moving_frames(4, height=200, width=320)
    video_files.write_video(tmp_path / "e.mp4", large)
    config = pathlib.Path(__file__).parents[3] / "configs" / "vjepa.py"
    done = run(
        f"--config={config}",
        f"--data={tmp_path}",
        "--config.data.num_frames=8",
        "--config.data.max_pixels=50000",
        "--max_bad_fraction=0.4",
        "--workers=1",
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "(8 frames, step 4, 224 pixels" in done.stdout
    assert "e.mp4: too_large" in done.stdout
    for chip in check.CHIPS:
        assert f"  {chip} " in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data is not set"),
        (["--data=nowhere"], "error: --data 'nowhere' does not exist"),
        (["--data={folder}"], "no videos"),
        (["--data={list}", "--output={folder}"], "cannot be written"),
        (["--data={list}", "--workers=0"], "workers"),
        (["--data={list}", "--config=nowhere.py"], "nowhere.py"),
        (["--data={list}", "and more"], "'and more' is not a flag"),
    ],
)
def test_mistakes_get_one_line(tmp_path, arguments, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "list.csv").write_text(f"{__file__} 0\n")
    names = {"folder": folder, "list": tmp_path / "list.csv"}
    done = run(*(argument.format(**names) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not done.stdout


class Names(list):
    """A source whose paths name what happens."""

    name = "names"

    def __init__(self, paths):
        super().__init__(Record(path, 0) for path in paths)

    def path_of(self, index):
        return super().__getitem__(index).path


class BrokenNames(Names):
    """A source that cannot give its second record."""

    def __getitem__(self, index):
        if index == 1:
            raise OSError("damaged")
        return super().__getitem__(index)


def act(record):
    """Do what the path names; for workers."""
    action, _, marker = record.path.partition(":")
    if action == "raise":
        raise KeyError("unforeseen")
    if action == "hang":
        time.sleep(1000)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "exit":
        os._exit(7)
    if action == "die" or (action == "die_once" and not os.path.exists(marker)):
        if marker:
            pathlib.Path(marker).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return survey.Finding(record.path, frames=1)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_lost_workers_cost_one_video_each(tmp_path, num_workers):
    marker = f"die_once:{tmp_path}/marker"
    expected = {
        "good": None,
        "raise": CRASHED,
        "hang": TIMED_OUT,
        "die": CRASHED,
        "exit": CRASHED,
        "stop": TIMED_OUT,
        marker: None,
    }
    paths = [*expected, *["good"] * 20]
    random.shuffle(paths)
    found = list(
        survey.survey(
            Names(paths),
            act,
            range(len(paths)),
            num_workers=num_workers,
            timeout_secs=1.0,
        )
    )
    assert sorted(index for index, _ in found) == list(range(len(paths)))
    for index, finding in found:
        assert finding.path == paths[index]
        assert finding.error == expected[paths[index]]
    details = {finding.path: finding.detail for _, finding in found}
    assert details["die"] == signal.strsignal(signal.SIGSEGV)
    assert details["exit"] == "exit code 7"
    assert "unforeseen" in details["raise"]
    assert not multiprocessing.active_children()


def test_unavailable_records_are_named():
    found = dict(
        survey.survey(
            BrokenNames(["good"] * 3), act, range(3), num_workers=1, timeout_secs=60
        )
    )
    assert [found[i].error for i in range(3)] == [None, "unreadable", None]
    assert found[1].path == "good" and "damaged" in found[1].detail


def test_closing_ends_workers_that_hang():
    findings = survey.survey(
        Names(["good", "hang"]), act, range(2), num_workers=2, timeout_secs=1000
    )
    assert next(findings)[0] == 0
    findings.close()
    assert not multiprocessing.active_children()


def cannot_be_loaded():
    raise ImportError("as it is")


class Unloadable(Names):
    """A source that fails in every worker."""

    def __reduce__(self):
        return cannot_be_loaded, ()


def test_workers_that_cannot_start_are_an_error():
    findings = survey.survey(
        Unloadable(["good"]), act, range(1), num_workers=1, timeout_secs=60
    )
    with pytest.raises(RuntimeError, match="could not start"):
        next(findings)
    assert not multiprocessing.active_children()


def test_interrupted_command_loses_nothing_and_continues(tmp_path):
    video_files.write_video(tmp_path / "v.mp4", video_files.moving_frames(40))
    num_videos = 150
    (tmp_path / "list.csv").write_text("v.mp4 0\n" * num_videos + "none.mp4 0\n")
    output, partial = tmp_path / "o.jsonl", tmp_path / "o.jsonl.partial"
    command = [sys.executable, "-m", "vjepa_jax.check", "--workers=2"]
    command += [f"--data={tmp_path}/list.csv", f"--output={output}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None:
        if partial.exists() and partial.read_text().count("\n") > 3:
            # To all processes, as a terminal does.
            os.killpg(process.pid, signal.SIGINT)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_INTERRUPTED, err
    assert f"of {num_videos + 1} videos; {partial} has them" in err
    assert "Traceback" not in err and "readable" in out
    assert not output.exists()
    num_done = len(partial.read_text().splitlines()) - 1
    assert f"after {num_done} of" in err

    again = run(*command[3:])
    assert again.returncode == 0, again.stderr
    assert f"has {num_done} of {num_videos + 1} videos already" in again.stderr
    lines = read_lines(output)
    assert [line["error"] for line in lines] == [None] * num_videos + ["missing"]
    assert not partial.exists()


def some_finding(rng):
    if rng.random() < 0.3:
        error = rng.choice([*media.REASONS, CRASHED, TIMED_OUT])
        return survey.Finding("caf\udce9\n.mp4", error=error, detail="some")
    return survey.Finding(
        f"/{rng.random()}",
        frames=rng.randint(1, 1000),
        width=rng.choice([320, 640]),
        height=240,
        fps=rng.choice([None, 12.0, 29.97, rng.uniform(1, 60)]),
        codec=rng.choice(["h264", "vp9"]),
        clip_secs=rng.uniform(0.01, 0.1),
    )


@settings(max_examples=30, deadline=None)
@given(rng=st.randoms(use_true_random=False), cut=st.integers(0, 400))
def test_output_cut_anywhere_is_completed(tmp_path_factory, rng, cut):
    path = tmp_path_factory.mktemp("output") / "findings.jsonl"
    findings = [some_finding(rng) for _ in range(8)]
    order = rng.sample(range(8), 8)
    first = Output(str(path), "videos")
    for index in order[:5]:
        first.add(index, findings[index])
    partial = pathlib.Path(first.partial_path)
    content = partial.read_bytes()
    partial.write_bytes(content[: max(0, len(content) - cut)])
    second = Output(str(path), "videos")
    assert list(second.done) == order[: len(second.done)]
    for index in order:
        if index not in second.done:
            second.add(index, findings[index])
    second.finish()
    lines = read_lines(path)
    for line, finding in zip(lines, findings, strict=True):
        assert line == {name: getattr(finding, name) for name in line}
        assert line["path"] == finding.path


def test_output_of_other_videos_is_refused(tmp_path):
    path = str(tmp_path / "o.jsonl")
    Output(path, "some").add(0, survey.Finding("a", error="empty"))
    with pytest.raises(UserError, match="delete it"):
        Output(path, "others")


@settings(max_examples=20, deadline=None)
@given(rng=st.randoms(use_true_random=False), in_frames=st.booleans())
def test_summary_counts(rng, in_frames):
    findings = [some_finding(rng) for _ in range(rng.randint(1, 60))]
    summary = Summary(Sampling(16, 4) if in_frames else Sampling(16, fps=7.5))
    for finding in findings:
        summary.add(finding)
    good = [finding for finding in findings if not finding.error]
    bad = [finding for finding in findings if finding.error]
    text = "\n".join(summary.lines())
    assert (summary.num_videos, summary.num_bad) == (len(findings), len(bad))
    rows = collections.Counter(
        tuple(line.split()[:2]) for line in text.splitlines() if line[:2] == "  "
    )
    for reason, count in collections.Counter(f.error for f in bad).items():
        assert rows[reason, str(count)] == 1
    for codec, count in collections.Counter(f.codec for f in good).items():
        assert rows[codec, str(count)] == 1
    short = [
        f
        for f in good
        if (f.frames < 61 if in_frames else f.fps and f.frames / f.fps < 2)
    ]
    subject = "1 video is" if len(short) == 1 else f"{len(short)} videos are"
    assert (f"\n\n{subject} shorter than a clip" in text) == bool(short)
    lengths = text.partition("\nlength")[2].partition("\n\nunreadable")[0]
    counts = [int(line[18:29]) for line in lengths.splitlines()[1:] if line[:2] == "  "]
    assert sum(counts) == len(good)
    if good:
        seconds = sum(finding.clip_secs for finding in good)
        assert summary.clips_per_second == pytest.approx(len(good) / seconds)
    else:
        assert summary.clips_per_second is None


def test_rows_of_the_summary_stand_in_columns():
    summary = Summary(Sampling(16, 4))
    reasons = (*media.REASONS, CRASHED, TIMED_OUT)
    for reason in reasons:
        summary.add(survey.Finding(f"/videos/{reason}.mp4", error=reason))
    lines = list(summary.lines())
    rows = lines[2 : 2 + len(reasons)]
    assert {line.index(" 1 ") for line in rows} == {lines[1].rindex("s ") - 2}


def test_a_summary_of_one_video():
    summary = Summary(Sampling(16, 4))
    summary.add(survey.Finding("a", 9, 64, 48, 30.0, "h264", clip_secs=0.1))
    lines = list(summary.lines())
    assert lines[0] == "1 video: 1 readable, 0 not"
    assert lines[-1] == "\n1 video is shorter than a clip: its last frame is repeated"


def test_unreadable_videos_are_listed_with_details_that_their_reason_lacks():
    summary = Summary(Sampling(16, 4))
    for reason, detail in [
        ("empty", "Invalid argument"),
        ("missing", "No such file or directory"),
        ("unreadable", "Permission denied"),
        ("no_frames", ""),
    ]:
        summary.add(survey.Finding(f"{reason}.mp4", error=reason, detail=detail))
    assert list(summary.lines())[-5:] == [
        "\nunreadable",
        "  empty.mp4: empty",
        "  missing.mp4: missing",
        "  unreadable.mp4: unreadable (Permission denied)",
        "  no_frames.mp4: no_frames",
    ]
    for _ in range(30):
        summary.add(survey.Finding("more.mp4", error="empty"))
    assert "\nunreadable, the first 20 of 34" in list(summary.lines())


def test_host_cores_grow_with_the_model_and_the_chip():
    config = defaults.get_config()
    config.model.encoder.size = "base"
    base = check.flops_per_clip(config)
    config.model.encoder.size = "large"
    large = check.flops_per_clip(config)
    assert large > 2 * base
    rates = [check.clips_per_second(large, chip) for chip in ("v5e", "v5p", "H200")]
    assert rates == sorted(rates)
    assert check.clips_per_second(base, "v5e") * base == pytest.approx(197e12 / 2)


def test_several_sources_are_examined_together(tmp_path):
    paths = []
    for i, names in enumerate([("a", "b"), ("c",), ("d", "e", "f")]):
        paths.append(tmp_path / f"{i}.csv")
        paths[-1].write_text("".join(f"{name}.mp4 {ord(name)}\n" for name in names))
        (tmp_path / f"{names[0]}.mp4").touch()
    joined = ",".join(map(str, paths))
    together = Joined(open_mixture(joined).sources)
    expected = [f"{tmp_path}/{name}.mp4" for name in "abcdef"]
    assert [record.path for record in together] == expected
    assert [together.path_of(i) for i in range(-6, 0)] == expected
    assert together.labels.tolist() == [ord(name) for name in "abcdef"]
    done = run(f"--data={joined}", f"--output={tmp_path}/o.jsonl", "--workers=1")
    assert done.returncode == check.EXIT_TOO_MANY_BAD, done.stderr
    errors = ["empty", "missing", "empty", "empty", "missing", "missing"]
    assert [line["error"] for line in read_lines(tmp_path / "o.jsonl")] == errors
