"""Workdirs in a remote store, here one in memory."""

import logging
import os

import pytest
from buckets import Bucket

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults
from vjepa_jax.run import workdirs


def stored():
    return {name.removeprefix("/b/run/"): Bucket().cat(name) for name in Bucket.store}


def test_files_are_continued_and_copied_back(bucket):
    bucket({"gs://b/run/metrics.jsonl": b"1\n", "gs://b/run/big.bin": b"x"})
    with workdirs.LocalFiles("gs://b/run", fetched="*.jsonl") as files:
        assert [file.name for file in files.folder.iterdir()] == ["metrics.jsonl"]
        with open(files.folder / "metrics.jsonl", "a") as file:
            file.write("2\n")
        (files.folder / "profile").mkdir()
        (files.folder / "profile/trace").write_bytes(b"t")
        files.copy_back()
        assert stored()["metrics.jsonl"] == b"1\n2\n"
        (files.folder / "late.txt").write_text("z")
    assert not files.folder.exists()
    assert stored() == {
        "metrics.jsonl": b"1\n2\n",
        "big.bin": b"x",
        "profile/trace": b"t",
        "late.txt": b"z",
    }


def test_files_of_other_processes_are_not_changed(bucket):
    bucket({"gs://b/run/bad_videos_1.jsonl": b"old"})
    with workdirs.LocalFiles("gs://b/run", fetched="*.jsonl") as files:
        bucket({"gs://b/run/bad_videos_1.jsonl": b"newer"})  # by another process
        (files.folder / "metrics.jsonl").write_text("m")
    assert stored()["bad_videos_1.jsonl"] == b"newer"


def test_changes_are_copied_while_a_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(workdirs, "_EVERY_SECS", 0.01)
    with workdirs.LocalFiles("gs://b/run", fetched="*.jsonl") as files:
        (files.folder / "a").write_text("a")
        for _ in range(1000):
            if "a" in stored():
                break
            files._done.wait(0.01)
        assert stored()["a"] == b"a"


def test_a_copy_that_fails_is_logged_and_retried(bucket, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError("no network")

    with workdirs.LocalFiles("gs://b/run", fetched="*.jsonl") as files:
        (files.folder / "a").write_text("a")
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(Bucket, "_open", fail)
            files.copy_back()
        assert "a was not copied: no network" in caplog.text
    assert stored()["a"] == b"a"


def test_a_file_that_vanishes_is_skipped(bucket, monkeypatch):
    walk = os.walk

    def walk_with_ghosts(folder):
        for path, folders, names in walk(folder):
            yield path, folders, [*names, "renamed.tmp"]

    with workdirs.LocalFiles("gs://b/run", fetched="*.jsonl") as files:
        (files.folder / "a").write_text("a")
        monkeypatch.setattr(os, "walk", walk_with_ghosts)
    assert stored() == {"a": b"a"}


def test_a_local_workdir_is_used_directly(tmp_path):
    with workdirs.LocalFiles(str(tmp_path / "run"), fetched="*.jsonl") as files:
        assert files.folder == tmp_path / "run"
        (files.folder / "a").write_text("a")
        files.copy_back()
    assert (tmp_path / "run/a").read_text() == "a"


def test_a_remote_workdir_belongs_to_its_config(bucket):
    config = defaults.get_config()
    workdirs.require_no_other_run(config, "gs://b/run")
    workdirs.claim(config, "gs://b/run")
    workdirs.require_no_other_run(config, "gs://b/run")
    config.optim.learning_rate = 1.0
    with pytest.raises(UserError, match=r"optim\.learning_rate"):
        workdirs.require_no_other_run(config, "gs://b/run")


def test_a_store_that_fails_gives_one_line(bucket, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(Bucket, "exists", refuse)
    with pytest.raises(UserError, match="run cannot be read: no credentials"):
        workdirs.require_no_other_run(defaults.get_config(), "gs://b/run")
