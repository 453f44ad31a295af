"""Checkpoints, saved and restored; the only file that knows Orbax.

Orbax writes a step under a temporary name and renames it when all items are complete:
what a killed process leaves behind never counts as a checkpoint.
"""

import contextlib
import json
import logging
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from vjepa_jax.base.errors import UserError
from vjepa_jax.run import fit
from vjepa_jax.run.checkpoint_format import FOLDER, absolute, provenance, require_format

_STATE_FIELDS = ("step", "params", "opt_state", "guard")


def _handler_registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Names the items' types, so that metadata can be read before any restore."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("state", "target"):
        handler = ocp.StandardCheckpointHandler()
        registry.add(item, ocp.args.StandardSave, handler)
        registry.add(item, ocp.args.StandardRestore, handler)
    for item in ("data", "meta"):
        handler = ocp.JsonCheckpointHandler()
        registry.add(item, ocp.args.JsonSave, handler)
        registry.add(item, ocp.args.JsonRestore, handler)
    return registry


def _require_step(manager: ocp.CheckpointManager, step: int) -> None:
    """Raises UserError, naming the steps that there are, where this one is not."""
    steps = sorted(manager.all_steps())
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise UserError(
            f"no checkpoint of step {step} in {manager.directory}; saved steps: {there}"
        )


class Checkpointer:
    """Saves and restores the state of one run; a context manager.

    Saving is asynchronous: `save` returns when the arrays are copied to the host, so
    the next step may donate them. Files are written in the background; leaving the
    context waits for them. On several hosts every process calls every method, with the
    same step; an error that leaves the context is not kept waiting.
    """

    def __init__(self, workdir: str, *, every_steps: int, keep: int):
        """Opens `<workdir>/checkpoints`, making it where it is missing.

        Leftovers of interrupted saves are removed, hence one run per workdir.

        Args:
          workdir: folder of the run, local or remote (`gs://`).
          every_steps: steps between two checkpoints, at least 1. Step 0 is a multiple,
            so a full disk or a missing permission shows at the start of a run.
          keep: number of checkpoints that are kept, the latest ones, at least 1.
        """
        self._folder = absolute(workdir) / FOLDER
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(every_steps),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = _Manager(
            self._folder, options=options, handler_registry=_handler_registry()
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        # Completing a save needs all processes, and those that failed are no help.
        if kind is None or jax.process_count() == 1:
            self.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step; None in a new workdir."""
        return self._manager.latest_step()

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due by interval."""
        return self._manager.should_save(step)

    def save(
        self,
        step: int,
        state: Any,
        data: dict[str, Any],
        meta: dict[str, Any],
        force: bool = False,
    ) -> bool:
        """Saves if a checkpoint is due; waits for the previous save first.

        Args:
          step: number of finished updates.
          state: TrainState: step, params, target, opt_state and guard. Its arrays may
            be donated as soon as this returns.
          data: JSON-like position of the data stream, `{"step", "fingerprint"}`.
          meta: JSON-like description of the run (config, model). The keys
            `format_version` and `versions` are added here.
          force: save though none is due, as at the end of a run.

        Returns:
          Whether a save was started; False where `step` is already saved.

        Raises:
          TypeError: `data` or `meta` holds something that JSON cannot.
          Exception: an earlier save failed in the background.
        """
        if step in self._manager.all_steps():
            return False
        if not force and not self.should_save(step):
            return False
        # Orbax serialises JSON in the background: a copy made here cannot change
        # meanwhile, and what is not JSON fails in the caller's stack.
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({f: getattr(state, f) for f in _STATE_FIELDS}),
            target=ocp.args.StandardSave(state.target),
            data=ocp.args.JsonSave(json.loads(json.dumps(data))),
            meta=ocp.args.JsonSave(json.loads(json.dumps(meta | provenance()))),
        )
        with self._naming_the_folder():
            return self._manager.save(step, args=args, force=True)

    def restore(
        self, step: int, abstract_state: Any
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Restores every item of one step, bit for bit.

        Args:
          step: a saved step, as from `latest_step`.
          abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings; they may
            differ from those of the run that saved (other mesh, other device count).

        Returns:
          (state, data, meta): the TrainState with the shardings asked for, and the two
          dictionaries given to `save`.

        Raises:
          UserError: no such step; written by a newer release; or names, shapes or
            dtypes differ from the model's (up to 10 of them are listed).
        """
        _require_step(self._manager, step)
        if "data" not in self._manager.item_metadata(step):
            raise UserError(
                f"{self._folder / str(step)} is not of a training run but of converted "
                "weights: start from it with config.init.path, in another --workdir"
            )
        json_items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
            ),
        )
        require_format(self._folder / str(step), json_items["meta"])

        wanted = {f: getattr(abstract_state, f) for f in _STATE_FIELDS}
        stored = self._manager.item_metadata(step)
        fit.require_fit(
            self._folder / str(step),
            stored={**stored["state"].tree, "target": stored["target"].tree},
            wanted={**wanted, "target": abstract_state.target},
        )
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(wanted),
                target=ocp.args.StandardRestore(abstract_state.target),
            ),
        )
        state = abstract_state.replace(target=arrays["target"], **arrays["state"])
        return state, json_items["data"], json_items["meta"]

    def check_errors(self) -> None:
        """Raises the error of a background save, if one failed; never waits."""
        # Orbax's `check_for_errors` finds nothing once the save has ended, since the
        # manager's own thread has taken the error by then (0.12.8).
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is on disk; raises its error."""
        with self._naming_the_folder():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the running save, then frees threads and files."""
        with self._naming_the_folder():
            self._manager.close()

    @contextlib.contextmanager
    def _naming_the_folder(self):
        try:
            yield
        except Exception as error:
            error.add_note(
                f"while saving a checkpoint to {self._folder}: "
                "check the free space and the permissions there"
            )
            raise


class _Manager(ocp.CheckpointManager):
    """Does not ask for preemptions: the run does, and saves by force."""

    def reached_preemption(self, step: int) -> bool:
        # Orbax would ask again from a thread, about a step that is over, and jax's
        # service forgets that this process is further.
        return False


@contextlib.contextmanager
def _reader(path: str, step: int | None):
    """Opens a workdir or `checkpoints` folder: yields (manager, step, meta)."""
    folder = absolute(path)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the workdir of a training run")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    # Not `read_only`, which warns three times; a manager that never saves only reads.
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(
        folder, options=options, handler_registry=_handler_registry()
    ) as manager:
        if step is None:
            step = manager.latest_step()
        if step is None:
            raise UserError(
                f"no checkpoint in {folder}; give the workdir of a training run that "
                "has saved one"
            )
        _require_step(manager, step)
        stored = manager.item_metadata(step)
        if "meta" not in stored or stored.get("target") is None:
            raise UserError(
                f"no target encoder in {folder / str(step)}; give a checkpoint that "
                "vjepa_jax wrote"
            )
        meta = manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        require_format(folder / str(step), meta)
        yield manager, step, meta | {"step": step}


def _on_first_device(metadata: Any) -> Any:
    """Asks for arrays as stored, each whole on the first device of this process."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        metadata,
    )


def restore_target(path: str, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Restores the target encoder alone, without knowing the model beforehand.

    Args:
      path: a workdir or its `checkpoints` folder, local or remote.
      step: a saved step; None takes the latest.

    Returns:
      (target_params, meta): nested dictionaries of arrays, each whole on the first
      device of this process, in the dtypes saved; and the run's description, with the
      `step` that was read.

    Raises:
      UserError: no such folder, no checkpoint in it, no such step, no target encoder in
        it, or written by a newer release.
    """
    with _reader(path, step) as (manager, step, meta):
        abstract = _on_first_device(manager.item_metadata(step)["target"].tree)
        args = ocp.args.Composite(target=ocp.args.StandardRestore(abstract))
        return manager.restore(step, args=args)["target"], meta


def restore_models(path: str, step: int | None = None) -> tuple[dict, dict[str, Any]]:
    """Restores encoder, predictor and target without knowing them beforehand.

    Args:
      path, step: see `restore_target`.

    Returns:
      ({"encoder", "predictor", "target"}, meta); without the first two where the
      checkpoint has none (a converted encoder).

    Raises:
      UserError: see `restore_target`.
    """
    with _reader(path, step) as (manager, step, meta):
        stored = manager.item_metadata(step)
        wanted = {
            item: ocp.args.StandardRestore(_on_first_device(stored[item].tree))
            for item in ("state", "target")
            if stored.get(item) is not None
        }
        found = manager.restore(step, args=ocp.args.Composite(**wanted))
        params = found["state"]["params"] if "state" in wanted else {}
        return {**params, "target": found["target"]}, meta


def restore_start(
    path: str, abstract_state: Any, keep_moments: bool
) -> tuple[int, dict[str, Any]]:
    """Restores what a new run takes over from the latest checkpoint of another.

    Args:
      path: see `restore_target`.
      abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings.
      keep_moments: whether the optimiser's state is taken too.

    Returns:
      (step, fields): that checkpoint's step, and the TrainState's fields `params`,
      `target` and, with `keep_moments`, `opt_state`.

    Raises:
      UserError: see `restore_target`; or names, shapes or dtypes differ from the
        model's, or there are no moments to keep.
    """
    with _reader(path, None) as (manager, step, _):
        folder, stored = manager.directory / str(step), manager.item_metadata(step)
        tree = {} if stored.get("state") is None else dict(stored["state"].tree)
        if keep_moments and "opt_state" not in tree:
            raise UserError(
                f"{folder} has no moments of the optimiser: set "
                "config.init.keep_moments=False"
            )
        names = ("params", "opt_state") if keep_moments else ("params",)
        wanted = {name: getattr(abstract_state, name) for name in names}
        fit.require_fit(
            folder,
            stored={k: tree.get(k, {}) for k in wanted}
            | {"target": stored["target"].tree},
            wanted=wanted | {"target": abstract_state.target},
        )
        fields = _restore_part(folder / "state", wanted)
        args = ocp.args.Composite(
            target=ocp.args.StandardRestore(abstract_state.target)
        )
        return step, fields | {"target": manager.restore(step, args=args)["target"]}


def _restore_part(folder: epath.Path, wanted: Any) -> Any:
    """Restores some branches of an item; the others' arrays are not read."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(
            folder,
            args=ocp.args.PyTreeRestore(
                wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            ),
        )


def save_converted(
    path: str,
    target: Any,
    params: dict[str, Any] | None,
    meta: dict[str, Any],
) -> None:
    """Writes weights that no run of ours has trained as a checkpoint of step 0.

    Args:
      path: folder to be made, as a workdir; it must not hold checkpoints.
      target: the target encoder's parameters.
      params: `{"encoder", "predictor"}`; None to store the target alone.
      meta: as for `Checkpointer.save`.

    Raises:
      UserError: there are checkpoints in `path`.
    """
    folder = absolute(path) / FOLDER
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another folder")
    items = {
        "target": ocp.args.StandardSave(target),
        "meta": ocp.args.JsonSave(json.loads(json.dumps(meta | provenance()))),
    }
    if params is not None:
        items["state"] = ocp.args.StandardSave({"params": params})
    with ocp.CheckpointManager(folder, handler_registry=_handler_registry()) as manager:
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def quiet_orbax() -> None:
    """Drops Orbax's progress messages (tens of lines a save); warnings stay.

    For entry points: it filters the process's absl logger.
    """
    logger = logging.getLogger("absl")
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
