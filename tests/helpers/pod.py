"""Runs launch/tpu.sh in a separate checkout, with a fake cloud on its PATH."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import fake_gcloud
import pytest

LINUX_ONLY = pytest.mark.skipif(
    sys.platform != "linux", reason="the commands of workers run here, which are Linux"
)
ROOT = pathlib.Path(__file__).parents[2]
CREATE = ("--zone=us-z", "--accelerator-type=v5litepod-16")
TIMEOUT_SECS = 180  # of one command, on a busy machine
TRAIN = ("--config=configs/x.py:a,b", "--workdir=gs://bucket/run")


class Pod:
    """A checkout, a fake cloud, and tpu.sh between them."""

    def __init__(self, folder: pathlib.Path, **plan):
        self.cloud, self.repo = folder / "cloud", folder / "repo"
        self.cloud.mkdir()
        fake_gcloud.install(self.cloud, **plan)
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        (self.repo / "pyproject.toml").write_text("# pins\n")
        (self.repo / "a file.txt").write_text("tracked\n")
        (self.repo / "untracked.txt").write_text("not tracked\n")
        git = ["git", "-C", self.repo]
        subprocess.run([*git, "init", "-q"], check=True)
        tracked = ("launch", "pyproject.toml", "a file.txt")
        subprocess.run([*git, "add", *tracked], check=True)
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
        out, err = process.communicate(stdin, timeout=TIMEOUT_SECS)
        assert process.returncode == code, f"{argv}: {process.returncode}\n{out}{err}"
        return out, err

    def read(self, name: str) -> list:
        """Return the lines of one of the cloud's files."""
        path = self.cloud / name
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def verbs(self) -> list[str]:
        """Return the verbs of the calls of gcloud, except reads of states."""
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

    def stub(self, name: str, script: str) -> None:
        """Add a program to tpu.sh's PATH, before the machine's of that name."""
        path = self.cloud / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def end(self) -> None:
        """End all processes of the workers."""
        fake_gcloud.kill_all(self.cloud)

    def wait_for(self, condition) -> None:
        """Wait until a condition holds that a worker fulfils in the background."""
        end = time.monotonic() + TIMEOUT_SECS
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.02)
