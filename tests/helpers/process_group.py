"""Starts several processes of one run of `process_config` on this machine."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import process_config

ROOT = pathlib.Path(__file__).parents[2]
# Silence of a process that compiles on a busy machine must not count as its death.
HEARTBEAT_SECS = 30
TIMEOUT_SECS = 240


class Group:
    """Processes of one run, of two devices each."""

    def __init__(self, folder, workdir, count, *flags):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # Compiled in a hurry: they compute little, and each has to compile.
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
            "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        }
        self._outputs = [
            open(folder / f"{workdir.name}_{count}_{rank}.stderr", "w+")  # noqa: SIM115
            for rank in range(count)
        ]
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vjepa_jax.train",
                    f"--config={process_config.__file__}:{folder}",
                    f"--workdir={workdir}",
                    f"--coordinator_address=localhost:{port}",
                    f"--num_processes={count}",
                    f"--process_id={rank}",
                    f"--heartbeat_timeout_secs={HEARTBEAT_SECS}",
                    *flags,
                ],
                cwd=ROOT,
                env=env,
                stderr=output,
            )
            for rank, output in enumerate(self._outputs)
        ]

    def wait_until(self, happened):
        deadline = time.monotonic() + TIMEOUT_SECS
        while not happened():
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), (codes, self.end())
            assert time.monotonic() < deadline, "took too long"
            time.sleep(0.01)

    def end(self):
        """Wait for all; return their exit codes and what they wrote."""
        try:
            deadline = time.monotonic() + TIMEOUT_SECS
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0.1))
        finally:
            for process in self.processes:
                process.kill()
        texts = []
        for output in self._outputs:
            output.seek(0)
            texts.append(output.read())
            output.close()
        return [process.returncode for process in self.processes], texts
