"""A video that crashes or blocks its process costs only that video."""

import concurrent.futures
import multiprocessing
import os
import signal

import pytest
from video_files import decode_plainly, moving_frames, write_video

from vjepa_jax.data.jobs import encode_shards
from vjepa_jax.data.jobs.reencode import Encoding, reencode
from vjepa_jax.data.jobs.worker_pool import CRASHED, TIMED_OUT, Failure


@pytest.fixture(autouse=True)
def no_processes_are_left():
    encode_shards.end_encoders()
    yield
    encode_shards.end_encoders()
    assert not multiprocessing.active_children()


def act_by_name(arguments):
    """Replace `reencode` in the process; the path names what happens."""
    path, _ = arguments
    word = os.path.basename(path)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if word == "die once" and not os.path.exists(path):
        open(path, "w").close()
        os._exit(1)
    return word


def test_a_crash_or_hang_is_a_failure_of_its_video(tmp_path, monkeypatch):
    monkeypatch.setattr(encode_shards, "_encode", act_by_name)
    monkeypatch.setattr(encode_shards, "_TIMEOUT_SECS", 2.0)

    def encode(word):
        return encode_shards.reencode_apart(str(tmp_path / word), Encoding())

    assert encode("good") == "good"
    died = encode("die")
    assert (died.reason, died.detail) == (CRASHED, "Killed")
    assert encode("hang").reason == TIMED_OUT
    assert encode("die once") == "die once"
    assert encode("good") == "good"


def test_threads_have_a_process_each(tmp_path):
    paths = [
        write_video(tmp_path / f"{i}.mp4", moving_frames(4 + i, seed=i))
        for i in range(6)
    ]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        videos = list(
            pool.map(encode_shards.reencode_apart, paths, [Encoding()] * len(paths))
        )
    assert videos == [reencode(path, Encoding()) for path in paths]
    assert len(multiprocessing.active_children()) == 2
    assert len(decode_plainly(paths[5])) == videos[5].num_frames


def test_reasons_come_with_details(tmp_path):
    (tmp_path / "a.mp4").write_text("no video" * 100)
    failure = encode_shards.reencode_apart(str(tmp_path / "a.mp4"), Encoding())
    assert failure.reason == "not_a_video" and "Invalid data" in failure.detail
    missing = encode_shards.reencode_apart(str(tmp_path / "b.mp4"), Encoding())
    assert missing == Failure("missing", "")
