"""Start-up of a run over several processes.

Every process runs the same command. On one machine nothing here does anything.
"""

import os

import jax
from jax.experimental import multihost_utils


def initialize() -> None:
    """Joins the cluster that the environment describes; call it before any computation.

    Recognised are `JAX_COORDINATOR_ADDRESS` (with `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`), a Slurm step of several tasks, and the worker list of a TPU pod.
    Does nothing where there is no cluster, or when called again.

    Where the other processes do not come up within 300 s, jax ends this one with a
    stack trace instead of raising: mostly the command runs on some of the hosts only.
    """
    if _is_cluster(os.environ) and not jax.distributed.is_initialized():
        jax.distributed.initialize(**_explicit_cluster(os.environ))


def process_index() -> int:
    """Rank of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes of the run."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process of the run has come to the barrier of this name."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _is_cluster(env) -> bool:
    if "JAX_COORDINATOR_ADDRESS" in env:
        return True
    # An interactive Slurm shell describes its allocation, but is not a step of tasks.
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return True
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ""
    return "," in workers


def _explicit_cluster(env) -> dict[str, int]:
    """Jax itself reads the address, but not the other two, from the environment."""
    if "JAX_COORDINATOR_ADDRESS" not in env:
        return {}
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {key: int(env[name]) for key, name in names.items() if name in env}
