"""Starts several processes of one run of `process_config` on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import process_config

ROOT = pathlib.Path(__file__).parents[2]
# A process that compiles on a busy machine must not count as dead.
HEARTBEAT_SECS = 30
# Longest wait for anything. It only ends tests that would hang, so it suits the busiest
# machine.
TIMEOUT_SECS = 1800


def reserve_port() -> tuple[socket.socket, int]:
    """Reserve a free port until the returned socket is closed.

    No other program gets it as a free port, but gRPC can listen on it, since it binds
    with SO_REUSEPORT as well.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("localhost", 0))
    return holder, holder.getsockname()[1]


class Group:
    """Processes of one run, of two devices each."""

    def __init__(self, folder, workdir, count, *flags, hold=None):
        """Start the processes.

        Args:
          folder: of the videos; the processes' stderr goes to files there.
          workdir: of the run.
          count: number of processes.
          *flags: further flags of the command.
          hold: (rank, step, file): this process waits in this step for the file.
        """
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Compiled in a hurry: they compute little, and each has to compile.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
            "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        }
        self._port_holder, port = reserve_port()
        self._files = [
            folder / f"{workdir.name}_{count}_{rank}.stderr" for rank in range(count)
        ]
        self.processes = []
        for rank, file in enumerate(self._files):
            is_held = hold is not None and hold[0] == rank
            command = [
                sys.executable,
                "-m",
                "vjepa_jax.train",
                f"--config={process_config.__file__}:{folder}",
                f"--workdir={workdir}",
                f"--coordinator_address=localhost:{port}",
                f"--num_processes={count}",
                f"--process_id={rank}",
                f"--start_timeout_secs={TIMEOUT_SECS}",
                f"--heartbeat_timeout_secs={HEARTBEAT_SECS}",
                *flags,
            ]
            with file.open("w") as output:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=env | (process_config.hold(*hold[1:]) if is_held else {}),
                    stderr=output,
                )
            self.processes.append(process)

    def text(self, rank: int) -> str:
        """Return what a process has written to stderr so far."""
        return self._files[rank].read_text()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Wait for a condition; fail if a process ends before."""
        deadline = time.monotonic() + TIMEOUT_SECS
        while not happened():
            codes = [process.poll() for process in self.processes]
            if set(codes) != {None} or time.monotonic() > deadline:
                texts = self._kill()
                raise AssertionError("\n\n".join([f"exit codes {codes}", *texts]))
            time.sleep(0.01)

    def end(self) -> tuple[list[int], list[str]]:
        """Wait for all; return their exit codes and what they wrote to stderr."""
        deadline = time.monotonic() + TIMEOUT_SECS
        try:
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            texts = self._kill()
        return [process.returncode for process in self.processes], texts

    def _kill(self) -> list[str]:
        for process in self.processes:
            process.kill()
            process.wait()
        self._port_holder.close()
        return [self.text(rank) for rank in range(len(self.processes))]
