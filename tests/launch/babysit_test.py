"""`tpu.sh babysit` against a fake gcloud: failures of runs, workers and TPUs."""

import json

from pod import CREATE, LINUX_ONLY, TIMEOUT_SECS, TRAIN

pytestmark = LINUX_ONLY


def test_babysit_brings_a_run_through_a_preemption(make_pod):
    pod = make_pod(
        workers=2,
        states=["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"],
        trainer=["preempt", 0],
    )
    _, err = pod(
        "babysit", "pod", *CREATE, "--spot", "--delete-on-success", "--", *TRAIN
    )
    assert pod.verbs() == [
        *("create", "idle", "scp", "setup", "start", "delete"),
        *("create", "idle", "scp", "setup", "start", "delete"),
    ]
    assert "WAITING_FOR_RESOURCES" in err and "preempted (SUSPENDED)" in err
    started = pod.read("trainer.jsonl")
    assert all(s["argv"] == list(TRAIN) for s in started)
    hosts = sorted(s["host"] for s in started)
    assert hosts == ["pod-w-0", "pod-w-0", "pod-w-1", "pod-w-1"]
    state = json.loads((pod.cloud / "state.json").read_text())
    assert not state["queued"] and not state["nodes"]


def test_a_preempted_slice_of_an_active_resource_is_recreated(make_pod):
    pod = make_pod(trainer=["preempt_node", 0])
    _, err = pod("babysit", "pod", *CREATE, "--num-slices=2", "--", *TRAIN)
    assert "preempted (PREEMPTED)" in err
    assert pod.verbs().count("create") == 2
    state = json.loads((pod.cloud / "state.json").read_text())
    assert list(state["nodes"]) == ["pod-0", "pod-1"], (
        "kept without --delete-on-success"
    )


def test_babysit_repeats_what_was_interrupted_and_keeps_the_tpu(make_pod):
    pod = make_pod(workers=2, trainer=[[75, 75], [143, 130], [0, 0]])
    pod("babysit", "pod", *CREATE, "--", *TRAIN)
    assert pod.verbs() == [
        *("create", "idle", "scp", "setup", "start"),
        *("logs", "start", "logs", "start"),
    ]


def test_babysit_gives_up_after_crashes_in_a_row(make_pod):
    pod = make_pod(workers=2, trainer=[[1, 75]])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=1, TPU_MAX_FAILURES="3")
    assert pod.verbs().count("start") == 3
    assert "gave up: 3 failures in a row" in err
    assert "[pod-w-0] trainer 0 of pod-w-0" in err


def test_a_long_run_resets_the_count_of_failures(make_pod):
    pod = make_pod(trainer=[1, 1, 1, 0])
    limits = {"TPU_MAX_FAILURES": "2", "TPU_HEALTHY_SECS": "0"}
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, **limits)
    assert pod.verbs().count("start") == 4, err


def test_runs_that_fail_within_a_second_are_started_one_by_one(make_pod):
    pod = make_pod(trainer=[1, 1, 0])
    pod.stub("date", "echo 1")  # the clock stands still
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN)
    assert pod.verbs().count("start") == len(pod.read("trainer.jsonl")) == 3, err


def test_babysit_does_not_repeat_a_mistake(make_pod):
    pod = make_pod(workers=2, trainer=[[75, 2]])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=2)
    assert pod.verbs().count("start") == 1
    assert "fix it" in err


def test_workers_that_outlive_the_others_are_stopped(make_pod):
    pod = make_pod(workers=2, trainer=[[1, "hang"], 0])
    limits = {"TPU_STRAGGLER_SECS": "0", "TPU_STOP_SECS": "0"}
    pod("babysit", "pod", *CREATE, "--", *TRAIN, **limits)
    assert [v for v in pod.verbs() if v in ("start", "stop")] == [
        "start",
        "stop",
        "start",
    ]


def test_babysit_ends_when_the_run_is_stopped_or_its_tpu_deleted(make_pod):
    pod = make_pod(trainer=["save"])
    for command in (["stop", "pod"], ["delete", "pod", "--yes"]):
        before = len(pod.read("trainer.jsonl"))
        process = pod.start("babysit", "pod", *CREATE, "--", *TRAIN)
        pod.wait_for(lambda n=before: len(pod.read("trainer.jsonl")) > n)
        pod(*command)
        _, err = process.communicate(timeout=TIMEOUT_SECS)
        assert process.returncode == 75, err
    assert "deleted by another command" in err


def test_babysit_watches_an_active_run(make_pod):
    pod = make_pod(trainer=["save"])
    pod("create", "pod", *CREATE)
    pod("setup", "pod")
    pod("run", "pod", "--", *TRAIN)
    for end in ("interrupted", "stopped"):
        before = json.dumps(pod.read("calls.jsonl")).count("worker.sh state")
        process = pod.start("babysit", "pod", *CREATE, "--", *TRAIN)
        pod.wait_for(
            lambda n=before: (
                json.dumps(pod.read("calls.jsonl")).count("worker.sh state") > n + 1
            )
        )
        if end == "interrupted":
            process.terminate()
        else:
            pod("stop", "pod")
        process.communicate(timeout=TIMEOUT_SECS)
        assert process.returncode == {"interrupted": 130, "stopped": 75}[end]
    assert pod.verbs().count("start") == 1


def test_a_tpu_without_workers_is_not_a_success(make_pod):
    pod = make_pod(workers=0)
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=1, TPU_MAX_ATTEMPTS="2")
    assert "pod is unreachable" in err and "finished" not in err


def test_a_tpu_with_a_worker_out_of_reach_is_recreated(make_pod):
    pod = make_pod(workers=2, trainer=[["deafen", "hang"], 0])
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, TPU_MAX_ATTEMPTS="2")
    assert "1 of 2 workers answer" in err
    assert pod.verbs().count("delete") == 1 and pod.verbs().count("create") == 2


def test_a_refused_tpu_is_not_requested_forever(make_pod):
    pod = make_pod(states=["FAILED"] * 9)
    _, err = pod("babysit", "pod", *CREATE, "--", *TRAIN, code=1, TPU_MAX_FAILURES="2")
    assert pod.verbs().count("create") == 2
    assert "FAILED" in err
