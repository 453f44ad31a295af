"""A video that crashes or holds its process costs that video only."""

import concurrent.futures
import multiprocessing
import os
import signal

import pytest
from video_files import decode_plainly, moving_frames, write_video

from vjepa_jax.data.jobs import encoders
from vjepa_jax.data.jobs.children import CRASHED, TIMED_OUT
from vjepa_jax.data.jobs.reencode import Encoding, reencode


@pytest.fixture(autouse=True)
def no_children_are_left():
    encoders.end_children()
    yield
    encoders.end_children()
    assert not multiprocessing.active_children()


def answer_by_name(question):
    """Stands in for `reencode`, in the process; paths say what is to happen."""
    path, _ = question
    word = os.path.basename(path)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "die once" and not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    return word


def test_deaths_and_hangs_are_failures_of_their_video(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "_answer", answer_by_name)
    monkeypatch.setattr(encoders, "_TIMEOUT_SECS", 2.0)

    def ask(word):
        return encoders.reencode_apart(str(tmp_path / word), Encoding())

    assert ask("good") == "good"
    died = ask("die")
    assert (died.reason, died.detail) == (CRASHED, "Killed")
    assert ask("hang").reason == TIMED_OUT
    assert ask("die once") == "die once"
    assert ask("good") == "good"


def test_threads_have_a_process_each(tmp_path):
    paths = [
        write_video(tmp_path / f"{i}.mp4", moving_frames(4 + i, seed=i))
        for i in range(6)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        videos = list(
            pool.map(encoders.reencode_apart, paths, [Encoding()] * len(paths))
        )
    assert videos == [reencode(path, Encoding()) for path in paths]
    assert len(multiprocessing.active_children()) == 2
    assert len(decode_plainly(paths[5])) == videos[5].num_frames


def test_reasons_come_with_details(tmp_path):
    (tmp_path / "a.mp4").write_text("no video" * 100)
    failure = encoders.reencode_apart(str(tmp_path / "a.mp4"), Encoding())
    assert failure.reason == "not_a_video" and "Invalid data" in failure.detail
    missing = encoders.reencode_apart(str(tmp_path / "b.mp4"), Encoding())
    assert missing == encoders.Failure("missing", "")
