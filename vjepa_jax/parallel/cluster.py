"""Detect the processes of a run from the flags and the environment.

Nothing here waits or connects, except for requests to the metadata server of a TPU VM.
"""

import glob
import http.client
import importlib.util
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from absl import logging

from vjepa_jax.base.errors import UserError

_TPU_CHIPS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"
_METADATA_TIMEOUT_SECS = 5


def detect(
    env: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> dict[str, Any] | None:
    """Return arguments for `jax.distributed.initialize`, or None for a single process.

    It recognises: an explicit description, by the arguments or by the variables
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (or the index of
    a Kubernetes pod); a Slurm step of several tasks; a TPU pod, or several slices; an
    indexed Kubernetes job, if the package `kubernetes` is installed.

    Args:
      env: the environment.
      coordinator_address: `host:port` of the first process. This and the following
        arguments take precedence over `env`.
      num_processes: number of processes of the run.
      process_id: rank of this process, from 0.

    Returns:
      The arguments; jax detects those that are missing in the same environment.

    Raises:
      UserError: the description is incomplete or inconsistent.
    """
    address = coordinator_address or env.get("JAX_COORDINATOR_ADDRESS")
    count = _first(num_processes, _number(env, "JAX_NUM_PROCESSES"))
    index = _first(process_id, _number(env, "JAX_PROCESS_ID"))
    if count == 1:
        return None
    is_slurm = _is_slurm_step(env)
    if address and index is None and not is_slurm:
        index = _number(env, "JOB_COMPLETION_INDEX")
    given = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if is_slurm:
        return given | _slurm_devices(env)
    if address and count is not None and index is not None:
        _check_explicit(address, count, index)
        return given
    if _is_tpu_pod(env):
        return given
    if given:
        missing = {"coordinator_address", "num_processes", "process_id"} - given.keys()
        raise UserError(
            f"--{', --'.join(sorted(missing))}: not given, and neither Slurm nor a TPU "
            "pod provides it; give all three, by flags or as JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    return {} if _is_kubernetes_job(env) else None


def require_one_process(env: Mapping[str, str]) -> None:
    """Raise UserError if the variables describe one of several processes."""
    if detect(env) is not None:
        raise UserError(
            "an evaluation is one process, but the environment variables describe one "
            "of several: start it once, outside of their job, or set "
            "JAX_NUM_PROCESSES=1 if it is alone"
        )


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if text and not text.isdecimal():
        raise UserError(
            f"{name}={text} in the environment is not a number: give 0 or more"
        )
    return int(text) if text else None


def _check_explicit(
    coordinator_address: str, num_processes: int, process_id: int
) -> None:
    if not re.fullmatch(r".+:\d+", coordinator_address):
        raise UserError(
            f"--coordinator_address={coordinator_address} has no port: give host:port "
            "of the first process, with a port that is free on its host"
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} is too large for --num_processes="
            f"{num_processes}: number the processes from 0 to {num_processes - 1}"
        )


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    # An interactive Slurm shell has SLURM_NTASKS too, but is not a step of tasks.
    return "SLURM_STEP_NODELIST" in env and (_number(env, "SLURM_NTASKS") or 1) > 1


def _slurm_devices(env: Mapping[str, str]) -> dict[str, list[int]]:
    """Choose this task's GPUs; by default jax takes one, by the task's local index.

    A task that Slurm bound to GPUs sees only these, numbered from 0. Otherwise the GPUs
    of a node are divided among its tasks.
    """
    on_node = _number(env, "SLURM_GPUS_ON_NODE")
    if not on_node or env.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    visible = len([d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d])
    if 0 < visible < on_node:
        return {"local_device_ids": list(range(visible))}
    nodes = _number(env, "SLURM_STEP_NUM_NODES") or 1
    tasks = max((_number(env, "SLURM_NTASKS") or 1) // nodes, 1)
    share = max(on_node // tasks, 1)
    first = (_number(env, "SLURM_LOCALID") or 0) * share
    return {"local_device_ids": list(range(first, first + share))}


def _is_tpu_pod(env: Mapping[str, str]) -> bool:
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None or "MEGASCALE_NUM_SLICES" in env:
        return "," in (workers or "") or (_number(env, "MEGASCALE_NUM_SLICES") or 1) > 1
    has_chips = any(glob.glob(pattern) for pattern in _TPU_CHIPS)
    # The same variable keeps jax and libtpu from querying the metadata server.
    if not has_chips or "TPU_SKIP_MDS_QUERY" in env:
        return False
    try:
        slices = re.search(r"MEGASCALE_NUM_SLICES: '?(\d+)", _metadata(env, "tpu-env"))
        if slices and int(slices[1]) > 1:
            return True
        return "," in _metadata(env, "worker-network-endpoints")
    except (OSError, http.client.HTTPException) as error:
        logging.warning(
            "the metadata server does not answer (%s): assuming that this TPU machine "
            "is the only one of its run; otherwise give --coordinator_address, "
            "--num_processes and --process_id",
            error,
        )
        return False


def _metadata(env: Mapping[str, str], key: str) -> str:
    """Return a value of the machine's metadata server; "" if the key is unknown."""
    host = env.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        _METADATA.format(host, key), headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_METADATA_TIMEOUT_SECS) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def _is_kubernetes_job(env: Mapping[str, str]) -> bool:
    index = _number(env, "JOB_COMPLETION_INDEX")
    if index is None or "KUBERNETES_SERVICE_HOST" not in env:
        return False
    if importlib.util.find_spec("kubernetes") is not None:
        return True
    # Pod 0 may be the only one; a higher index proves that there are others.
    if index > 0:
        raise UserError(
            f"this is pod {index} of an indexed Kubernetes job, but the number of pods "
            "is unknown: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the "
            "pods' environment (JAX_NUM_PROCESSES=1 if each pod is a run of its own), "
            "or install jax[k8s]"
        )
    return False
