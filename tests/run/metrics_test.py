"""Metric files survive kills and resumes; the clock accounts for all time."""

import io
import json
import math
import os

import event_files
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from vjepa_jax.parallel import distributed
from vjepa_jax.run import metrics
from vjepa_jax.run.goodput import TimeAccount


class Terminal(io.StringIO):
    def isatty(self):
        return True


def write_steps(workdir, steps, start_step=0):
    with metrics.MetricWriter(
        workdir, total_steps=100, start_step=start_step, stream=io.StringIO()
    ) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step / 3})


def steps_in(workdir):
    return [row["step"] for row in metrics.read_metrics(workdir)]


@pytest.fixture
def clock_time(monkeypatch):
    """Replace the clock by one that this function advances."""
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_values_are_read_back_exactly(tmp_path):
    values = {"a": 1 / 3, "b": float(np.float32(0.1)), "c": 1e-300, "d": 2.0}
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write(7, values)
    line = (tmp_path / metrics.FILE).read_text()
    assert line.startswith('{"step": 7, ')
    assert metrics.read_metrics(tmp_path / metrics.FILE) == [{"step": 7} | values]


def test_array_scalars_are_accepted(tmp_path):
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write(np.int64(1), {"a": np.float32(0.5)})
    assert metrics.read_metrics(tmp_path) == [{"step": 1, "a": 0.5}]


def test_lines_are_valid_json_when_values_are_not_finite(tmp_path):
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    line = json.loads(
        (tmp_path / metrics.FILE).read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    assert line == {"step": 1, "a": None, "b": None, "c": 1.0}
    (row,) = metrics.read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert math.isnan(row["b"])


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write(1, {"a": 1.0})
        assert steps_in(tmp_path) == [1]


def test_resume_drops_steps_above_the_checkpoint(tmp_path):
    write_steps(tmp_path, [10, 20, 30])
    write_steps(tmp_path, [30, 40], start_step=20)
    assert steps_in(tmp_path) == [10, 20, 30, 40]


def test_new_run_in_a_used_folder_starts_over(tmp_path):
    write_steps(tmp_path, [10, 20])
    write_steps(tmp_path, [10])
    assert steps_in(tmp_path) == [10]


@pytest.mark.parametrize("tail", ['{"step": 20, "train/lo', '{"step": 20}', "\0\0\n"])
def test_line_cut_off_by_a_kill_is_dropped(tmp_path, tail):
    write_steps(tmp_path, [10])
    with open(tmp_path / metrics.FILE, "a") as file:
        file.write(tail)
    assert steps_in(tmp_path) == [10]
    write_steps(tmp_path, [20], start_step=10)
    assert steps_in(tmp_path) == [10, 20]
    assert len((tmp_path / metrics.FILE).read_text().splitlines()) == 2


def test_resume_leaves_the_old_file_when_it_is_killed(tmp_path, monkeypatch):
    write_steps(tmp_path, [10, 20])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_steps(tmp_path, [], start_step=10)
    assert steps_in(tmp_path) == [10, 20]


def test_tensorboard_gets_every_scalar(tmp_path):
    write_steps(tmp_path, [10, 20])
    assert [
        (event.step, value.tag, value.simple_value)
        for event in event_files.read(tmp_path)
        for value in event.summary.value
    ] == [
        (10, "train/loss", pytest.approx(10 / 3)),
        (20, "train/loss", pytest.approx(20 / 3)),
    ]


def test_tensorboard_hides_steps_above_the_checkpoint(tmp_path):
    write_steps(tmp_path, [30], start_step=20)
    starts = [
        event.step
        for event in event_files.read(tmp_path)
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts == [21]


def test_tensorboard_gets_images_as_they_are(tmp_path, rng):
    pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write_images(4, {"masks/0": pixels})
    (found,) = event_files.images(tmp_path)
    assert found[:2] == (4, "masks/0")
    np.testing.assert_array_equal(found[2], pixels)


def test_lines_stand_below_the_progress_and_stay(tmp_path):
    stream = Terminal()
    with metrics.MetricWriter(tmp_path, total_steps=9, stream=stream) as writer:
        writer.write(1, {"train/loss": 1.0})
        writer.write(1, {"eval/a/b": 2.0}, ["a: b 2", "c: d 3"])
        writer.write(2, {})
    assert stream.getvalue() == (
        "\rstep 1/9  loss 1.0000\na: b 2\nc: d 3\n\rstep 2/9\n"
    )
    assert [row["step"] for row in metrics.read_metrics(tmp_path)] == [1, 1, 2]


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    write_steps(tmp_path / "run", [10])
    assert not (tmp_path / "run").exists()


SCALARS = {
    "train/loss": 0.51234,
    "optim/learning_rate": 1.5e-4,
    "perf/clips_per_second": 240.04,
    "data/wait_fraction": 0.031,
    "perf/seconds_left": 80.0,
    "train/grad_norm": 3.0,
}


def test_progress_line_shows_what_it_is_given():
    line = metrics.ProgressLine(100, io.StringIO())
    assert line.format(20, {}) == "step 20/100"
    assert line.format(20, SCALARS) == (
        "step 20/100  loss 0.5123  learning rate 1.50e-04  240.0 clips/s  "
        "data wait 3%  left 1 m 20 s"
    )


def test_progress_is_one_line_each_in_a_file():
    stream = io.StringIO()
    line = metrics.ProgressLine(100, stream)
    line.show(1, {})
    line.show(2, {})
    line.close()
    assert stream.getvalue() == "step 1/100\nstep 2/100\n"


def test_progress_is_rewritten_in_place_on_a_terminal():
    stream = Terminal()
    line = metrics.ProgressLine(100, stream)
    line.show(1, {"train/loss": 1.0})
    line.show(2, {})
    line.close()
    first, last = stream.getvalue().split("\r")[1:]
    assert last.startswith("step 2/100 ")
    assert len(last.rstrip("\n")) == len(first)
    assert last.endswith("\n")


def test_progress_survives_a_loss_that_is_not_finite(tmp_path):
    line = metrics.ProgressLine(100, io.StringIO())
    text = line.format(1, {"train/loss": math.nan, "perf/seconds_left": math.nan})
    assert text == "step 1/100  loss nan  left ?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4, "4 s"), (80, "1 m 20 s"), (7260, "2 h 1 m"), (3 * 86400, "3 d 0 h")],
)
def test_time_left_has_two_units(seconds, text):
    line = metrics.ProgressLine(100, io.StringIO())
    assert line.format(1, {"perf/seconds_left": seconds}).endswith(f"left {text}")


def test_clock_splits_the_window(clock_time):
    account = TimeAccount()
    clock = metrics.StepClock(account, total_steps=100, batch_size=8)
    for _ in range(2):
        with account.measure("data"):
            clock_time(1.0)
        with account.measure("step"):
            clock_time(2.0)
    with account.measure("checkpoint"):
        clock_time(2.0)
    with account.measure("evaluation"):
        clock_time(1.0)
    clock_time(1.0)
    scalars = clock.window(2)
    assert scalars == pytest.approx(
        {
            "perf/steps_per_second": 0.2,
            "perf/clips_per_second": 1.6,
            "perf/seconds_left": 98 * 5.0,
            "data/wait_fraction": 0.2,
            "perf/step_fraction": 0.4,
            "perf/checkpoint_fraction": 0.2,
            "perf/evaluation_fraction": 0.1,
            "perf/other_fraction": 0.1,
        }
    )


def test_windows_do_not_overlap(clock_time):
    account = TimeAccount()
    clock = metrics.StepClock(account, total_steps=100, batch_size=1, start_step=50)
    with account.measure("data"):
        clock_time(5.0)
    clock.window(60)
    clock_time(2.0)
    scalars = clock.window(70)
    assert scalars["data/wait_fraction"] == 0
    assert scalars["perf/steps_per_second"] == pytest.approx(5.0)


def test_time_left_forgets_the_compilation(clock_time):
    clock = metrics.StepClock(TimeAccount(), total_steps=100, batch_size=1)
    clock_time(1000.0)
    clock.window(10)
    clock_time(10.0)
    assert clock.window(20)["perf/seconds_left"] == pytest.approx(80.0)
    clock_time(20.0)
    # 0.7 * 1 s + 0.3 * 2 s a step.
    assert clock.window(30)["perf/seconds_left"] == pytest.approx(70 * 1.3)


def test_utilisation_needs_flops_and_peak(clock_time):
    clock = metrics.StepClock(
        TimeAccount(),
        total_steps=9,
        batch_size=4,
        flops_per_clip=3e12,
        peak_flops=48e12,
    )
    clock_time(1.0)
    scalars = clock.window(2)
    assert scalars["perf/tflops_per_second"] == pytest.approx(24.0)
    assert scalars["perf/mfu"] == pytest.approx(0.5)

    clock = metrics.StepClock(
        TimeAccount(), total_steps=9, batch_size=4, flops_per_clip=3e12
    )
    clock_time(1.0)
    assert "perf/mfu" not in clock.window(2)


def test_window_without_a_step_is_refused(clock_time):
    clock = metrics.StepClock(TimeAccount(), total_steps=9, batch_size=1, start_step=3)
    clock_time(1.0)
    with pytest.raises(ValueError, match="began at 3"):
        clock.window(3)


def test_unknown_part_is_refused():
    with pytest.raises(KeyError), TimeAccount().measure("decode"):
        pass


def test_host_memory_is_plausible():
    peak = metrics.memory_scalars()["perf/host_peak_gib"]
    assert 0.05 < peak < 100


def test_lines_that_are_not_of_a_step_are_skipped(tmp_path):
    file = tmp_path / metrics.FILE
    lines = ["[]", "3", "{}", '{"step": "4"}', '{"step": null}', '{"step": 2, "a": 1']
    file.write_text('{"step": 1, "a": 0.5}\n' + "\n".join(lines))
    assert metrics.read_metrics(str(file)) == [{"step": 1, "a": 0.5}]
