"""A fake `gcloud` for TPUs, and the machines behind it, in a folder.

`install` writes executables for the PATH. The folder holds `plan.json` (the plan of the
test), `state.json` (queued resources and nodes), `calls.jsonl` (the calls of gcloud),
`trainer.jsonl` (the arguments of the trainers) and a home per worker, where
`gcloud ... ssh --command` runs the command line by `sh -c`, split and joined as gcloud
and ssh do it.

Plan: `workers` per node; `states` of a new queued resource before it is ACTIVE; `fail`,
{verb: number of calls that fail first}; `old_python`, whether the machine's interpreter
is too old; `trainer`, what each start on a worker does (or a list of that by worker):
an exit code, "save" (wait for SIGTERM, then exit 75), "hang" (ignore it), "preempt",
"preempt_node" (only the node shows it) or "deafen" (ssh fails).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

STUBS = {
    "hostname": 'echo "$FAKE_HOST"',
    "sudo": "exit 1",
    "mountpoint": 'test -e "$2/mounted"',
    "gcsfuse": 'for folder; do :; done; touch "$folder/mounted"; echo "$@" >>~/gcsfuse',
}


def install(folder: pathlib.Path, **plan) -> None:
    """Fill an empty folder; `folder/bin` is for the PATH."""
    (folder / "plan.json").write_text(json.dumps(plan))
    here = pathlib.Path(__file__).resolve()
    stubs = {name: f"{text}\n" for name, text in STUBS.items()}
    stubs["python3"] = f'exec {sys.executable} -IS {here} python "$0" "$@"\n'
    _write_stubs(folder / "worker_bin", stubs)
    gcloud = f'FAKE_GCLOUD={folder} exec {sys.executable} -IS {here} gcloud "$@"\n'
    _write_stubs(folder / "bin", {"gcloud": gcloud})


def _write_stubs(folder, stubs):
    folder.mkdir()
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)


def kill_all(folder: pathlib.Path) -> None:
    """End every process of every worker, and wait until they are gone."""
    while pids := _processes(folder):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _processes(folder: pathlib.Path) -> list[int]:
    """List the processes of the runs, and no others: numbers are used again."""
    files = folder.glob("homes/*/vjepa_jax_run/session")
    sessions = {int(file.read_text().split()[1]) for file in files}
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.getsid(int(entry.name)) in sessions:
                environment = (entry / "environ").read_bytes().split(b"\0")
                if f"FAKE_GCLOUD={folder}".encode() in environment:
                    found.append(int(entry.name))
    return found


class _Cloud:
    """A folder whose state is read and written under a lock."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)
        self.plan = json.loads((self.folder / "plan.json").read_text())

    @contextlib.contextmanager
    def state(self):
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            empty = {"queued": {}, "nodes": {}, "failed": {}, "starts": {}, "deaf": []}
            state = json.loads(path.read_text()) if path.exists() else empty
            yield state
            path.write_text(json.dumps(state))

    def append(self, name: str, value) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(value) + "\n")

    def homes(self, node: str) -> list[pathlib.Path]:
        count = self.plan.get("workers", 1)
        return [self.folder / "homes" / f"{node}-w-{i}" for i in range(count)]


def gcloud(cloud: _Cloud, argv: list[str]) -> int:
    """Execute one call of gcloud; return its exit code."""
    cloud.append("calls.jsonl", argv)
    kind, verb, name = argv[2:5]
    flags = dict(a[2:].split("=", 1) for a in argv if a.startswith("--") and "=" in a)
    with cloud.state() as state:
        if state["failed"].get(verb, 0) < cloud.plan.get("fail", {}).get(verb, 0):
            state["failed"][verb] = state["failed"].get(verb, 0) + 1
            print("ERROR: UNAVAILABLE: planned to fail", file=sys.stderr)
            return 1
    if verb in ("ssh", "scp"):
        return {"ssh": _ssh, "scp": _scp}[verb](cloud, argv, flags)
    with cloud.state() as state:
        known = state["queued" if kind == "queued-resources" else "nodes"]
        if verb == "create":
            _create(cloud, state, kind, name, flags)
        elif name not in known:
            print(f"ERROR: NOT_FOUND: no resource {name}", file=sys.stderr)
            return 1
        elif verb == "describe":
            _describe(cloud, state, kind, name, flags["format"])
        else:
            _delete(cloud, state, kind, name)
    return 0


def _create(cloud, state, kind, name, flags):
    nodes = [flags.get("node-id", name)]
    if "node-count" in flags:
        nodes = [f"{flags['node-prefix']}-{i}" for i in range(int(flags["node-count"]))]
    if kind == "queued-resources":
        states = [*cloud.plan.get("states", []), "ACTIVE"]
        state["queued"][name] = {"states": states, "nodes": nodes}
    for node in nodes:
        state["nodes"][node] = "READY"
        for home in cloud.homes(node):
            home.mkdir(parents=True)


def _describe(cloud, state, kind, name, fmt):
    if kind == "queued-resources":
        assert fmt == "value(state.state,tpu.nodeSpec[].nodeId)", fmt
        queued = state["queued"][name]
        print(queued["states"][0], ";".join(queued["nodes"]), sep="\t")
        if len(queued["states"]) > 1:
            queued["states"].pop(0)
    else:
        assert fmt == "value(state,networkEndpoints[].ipAddress)", fmt
        addresses = [f"10.0.0.{i}" for i, _ in enumerate(cloud.homes(name))]
        print(state["nodes"][name], ";".join(addresses), sep="\t")


def _delete(cloud, state, kind, name):
    nodes = state["queued"].pop(name)["nodes"] if kind != "tpu-vm" else [name]
    kill_all(cloud.folder)
    state["deaf"] = []
    for node in nodes:
        del state["nodes"][node]
        for home in cloud.homes(node):
            shutil.rmtree(home)


def _reachable(cloud, node, worker):
    with cloud.state() as state:
        if state["nodes"].get(node) != "READY":
            sys.exit(f"ERROR: TPU is in state {state['nodes'].get(node)}")
        homes = cloud.homes(node)
        if worker != "all":
            homes = [homes[int(worker)]]
        return [home for home in homes if home.name not in state["deaf"]], state["deaf"]


def _ssh(cloud, argv, flags):
    homes, deaf = _reachable(cloud, argv[4], flags["worker"])
    running = []
    for home in homes:
        command = " ".join(flags["command"].split(" "))
        env = {
            "HOME": str(home),
            "PATH": f"{cloud.folder}/worker_bin:{os.environ['PATH']}",
            "FAKE_HOST": home.name,
            "FAKE_GCLOUD": str(cloud.folder),
            "LIBTPU_LOCKFILE": str(home / "libtpu_lockfile"),
        }
        shell = ["sh", "-c", command]
        running.append(
            subprocess.Popen(shell, cwd=home, env=env, stdin=subprocess.DEVNULL)
        )
    codes = [process.wait() for process in running]
    return next((code for code in codes if code), 255 if deaf else 0)


def _scp(cloud, argv, flags):
    source, (node, _, target) = argv[4], argv[5].partition(":")
    homes, deaf = _reachable(cloud, node, flags["worker"])
    for home in homes:
        shutil.copy(source, home / target)
    return 255 if deaf else 0


def python(cloud: _Cloud, argv: list[str]) -> int:
    """Act as a worker's interpreter: `venv`, `uv`, `pip` by name, and the trainer."""
    executable, flag, module, *rest = argv
    if flag == "-c":
        return int(cloud.plan.get("old_python", False) and ".venv" not in executable)
    if module in ("venv", "uv"):
        folder = pathlib.Path(rest[-1], "bin")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(cloud.folder / "worker_bin" / "python3", folder / "python")
    elif module == "pip" and rest[0] == "install":
        cloud.append("pip.jsonl", rest)
    elif module == "vjepa_jax.train":
        return _train(cloud, rest)
    return 0


def _train(cloud, argv):
    host = os.environ["FAKE_HOST"]
    with cloud.state() as state:
        number = state["starts"].get(host, 0)
        state["starts"][host] = number + 1
    outcomes = cloud.plan.get("trainer", [0])
    outcome = outcomes[min(number, len(outcomes) - 1)]
    if isinstance(outcome, list):
        outcome = outcome[int(host.rpartition("-")[2])]
    if outcome == "save":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    elif outcome == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    env = {k: v for k, v in os.environ.items() if k.startswith("GIVEN_")}
    cloud.append(
        "trainer.jsonl", {"host": host, "argv": argv, "env": env, "cwd": os.getcwd()}
    )
    print(f"trainer {number} of {host}", flush=True)
    if isinstance(outcome, int):
        return outcome
    if outcome == "deafen":
        with cloud.state() as state:
            state["deaf"].append(host)
    elif outcome.startswith("preempt"):
        with cloud.state() as state:
            if outcome == "preempt":
                for queued in state["queued"].values():
                    queued["states"] = ["SUSPENDED"]
            state["nodes"] = dict.fromkeys(state["nodes"], "PREEMPTED")
    time.sleep(3600)  # the test ends it, see kill_all
    return 1


if __name__ == "__main__":
    _cloud = _Cloud(os.environ["FAKE_GCLOUD"])
    sys.exit({"gcloud": gcloud, "python": python}[sys.argv[1]](_cloud, sys.argv[2:]))
