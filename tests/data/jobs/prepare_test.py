"""Shards: encoded on Apache Beam, stopped and continued, never mixed with others."""

import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from video_files import (
    decode_content,
    decode_plainly,
    moving_frames,
    psnr,
    write_video,
)

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.jobs import encode_shards, reencode
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.open import open_source

# One process, no servers: what is tested here does not depend on the runner.
IN_MEMORY = ("--direct_running_mode=in_memory", "--direct_num_workers=1")


def test_every_input_has_one_shard():
    for num_inputs in (1, 2, 17, 1000, 123457):
        count = min(encode_shards.default_num_shards(num_inputs), num_inputs)
        job = encode_shards.Job("", "", num_inputs, count, reencode.Encoding())
        parts = [job.inputs_of(i) for i in range(count)]
        assert [i for part in parts for i in part] == list(range(num_inputs))
        assert all(1 <= len(part) <= 512 for part in parts)


@pytest.fixture
def folder(tmp_path):
    """Six videos in two classes, and a file that is not a video."""
    for i in range(6):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.mp4"
        write_video(path, moving_frames(4 + i, seed=i))
    (tmp_path / "in" / "b" / "bad.mp4").write_bytes(b"no video")
    return tmp_path


def prepare(folder, **settings):
    pytest.importorskip(
        "apache_beam", reason="Beam is missing: pip install 'vjepa_jax[prepare]'"
    )
    arguments = {"num_shards": 3, "max_bad_fraction": 0.2, **settings}
    encoding = reencode.Encoding(
        **{k: arguments.pop(k) for k in ("gop", "crf") if k in arguments}
    )
    source = open_source(str(folder / "in"))
    return encode_shards.prepare(
        source, str(folder / "out"), encoding, beam_options=IN_MEMORY, **arguments
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@pytest.mark.beam
def test_a_folder_becomes_shards(folder):
    manifest = prepare(folder)
    assert (manifest["num_records"], manifest["num_failures"]) == (6, 1)
    source = open_source(str(folder / "out"))
    assert source.class_names == ["a", "b"]
    original = open_source(str(folder / "in"))
    good = [i for i in range(len(original)) if "bad" not in original.path_of(i)]
    for record, index in zip(map(source.read, range(6)), good, strict=True):
        assert record.path == original.path_of(index)
        assert (record.id, record.label) == (original.entry(index), index // 3)
        frames, expected = decode_content(record.video), decode_plainly(record.path)
        assert len(frames) == record.num_frames == len(expected)
        assert psnr(frames, expected) > 36
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (failure,) = map(
        json.loads, (folder / "out/failures.jsonl").read_text().splitlines()
    )
    assert failure["reason"] == "not_a_video" and failure["path"].endswith("bad.mp4")
    assert "Invalid data" in failure["detail"]
    assert shards.verify(str(folder / "out")) == 6
    names = [name for name in contents(folder) if ".part" in name or "inputs" in name]
    assert not names


@pytest.mark.beam
def test_a_stopped_run_continues_with_the_missing_shards(folder, monkeypatch):
    begun, reencode_apart = [], encode_shards.reencode_apart

    def stopped(path, encoding):
        begun.append(path)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return reencode_apart(path, encoding)

    monkeypatch.setattr(encode_shards, "reencode_apart", stopped)
    with pytest.raises(BaseException):  # noqa: B017 Beam wraps some of them
        prepare(folder)
    with pytest.raises(UserError, match="not complete"):
        open_source(str(folder / "out"))
    done = [name for name in contents(folder) if name.endswith(shards.SUFFIX)]
    begun.clear()

    def counted(path, encoding):
        begun.append(path)
        return reencode_apart(path, encoding)

    monkeypatch.setattr(encode_shards, "reencode_apart", counted)
    prepare(folder)
    assert 0 < len(done) < 3 and 0 < len(begun) < 7
    resumed = contents(folder)

    begun.clear()
    prepare(folder)
    assert not begun and contents(folder) == resumed

    # Neither a damaged shard nor a lost one is kept.
    (first, second) = sorted(n for n in resumed if n.endswith(shards.SUFFIX))[:2]
    (folder / "out" / second).unlink()
    with open(folder / "out" / first, "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    prepare(folder)
    assert len(begun) == 4 and shards.verify(str(folder / "out")) == 6
    assert open_source(str(folder / "out"))


@pytest.mark.beam
def test_other_settings_or_videos_are_refused(folder):
    prepare(folder)
    before = contents(folder)
    with pytest.raises(UserError, match="made with gop=12, not 6"):
        prepare(folder, gop=6)
    with pytest.raises(UserError, match="made with num_shards=3, not 2, crf=20, not 9"):
        prepare(folder, num_shards=2, crf=9)
    prepare(folder, num_shards=0)  # as it was
    write_video(folder / "in/a/new.mp4", moving_frames(2))
    with pytest.raises(UserError, match="of other videos"):
        prepare(folder)
    assert contents(folder) == before


@pytest.mark.beam
def test_the_same_names_elsewhere_are_other_videos(folder):
    prepare(folder)
    before = contents(folder)
    shutil.copytree(folder / "in", folder / "in2")
    source = open_source(str(folder / "in2"))
    with pytest.raises(UserError, match=r"in'; its list equals that of .*in2"):
        encode_shards.prepare(source, str(folder / "out"), reencode.Encoding())
    assert contents(folder) == before
    # Nor where only the notes are left.
    (folder / "out" / shards.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"shard-.*\.json' belongs to other shards"):
        encode_shards.prepare(source, str(folder / "out"), reencode.Encoding())


@pytest.mark.beam
def test_a_damaged_manifest_is_written_again(folder):
    """Each message about the damage names the fix."""
    prepare(folder)
    before, path = contents(folder), folder / "out" / shards.MANIFEST
    for damage in (before[shards.MANIFEST][:40], b"[]", None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        for look in (open_source, shards.verify):
            with pytest.raises(UserError, match=r"run vjepa_jax\.prepare"):
                look(str(folder / "out"))
        prepare(folder, num_shards=0)
        assert contents(folder) == before


@pytest.mark.beam
def test_damaged_notes_have_their_shards_written_again(folder):
    prepare(folder)
    before = contents(folder)
    for number, note in enumerate(("{}", "[]", "cut")):
        name = shards.shard_name(number, 3)
        (folder / "out" / f"{name}.json").write_text(note)
    prepare(folder)
    assert contents(folder) == before


@pytest.mark.beam
def test_fixed_failures_are_retried(folder):
    prepare(folder)
    write_video(folder / "in/b/bad.mp4", moving_frames(5))
    assert prepare(folder)["num_failures"] == 1
    manifest = prepare(folder, retry_failures=True)
    assert (manifest["num_records"], manifest["num_failures"]) == (7, 0)
    assert not (folder / "out" / shards.FAILURES).read_bytes()
    assert shards.verify(str(folder / "out")) == 7


@pytest.mark.beam
def test_too_many_failures_end_the_run_but_lose_nothing(folder):
    with pytest.raises(UserError, match="1 of 7 videos failed, listed in") as caught:
        prepare(folder, max_bad_fraction=0.1)
    assert "--max_bad_fraction=0.1" in str(caught.value)
    assert "--retry_failures" in str(caught.value)
    kept = contents(folder)
    assert shards.MANIFEST not in kept and kept["failures.jsonl"]
    prepare(folder)
    for name, content in contents(folder).items():
        if name.endswith(shards.SUFFIX):
            assert content == kept[name]
    # A finished folder is then incomplete again.
    with pytest.raises(UserError, match="1 of 7 videos failed"):
        prepare(folder, max_bad_fraction=0.1)
    assert shards.MANIFEST not in contents(folder)


@pytest.mark.beam
def test_foreign_folders_are_left_alone(folder):
    (folder / "out").mkdir()
    (folder / "out" / shards.MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="does not belong to shards"):
        prepare(folder)
    (folder / "file").touch()
    source = open_source(str(folder / "in"))
    with pytest.raises(UserError, match="is not a folder"):
        encode_shards.prepare(source, str(folder / "file"), reencode.Encoding())
    with pytest.raises(UserError, match="--output=/proc/foo cannot be made"):
        encode_shards.prepare(source, "/proc/foo", reencode.Encoding())


@pytest.mark.beam
@pytest.mark.parametrize(
    "options, message",
    [
        (["--runner=NoSuchRunner"], "rejects .* Unexpected pipeline runner"),
        (["--direct_num_workers=abc"], "rejects .* invalid int value: 'abc'"),
        (["--nonsense=3"], "no option --nonsense"),
        (["--direct_running_mode=multi_processing"], "is not supported"),
        (["--runner=DataflowRunner"], "rejects .* temp_location"),
    ],
)
def test_wrong_beam_options_get_one_line(options, message, capfd):
    pytest.importorskip("apache_beam", reason="Beam is missing")
    with pytest.raises(UserError, match=message) as caught:
        encode_shards.run_on_beam(print, range(3), options)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.beam
@pytest.mark.parametrize("runner", [[], ["--runner", "DirectRunner"]])
def test_every_number_is_worked_on(tmp_path, runner):
    pytest.importorskip("apache_beam", reason="Beam is missing")
    touch = functools.partial(touch_in, str(tmp_path))
    encode_shards.run_on_beam(touch, range(9), [*runner, "--direct_num_workers=3"])
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(9)))


def touch_in(folder, number):
    (pathlib.Path(folder) / str(number)).touch(exist_ok=False)


def command(*arguments):
    return [sys.executable, "-m", "vjepa_jax.prepare", *map(str, arguments)]


@pytest.mark.beam
def test_the_command_prints_little(folder):
    pytest.importorskip("apache_beam", reason="Beam is missing")
    arguments = [f"--data={folder / 'in'}", f"--output={folder / 'out'}"]
    arguments += ["--num_shards=2", "--max_bad_fraction=0.5"]
    ended = subprocess.run(
        command(*arguments, "--", "--direct_num_workers=2"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    *progress, last = ended.stderr.splitlines()
    assert last.startswith("6 videos in 2 shards") and "--retry_failures" in last
    assert all(line.startswith("preparing: ") for line in progress if line)
    ended = subprocess.run(
        command("--verify", arguments[1]), capture_output=True, text=True, timeout=60
    )
    assert "6 records" in ended.stderr and ended.returncode == 0


def wait_for(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.beam
def test_an_interrupt_ends_the_command_and_its_processes(tmp_path):
    pytest.importorskip("apache_beam", reason="Beam is missing")
    write_video(tmp_path / "a.mp4", moving_frames(40))
    (tmp_path / "list.csv").write_text("a.mp4 0\n" * 5000)  # more than a minute
    process = subprocess.Popen(
        command(f"--data={tmp_path / 'list.csv'}", f"--output={tmp_path / 'out'}"),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def is_some_shard_begun():
        return any((tmp_path / "out").glob(".shard-*.part"))

    def are_all_gone():
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        wait_for(is_some_shard_begun)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, err = process.communicate(timeout=20)
        wait_for(are_all_gone)
    finally:
        if not are_all_gone():
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "\ninterrupted; the same command continues" in f"\n{err}", err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to prepare"),
        (["--data=x"], "--output is not set"),
        (["--data=/nowhere/at/all", "--output=x"], "does not exist"),
        (["--verify", "--output=/nowhere/at/all"], "does not exist"),
        (["--data=a,b", "--output=y"], "names one list or folder"),
        (["--data=x", "--output=y", "--max_bad_fraction=nan"], "must lie in 0..1"),
        (["--data=x", "--output=y", "--max_bad_fraction=1.5"], "must lie in 0..1"),
        (["--data=x", "--output=y", "--crf=90"], "--crf must lie in 0..51"),
    ],
)
def test_wrong_commands_get_one_line(arguments, message):
    ended = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr
