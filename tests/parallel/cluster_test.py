"""Every description of the processes of a run is recognised or refused."""

import http.server
import importlib.util
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import cluster

ADDRESS = "host0:1234"
SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.fixture(autouse=True)
def no_chips(monkeypatch, tmp_path):
    """Hide this machine's chips; give a busy machine time to answer."""
    monkeypatch.setattr(cluster, "_TPU_CHIPS", (str(tmp_path / "accel*"),))
    monkeypatch.setattr(cluster, "_METADATA_TIMEOUT_SECS", 600)


def test_nothing_is_one_process():
    assert cluster.detect({}) is None
    assert cluster.detect({"JAX_NUM_PROCESSES": "1"}) is None
    assert cluster.detect({"JAX_COORDINATOR_ADDRESS": ADDRESS}, None, 1) is None
    # An interactive shell inside an allocation, and a step of one task.
    assert cluster.detect({"SLURM_NTASKS": "4"}) is None
    assert cluster.detect(SLURM | {"SLURM_NTASKS": "1"}) is None


def test_flags_take_precedence_over_the_environment():
    env = {
        "JAX_COORDINATOR_ADDRESS": ADDRESS,
        "JAX_NUM_PROCESSES": "4",
        "JAX_PROCESS_ID": "3",
    }
    of_env = {"coordinator_address": ADDRESS, "num_processes": 4, "process_id": 3}
    assert cluster.detect(env) == of_env
    of_flags = {"coordinator_address": "h:1", "num_processes": 2, "process_id": 0}
    assert cluster.detect(env, **of_flags) == of_flags
    assert cluster.detect(env, process_id=0) == of_env | {"process_id": 0}


def test_a_pod_of_an_indexed_job_knows_its_index():
    found = cluster.detect(POD, ADDRESS, 8)
    assert found == {
        "coordinator_address": ADDRESS,
        "num_processes": 8,
        "process_id": 3,
    }


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_kubernetes_job_needs_the_package_kubernetes(monkeypatch, is_installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: is_installed or None)
    if is_installed:
        assert cluster.detect(POD) == {}
    else:
        with pytest.raises(UserError, match=r"pod 3 .*JAX_NUM_PROCESSES"):
            cluster.detect(POD)
        assert cluster.detect(POD | {"JOB_COMPLETION_INDEX": "0"}) is None
        assert cluster.detect(POD | {"JAX_NUM_PROCESSES": "1"}) is None


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ((ADDRESS, 2, None), {}, "--process_id: not given"),
        ((ADDRESS, None, None), {}, "--num_processes, --process_id: not given"),
        ((None, 2, 0), {}, "--coordinator_address: not given"),
        (("host0", 2, 0), {}, "has no port"),
        ((ADDRESS, 2, 2), {}, "from 0 to 1"),
        ((ADDRESS, None, 0), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two"),
    ],
)
def test_an_incomplete_description_is_refused(arguments, env, message):
    with pytest.raises(UserError, match=message):
        cluster.detect(env, *arguments)


def test_slurm_is_detected_by_jax_except_for_given_values():
    assert cluster.detect(SLURM) == {}
    assert cluster.detect(SLURM, ADDRESS) == {"coordinator_address": ADDRESS}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 3))
def test_the_gpus_of_a_node_are_divided_among_its_tasks(tasks, each, nodes):
    env = SLURM | {
        "SLURM_GPUS_ON_NODE": str(tasks * each),
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(tasks * nodes),
    }
    taken = []
    for local in range(tasks):
        found = cluster.detect(env | {"SLURM_LOCALID": str(local)})
        taken += found["local_device_ids"]
    assert taken == [*range(tasks * each)]


def test_a_task_bound_to_gpus_takes_all_it_sees():
    env = SLURM | {"SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "3"}
    env |= {"SLURM_STEP_NUM_NODES": "1", "CUDA_VISIBLE_DEVICES": "6,7"}
    assert cluster.detect(env) == {"local_device_ids": [0, 1]}
    assert cluster.detect(env | {"JAX_LOCAL_DEVICE_IDS": "0"}) == {}


@pytest.mark.parametrize(
    ("env", "is_pod"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"MEGASCALE_NUM_SLICES": "1"}, False),
    ],
)
def test_tpu_workers_in_the_environment(env, is_pod):
    assert cluster.detect(env) == ({} if is_pod else None)


@pytest.fixture
def metadata_server():
    """Serve metadata: (address, answers)."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.rpartition("/")[2]
            is_asked_well = self.headers["Metadata-Flavor"] == "Google"
            is_known = key in answers and is_asked_well
            self.send_response(200 if is_known else answers.get("status", 404))
            self.end_headers()
            self.wfile.write(answers.get(key, "").encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_port}", answers
        server.shutdown()


@pytest.mark.parametrize(
    ("answers", "is_pod"),
    [
        ({"worker-network-endpoints": "unknown:u:10.0.0.1,unknown:u:10.0.0.2"}, True),
        ({"worker-network-endpoints": "unknown:u:10.0.0.1"}, False),
        ({"tpu-env": "TYPE: 'V5'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
        ({"tpu-env": "TYPE: 'V5'\nMEGASCALE_NUM_SLICES: '1'\n"}, False),
        ({}, False),
    ],
)
def test_a_tpu_machine_asks_its_metadata_server(
    metadata_server, tmp_path, caplog, answers, is_pod
):
    address, given_answers = metadata_server
    given_answers |= answers
    env = {"GCE_METADATA_IP": address}
    assert cluster.detect(env) is None  # no chips: no request
    (tmp_path / "accel0").touch()
    assert cluster.detect(env) == ({} if is_pod else None)
    assert cluster.detect(env | {"TPU_SKIP_MDS_QUERY": "1"}) is None
    assert not caplog.text


@pytest.mark.parametrize("is_there", [True, False])
def test_a_tpu_machine_without_metadata_is_alone_and_warns(
    metadata_server, tmp_path, caplog, is_there
):
    address, answers = metadata_server
    answers["status"] = 503
    (tmp_path / "accel0").touch()
    env = {"GCE_METADATA_IP": address if is_there else "localhost:9"}
    assert cluster.detect(env) is None
    assert "is the only one of its run" in caplog.text
