"""Which processes a run consists of, as the flags and the environment tell it.

Nothing here waits or connects, except for one question to the metadata server of a TPU
machine.
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


def describe(
    env: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> dict[str, Any] | None:
    """Describe the cluster for `jax.distributed.initialize`; None: one process.

    Recognised are an address, given or in `JAX_COORDINATOR_ADDRESS` (with
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, for which the index of a Kubernetes pod
    will do); a Slurm step of several tasks; a TPU pod, or several slices; an indexed
    Kubernetes job, where the package `kubernetes` is installed.

    Args:
      env: the environment.
      coordinator_address: `host:port` of the first process; goes before `env`, like
        the other two.
      num_processes: of the run.
      process_id: of this process, from 0.

    Returns:
      Arguments; what is left out, jax finds out in the same environment.

    Raises:
      UserError: the description is incomplete or contradicts itself.
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
    if len(given) == 3:
        _check_explicit(**given)
        return given
    if _is_tpu_pod(env):
        return given
    if given:
        missing = {"coordinator_address", "num_processes", "process_id"} - given.keys()
        raise UserError(
            f"--{', --'.join(sorted(missing))}: not given, and neither Slurm nor a TPU "
            "pod to ask; give all three, by flags or as JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        )
    return {} if _is_kubernetes_job(env) else None


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is not a number from 0")
    return int(text) if text else None


def _check_explicit(
    coordinator_address: str, num_processes: int, process_id: int
) -> None:
    if not re.fullmatch(r".+:\d+", coordinator_address):
        raise UserError(
            f"--coordinator_address={coordinator_address} has no port: give host:port "
            "of the first process, with a port that is free there"
        )
    if process_id >= num_processes:
        raise UserError(
            f"--process_id={process_id} of --num_processes={num_processes}: "
            f"count the processes from 0 to {num_processes - 1}"
        )


def _is_slurm_step(env: Mapping[str, str]) -> bool:
    # An interactive Slurm shell describes its allocation, but is not a step of tasks.
    return "SLURM_STEP_NODELIST" in env and (_number(env, "SLURM_NTASKS") or 1) > 1


def _slurm_devices(env: Mapping[str, str]) -> dict[str, list[int]]:
    """Choose this task's GPUs; by itself jax takes one, the task's index on its node.

    A task that Slurm bound to GPUs sees these alone, and numbers them from 0;
    otherwise the tasks of a node share its GPUs out.
    """
    on_node = _number(env, "SLURM_GPUS_ON_NODE")
    if not on_node or env.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    visible = len([d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d])
    if 0 < visible < on_node:
        return {"local_device_ids": list(range(visible))}
    nodes = _number(env, "SLURM_STEP_NUM_NODES") or 1
    tasks = max(_number(env, "SLURM_NTASKS") // nodes, 1)
    share = max(on_node // tasks, 1)
    first = (_number(env, "SLURM_LOCALID") or 0) * share
    return {"local_device_ids": list(range(first, first + share))}


def _is_tpu_pod(env: Mapping[str, str]) -> bool:
    workers = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if workers is not None or "MEGASCALE_NUM_SLICES" in env:
        return "," in (workers or "") or (_number(env, "MEGASCALE_NUM_SLICES") or 1) > 1
    has_chips = any(glob.glob(pattern) for pattern in _TPU_CHIPS)
    # The same variable keeps jax and libtpu from asking.
    if not has_chips or "TPU_SKIP_MDS_QUERY" in env:
        return False
    try:
        slices = re.search(r"MEGASCALE_NUM_SLICES: '?(\d+)", _metadata(env, "tpu-env"))
        if slices and int(slices[1]) > 1:
            return True
        return "," in _metadata(env, "worker-network-endpoints")
    except (OSError, http.client.HTTPException) as error:
        logging.warning(
            "no metadata server answers (%s), so this TPU machine is taken for the "
            "only one of its run: where it is not, give --coordinator_address, "
            "--num_processes and --process_id",
            error,
        )
        return False


def _metadata(env: Mapping[str, str], key: str) -> str:
    """Ask the machine's metadata server; "" where it knows no such key."""
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
    # The first pod cannot know whether there are others.
    if index > 0:
        raise UserError(
            f"this is pod {index} of an indexed Kubernetes job, but how many there are "
            "is not known: set JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES in the "
            "pods' environment (JAX_NUM_PROCESSES=1 where each runs for itself), or "
            "install jax[k8s]"
        )
    return False
