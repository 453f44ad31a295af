"""A run that hangs is reported; one that makes progress is not."""

import threading
import time
import types

import pytest

from vjepa_jax.run import watch
from vjepa_jax.run.watch import Watchdog


def wait_until(condition, timeout_secs=30.0):
    end = time.monotonic() + timeout_secs
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.fixture
def stream(tmp_path):
    with open(tmp_path / "stderr", "w+") as file:
        yield file


def text_of(stream):
    stream.seek(0)
    return stream.read()


def test_stacks_of_all_threads_are_dumped_repeatedly(tmp_path, stream):
    release = threading.Event()

    def a_thread_that_hangs():
        release.wait()

    threading.Thread(target=a_thread_that_hangs, daemon=True).start()
    with Watchdog(str(tmp_path), 0.05, stream=stream) as dog:
        dog.finished(7)
        file = tmp_path / "stacks_0.txt"
        wait_until(lambda: file.exists() and file.read_text().count("no step") > 1)
    release.set()
    for text in (text_of(stream), file.read_text()):
        assert "process 0: no step ended for 0 s, the last was step 7" in text
        assert "a_thread_that_hangs" in text
        assert "test_stacks_of_all_threads" in text
    assert str(file) in text_of(stream)


def test_steps_prevent_dumps(tmp_path, stream):
    with Watchdog(str(tmp_path), 20.0, stream=stream) as dog:
        for step in range(3):
            dog.finished(step)
    with Watchdog(str(tmp_path), 0.0, stream=stream):
        time.sleep(0.05)
    assert text_of(stream) == "" and not (tmp_path / "stacks_0.txt").exists()


def test_a_step_restarts_the_timeout(tmp_path, stream, monkeypatch):
    now, dumps, looks = [0.0], [], []

    def monotonic():
        looks.append(now[0])
        return now[0]

    monkeypatch.setattr(watch, "time", types.SimpleNamespace(monotonic=monotonic))
    dog = Watchdog(str(tmp_path), 0.05, stream=stream)
    monkeypatch.setattr(dog, "_dump", dumps.append)
    with dog:
        for step in range(1, 5):
            now[0] = 0.04 * step
            dog.finished(step)
            looks.clear()
            wait_until(lambda: len(looks) > 4)  # at least twice
        assert not dumps
        now[0] += 0.06
        wait_until(lambda: dumps)
    assert dumps[0] == pytest.approx(0.06)


def test_a_pause_may_take_long(tmp_path, stream, monkeypatch):
    dumps = []
    dog = Watchdog(str(tmp_path), 0.1, stream=stream)
    monkeypatch.setattr(dog, "_dump", lambda secs: dumps.append(secs))
    with dog:
        with dog.paused():
            time.sleep(0.5)
            assert not dumps
            resumed = time.monotonic()
        wait_until(lambda: dumps)
        assert 0.1 <= dumps[0] <= time.monotonic() - resumed


def test_a_workdir_that_cannot_be_written_does_not_end_the_run(tmp_path, stream):
    with Watchdog(str(tmp_path / "gone"), 0.05, stream=stream):
        wait_until(lambda: "No such file" in text_of(stream))
