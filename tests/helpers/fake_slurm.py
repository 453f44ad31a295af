"""Fake `sbatch`, `srun` and `scontrol` in a folder; srun starts the processes.

`job.sh` is the submitted script, `state` the output of `scontrol show job` (RUNNING
without it), `requeued` holds a line per `scontrol requeue`.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys


def install(folder: pathlib.Path) -> None:
    """Write the executables to `folder/bin`."""
    (folder / "bin").mkdir(parents=True)
    here = pathlib.Path(__file__).resolve()
    for name in ("sbatch", "srun", "scontrol"):
        stub = folder / "bin" / name
        stub.write_text(
            f'#!/bin/sh\nexec {sys.executable} -IS {here} {folder} {name} "$@"\n'
        )
        stub.chmod(0o755)


def _sbatch(folder, argv):
    assert not argv
    (folder / "job.sh").write_text(sys.stdin.read())
    print("Submitted batch job 7")
    return 0


def _scontrol(folder, argv):
    if argv == ["requeue", "7"]:
        with (folder / "requeued").open("a") as file:
            file.write("7\n")
    elif argv == ["show", "job", "7"]:
        state = folder / "state"
        word = state.read_text() if state.exists() else "RUNNING"
        print(f"JobId=7 JobName=x\n   JobState={word} Reason=None")
    else:
        return 1
    return 0


def _srun(folder, argv):
    """Run the job's tasks; pass SIGTERM on; return the largest code."""
    script = (folder / "job.sh").read_text()
    tasks = int(re.search(r"^#SBATCH --ntasks=(\d+)$", script, re.M)[1])
    per_node = int(re.search(r"^#SBATCH --ntasks-per-node=(\d+)$", script, re.M)[1])
    flags = [a for a in argv[: argv.index("bash")] if a.startswith("--")]
    output = next(f for f in flags if f.startswith("--output=")).split("=", 1)[1]
    assert "--kill-on-bad-exit=0" in flags and "--open-mode=append" in flags
    processes = []
    for i in range(tasks):
        path = output.replace("%x", "job").replace("%j", "7").replace("%t", str(i))
        env = os.environ | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i % per_node)}
        with open(path, "a") as log:
            command = argv[len(flags) :]
            # A session each: srun signals all processes of a task.
            processes.append(
                subprocess.Popen(
                    command, env=env, stdout=log, stderr=log, start_new_session=True
                )
            )

    def forward(number, _):
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    signal.signal(signal.SIGTERM, forward)
    codes = [process.wait() for process in processes]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    _tool = {"sbatch": _sbatch, "srun": _srun, "scontrol": _scontrol}[sys.argv[2]]
    sys.exit(_tool(pathlib.Path(sys.argv[1]), sys.argv[3:]))
