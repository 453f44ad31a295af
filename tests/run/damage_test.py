"""A damaged checkpoint is one line that names an intact step; nothing is lost."""

import json
import shutil

import jax
import pytest
from checkpoint_test import (
    DATA,
    META,
    assert_identical,
    make_abstract,
    make_mesh,
    make_state,
    to_host,
)
from damaged_files import content_of, damage, empty, flip, halve, largest, other_json
from damaged_files import zeros as zeroed

from vjepa_jax.base.errors import UserError
from vjepa_jax.run import checkpoint
from vjepa_jax.run.checkpoint import Checkpointer

ITEMS = ("state", "target", "data", "meta")


@pytest.fixture(scope="module")
def abstract():
    return make_abstract(make_mesh(1, 1))


@pytest.fixture(scope="module")
def run(tmp_path_factory, abstract):
    """Make a workdir with the checkpoints 2 and 4; return it and both states."""
    workdir = tmp_path_factory.mktemp("run")
    states = {step: make_state(abstract, seed=step) for step in (2, 4)}
    with Checkpointer(workdir, every_steps=2, keep=3) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state, DATA | {"step": step}, META)
    return workdir, to_host(states)


@pytest.fixture
def copy(run, tmp_path):
    """Copy the workdir; return the folder of its checkpoints."""
    return shutil.copytree(run[0], tmp_path / "run") / checkpoint.FOLDER


def restore_latest(folder, abstract, skip=False):
    with Checkpointer(
        folder.parent, every_steps=2, keep=3, skip_damaged=skip
    ) as checkpointer:
        return checkpointer.restore_latest(abstract)


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600
    return message


FILES = [
    *((f"{item}/_METADATA", item) for item in ("state", "target")),
    *((f"{item}/manifest.ocdbt", item) for item in ("state", "target")),
    *((f"{item}/metadata", item) for item in ("data", "meta")),
]
WHOLE_FILES = [
    *((name, item, how) for name, item in FILES for how in (halve, empty, zeroed)),
    *((name, item, None) for name, item in FILES),
    *((item, item, None) for item in ITEMS),
    ("state/array_metadatas/process_0", "state", halve),
    ("target/_sharding", "target", empty),
    ("state/manifest.ocdbt", "state", flip),
    ("target/ocdbt.process_0", "target", None),
    *((name, item, other_json("[]")) for name, item in FILES),
    ("data/metadata", "data", other_json('{"step": 4}')),
    ("data/metadata", "data", other_json('{"fingerprint": 4}')),
]


@pytest.mark.parametrize(("name", "item", "how"), WHOLE_FILES)
def test_damage_of_the_latest_step_names_it_and_the_intact_one(
    copy, abstract, name, item, how
):
    damage(copy / "4" / name, how)
    before = content_of(copy)
    message = refusal(restore_latest, copy, abstract)
    assert message.startswith(f"checkpoint {copy / '4'} is damaged ({item}: ")
    assert "step 2 is intact" in message
    assert "--config.checkpoint.skip_damaged=True" in message
    assert content_of(copy) == before


@pytest.mark.parametrize("item", ["state", "target"])
@pytest.mark.parametrize("how", [halve, empty, zeroed, None])
def test_damage_of_arrays_is_found(run, copy, abstract, item, how):
    damage(largest(copy / "4" / item), how)
    assert "step 2 is intact" in refusal(restore_latest, copy, abstract)
    # An evaluation reads the target alone.
    if item == "state":
        target, _ = checkpoint.restore_target(copy.parent)
        assert_identical(to_host(target), run[1][4].target)
    else:
        message = refusal(checkpoint.restore_target, copy.parent)
        assert "step 2 is intact: choose it with step=2" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", None),
        ("format_version", "1"),
        ("config", 3),
        ("config", {"batch_size": "many"}),
        ("config", {"model": 3}),
        ("config", {"masks": {"short": 1}}),
        ("config", {"streams": {"image": [1]}}),
        ("video_shape", "16"),
        ("video_shape", None),
        ("probe_item", 3),
    ],
)
def test_description_with_values_of_other_types_is_damaged(copy, abstract, key, value):
    file = copy / "4/meta/metadata"
    meta = json.loads(file.read_text()) | {key: value}
    file.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    for read in (
        lambda: restore_latest(copy, abstract),
        lambda: checkpoint.restore_models(copy.parent),
    ):
        message = refusal(read)
        assert "4 is damaged (meta: " in message and "step 2 is intact" in message


def test_any_damage_of_any_file_is_found_or_harmless(run, copy, abstract, rng):
    """Bits inside arrays have no checksum; so here files lose their end or all."""
    workdir, states = run
    intact = workdir / checkpoint.FOLDER / "4"
    files = sorted(path for path in intact.rglob("*") if path.is_file())
    for file in rng.choice(files, 12, replace=False):
        content = file.read_bytes()
        part = copy / "4" / file.relative_to(intact)
        part.write_bytes(content[: rng.integers(len(content))])
        try:
            restored = restore_latest(copy, abstract)
        except UserError as error:
            assert str(part.relative_to(copy).parts[1]) in str(error), part
        else:
            assert restored.step == 4, part
            assert_identical(to_host(restored.state), states[4])
        part.write_bytes(content)


def test_a_run_continues_from_the_intact_step_and_keeps_the_damaged_one(
    run, copy, abstract, capsys
):
    for kept in ("4.damaged", "4.damaged.2"):
        damage(largest(copy / "4/state"), halve)
        damaged = content_of(copy / "4")
        with Checkpointer(
            copy.parent, every_steps=2, keep=3, skip_damaged=True
        ) as checkpointer:
            restored = checkpointer.restore_latest(abstract)
            assert restored.step == 2 and restored.data["step"] == 2
            assert_identical(to_host(restored.state), run[1][2])
            assert content_of(copy / kept) == damaged
            assert f"it is kept as {kept}" in capsys.readouterr().err
            assert checkpointer.latest_step() == 2
            state = make_state(abstract, seed=4)
            assert checkpointer.save(4, state, DATA | {"step": 4}, META)
        restored = restore_latest(copy, abstract, skip=True)
        assert restored.step == 4
        assert_identical(to_host(restored.state), run[1][4])
    assert {p.name for p in copy.iterdir()} == {"2", "4", "4.damaged", "4.damaged.2"}


@pytest.mark.parametrize("skip", [False, True])
def test_a_run_without_an_intact_step_does_not_start_anew(copy, abstract, skip):
    for step in ("2", "4"):
        damage(copy / step / "state", None)
    before = content_of(copy)
    message = refusal(restore_latest, copy, abstract, skip)
    assert f"{copy / '4'} is damaged" in message
    assert "the other steps are damaged too" in message
    shutil.rmtree(copy / "2")
    assert "there is no other step" in refusal(restore_latest, copy, abstract, skip)
    assert before.items() >= content_of(copy).items()


def test_an_empty_folder_of_a_step_is_damage(copy, abstract):
    (copy / "6").mkdir()
    message = refusal(restore_latest, copy, abstract)
    assert f"{copy / '6'} is damaged" in message and "step 4 is intact" in message
    assert restore_latest(copy, abstract, skip=True).step == 4
    assert (copy / "6.damaged").is_dir()


def test_a_chosen_step_is_not_replaced(copy, abstract):
    damage(largest(copy / "2/target"), halve)
    for read in (checkpoint.restore_target, checkpoint.restore_models):
        read(copy.parent)
        message = refusal(read, copy.parent, 2)
        assert f"{copy / '2'} is damaged (target: " in message
        assert "step 4 is intact: choose it with step=4" in message
    message = refusal(checkpoint.restore_start, copy.parent, abstract, True, 2)
    assert message.endswith("step 4 is intact: choose it with config.init.step=4")
    option = "config.teacher.step"
    message = refusal(checkpoint.restore_target, copy.parent, 2, option)
    assert message.endswith("step 4 is intact: choose it with config.teacher.step=4")


def test_damaged_weights_of_a_conversion_are_named(run, tmp_path):
    state = run[1][4]
    checkpoint.save_converted(str(tmp_path), state.target, state.params, META)
    damage(largest(tmp_path / checkpoint.FOLDER / "0/target"), halve)
    for read in (checkpoint.restore_target, checkpoint.restore_models):
        message = refusal(read, str(tmp_path))
        assert "0 is damaged (target: " in message and "convert" in message


def test_a_new_run_starts_from_the_step_that_is_chosen(run, copy, abstract):
    damage(largest(copy / "4/state"), halve)
    message = refusal(checkpoint.restore_start, copy.parent, abstract, True)
    assert message.endswith("step 2 is intact: choose it with config.init.step=2")
    step, fields = checkpoint.restore_start(copy.parent, abstract, True, 2)
    assert step == 2
    assert_identical(to_host(fields["params"]), run[1][2].params)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("UNAVAILABLE: the store does not answer"),
        OSError("no network"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
    ],
)
def test_a_failure_that_may_pass_is_no_damage(copy, abstract, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", fail)
    with pytest.raises(type(error)) as raised:
        restore_latest(copy, abstract, skip=True)
    assert raised.value is error
    assert sorted(p.name for p in copy.iterdir()) == ["2", "4"]


def test_files_that_may_not_be_read_are_no_damage(copy, abstract, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.ocp.PyTreeCheckpointHandler, "restore", refuse)
    message = refusal(restore_latest, copy, abstract, skip=True)
    assert "cannot be read" in message and "damaged" not in message
    assert sorted(p.name for p in copy.iterdir()) == ["2", "4"]


def test_what_orbax_writes_about_a_step_may_be_lost(run, copy, abstract):
    for how in (halve, empty, None):
        damage(copy / "4/_CHECKPOINT_METADATA", how)
        assert restore_latest(copy, abstract).step == 4
    (copy / "4/_CHECKPOINT_METADATA").write_text("[]")
    for read in (
        lambda: restore_latest(copy, abstract),
        lambda: checkpoint.restore_target(copy.parent),
    ):
        assert "_CHECKPOINT_METADATA is damaged" in refusal(read)
