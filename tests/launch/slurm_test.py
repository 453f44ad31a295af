"""launch/slurm.sh: the submitted script runs under a fake srun.

`UPDATE_GOLDEN=1 pytest tests/launch/slurm_test.py` rewrites its golden.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fake_slurm
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "goldens" / "launch" / "slurm.txt"
TRAIN = ("--config=configs/x.py:a,b", "--workdir=runs/x")
TIMEOUT_SECS = 180  # of a job, on a busy machine

# Stands where `python -m vjepa_jax.train` does: notes its arguments, then does what the
# test has planned for this attempt and rank.
TRAINER = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
rank, folder = int(os.environ["SLURM_PROCID"]), os.environ["FOLDER"]
plan = json.load(open(folder + "/plan.json"))
path = folder + f"/started-{rank}.jsonl"
attempt = len(open(path).readlines()) if os.path.exists(path) else 0
with open(path, "a") as file:
    given = [os.environ["SLURM_LOCALID"], os.environ["SRUN_CPUS_PER_TASK"]]
    file.write(json.dumps([sys.argv[1:], *given]) + "\\n")
print("attempt", attempt, flush=True)
outcome = plan[min(attempt, len(plan) - 1)]
if isinstance(outcome, list):
    outcome = outcome[rank]
if outcome == "wait":
    time.sleep(300)
sys.exit(outcome)
"""


class Cluster:
    """A working folder with the fake tools on its PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        fake_slurm.install(folder)
        (folder / "trainer.py").write_text(TRAINER)
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {folder}/trainer.py "$@"\n'
        )
        python.chmod(0o755)
        ours = ("SLURM_", "SRUN_", "TPU_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.env |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": str(python),
            "FOLDER": str(folder),
            "SLURM_RUN_BACKOFF_SECS": "0",
        }

    def submit(self, *argv: str, code: int = 0, plan=(0,)) -> tuple[str, str]:
        """Run slurm.sh; return (stdout, stderr)."""
        (self.folder / "plan.json").write_text(json.dumps(plan))
        done = subprocess.run(
            ["bash", str(ROOT / "launch" / "slurm.sh"), *argv],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout, done.stderr

    def start_job(self, restarts: int = 0) -> subprocess.Popen:
        """Start the script as Slurm does."""
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=self.folder,
            env=self.env | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_job(self, code: int = 0, restarts: int = 0) -> str:
        """Run the script to its end; return what it printed."""
        process = self.start_job(restarts)
        out, _ = process.communicate(timeout=TIMEOUT_SECS)
        assert process.returncode == code, out
        return out

    def started(self, rank: int) -> list:
        """Return the records of all starts of a rank."""
        path = self.folder / f"started-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def requeues(self) -> int:
        """Return how often the job was requeued."""
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path / "cluster")


SIZE = ("--nodes=2", "--gpus-per-node=2")


def test_dry_run_prints_the_script_and_submits_nothing(cluster):
    out, _ = cluster.submit(
        *SIZE,
        *("--partition=gpu", "--time=1:00:00", "--sbatch=--constraint=h100"),
        *("--dry-run", "--", *TRAIN, "--config.data.path=it's a $HOME"),
    )
    out = out.replace(cluster.env["PYTHON"], "PYTHON")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(out)
    assert out == GOLDEN.read_text()
    assert not (cluster.folder / "job.sh").exists()
    assert not (cluster.folder / "runs").exists()


def test_a_process_per_gpu_with_a_log_each(cluster):
    out, _ = cluster.submit(*SIZE, "--cpus-per-gpu=3", "--", *TRAIN)
    assert out == "Submitted batch job 7\n"
    assert "finished" in cluster.run_job()
    for rank in range(4):
        (given,) = cluster.started(rank)
        assert given == [["-m", "vjepa_jax.train", *TRAIN], str(rank % 2), "3"]
        log = cluster.folder / "runs" / "slurm" / f"job-7-{rank}.log"
        assert log.read_text() == "attempt 0\n"


@pytest.mark.parametrize("plan", [[[75, 75, 75, 75]], [[0, 143, 75, 130]]])
def test_an_interrupted_job_is_requeued(cluster, plan):
    cluster.submit(*SIZE, "--max-requeues=3", "--", *TRAIN, plan=plan)
    cluster.run_job(restarts=2)
    assert cluster.requeues() == 1
    out = cluster.run_job(restarts=3, code=75)
    assert "gave up after 3 requeues" in out
    assert cluster.requeues() == 1


def test_a_cancelled_job_does_not_come_back(cluster):
    cluster.submit(*SIZE, "--", *TRAIN, plan=[75])
    (cluster.folder / "state").write_text("CANCELLED")
    cluster.run_job(code=75)
    assert cluster.requeues() == 0


def test_a_mistake_is_not_repeated(cluster):
    cluster.submit(*SIZE, "--", *TRAIN, plan=[[75, 2, 75, 75]])
    cluster.run_job(code=2)
    assert cluster.requeues() == 0 and len(cluster.started(0)) == 1


def test_crashes_are_repeated_up_to_a_limit(cluster):
    cluster.submit(*SIZE, "--", *TRAIN, plan=[[75, 1, 75, 75], 0])
    cluster.run_job()
    assert len(cluster.started(3)) == 2
    cluster.submit(*SIZE, "--max-crashes=2", "--", *TRAIN, plan=[-9])
    out = cluster.run_job(code=1)
    assert "crash 2 of 2" in out and len(cluster.started(3)) == 4


def test_the_end_of_time_reaches_the_trainers(cluster):
    cluster.submit(*SIZE, "--", *TRAIN, plan=["wait"])
    process = cluster.start_job()
    end = time.monotonic() + TIMEOUT_SECS
    while not all(cluster.started(rank) for rank in range(4)):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_SECS)
    assert process.returncode == 0, out
    assert "saved (exit codes 75 75 75 75 )" in out
    assert cluster.requeues() == 1


HARD_TEXT = st.text("ab '\"\\$`!*?[]{}()<>|&;#~=%\n\t-é", min_size=1, max_size=12)


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(HARD_TEXT, min_size=4, max_size=8))
def test_any_argument_arrives_as_it_was(cluster, args):
    cluster.submit("--gpus-per-node=1", "--", *TRAIN, *args)
    cluster.run_job()
    assert cluster.started(0)[-1][0][2:] == [*TRAIN, *args]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give the trainer's flags after --"),
        (["--", "--config=x"], "give --workdir=DIR after --"),
        (["--nodes=two", "--", *TRAIN], "--nodes must be a whole number, got 'two'"),
        (["--node=2", "--", *TRAIN], "unknown flag --node"),
        (["--config=x", "--", *TRAIN], "unknown flag --config"),
        (["x", "--", *TRAIN], "unexpected 'x'"),
    ],
)
def test_a_mistake_is_one_line(cluster, argv, words):
    out, err = cluster.submit(*argv, code=2)
    assert err.startswith("error: ") and words in err
    assert len(err.splitlines()) == 1 and not out
