"""Save and restore checkpoints. Only this file and `checkpoint_step.py` import Orbax.

A step is a folder `<workdir>/checkpoints/<step>` with four items, so that each reader
reads only what it needs:

    state    step, params, opt_state, guard   what training needs
    target   averaged or frozen parameters    what evaluations need
    data     JSON                             position and fingerprint of the data
    meta     JSON                             config, description of the model, versions

`target` is absent where the objective has none; converted weights have no `data`. Orbax
writes a step under a temporary name and renames it when all items are complete: an
interrupted save never counts as a checkpoint. Files that were lost or changed later do:
reading such a step raises `DamagedCheckpoint`.
"""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

import vjepa_jax
from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import distributed
from vjepa_jax.run.checkpoint_step import (
    FORMAT_VERSION,
    ITEMS_FILE,
    DamagedCheckpoint,
    Saved,
)

_Read = TypeVar("_Read")

FOLDER = "checkpoints"
_STATE_FIELDS = ("step", "params", "opt_state", "guard")
# The fastest process waits that long for the slowest one to read its arrays.
_READ_TIMEOUT_SECS = 3600


def absolute(path: str) -> epath.Path:
    """Return a path in the form that Orbax needs."""
    return epath.Path(files.absolute(path))


def _handler_registry() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Return the items' types, so that metadata can be read before any restore."""
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


def _meta_args(meta: dict[str, Any]) -> ocp.args.JsonSave:
    versions = {
        "vjepa_jax": vjepa_jax.__version__,
        "jax": jax.__version__,
        "orbax": metadata.version("orbax-checkpoint"),
    }
    return _json_args(meta | {"format_version": FORMAT_VERSION, "versions": versions})


def _json_args(values: dict[str, Any]) -> ocp.args.JsonSave:
    # Orbax serialises JSON in the background. A copy cannot change meanwhile, and
    # values that are not JSON raise an error here.
    return ocp.args.JsonSave(json.loads(json.dumps(values)))


def _fields(state: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return fields of a TrainState, without a target that is None."""
    fields = {name: getattr(state, name) for name in names}
    return {name: tree for name, tree in fields.items() if tree is not None}


class Restored(NamedTuple):
    """A restored step of a run.

    Attributes:
      step: its number.
      state: the TrainState.
      data, meta: the dictionaries given to `Checkpointer.save`.
    """

    step: int
    state: Any
    data: dict[str, Any]
    meta: dict[str, Any]


def _folder_to_write(workdir: str) -> epath.Path:
    """Return the folder of a workdir's checkpoints.

    Raises:
      UserError: Orbax would write checkpoints there that nobody can read, because it
        searches its files by patterns (0.12.8).
    """
    folder = absolute(workdir) / FOLDER
    for sign in "[\\":
        if sign in files.absolute(workdir):
            raise UserError(
                f"no checkpoint can be written below {files.absolute(workdir)}: give "
                f"a folder without '{sign}' in its path"
            )
    return folder


class Checkpointer:
    """Saves and restores the state of one run; a context manager.

    Saving is asynchronous: `save` returns when the arrays are copied to the host, so
    the next step may donate them. Files are written in the background; leaving the
    context without an error waits for them. Every process calls every method, with the
    same step.
    """

    def __init__(
        self, workdir: str, *, every_steps: int, keep: int, skip_damaged: bool = False
    ):
        """Open `<workdir>/checkpoints`; make it if it is missing.

        Leftovers of interrupted saves are removed, so only one run may use a workdir.

        Args:
          workdir: folder of the run, local or remote (`gs://`).
          every_steps: steps between two checkpoints, at least 1.
          keep: number of latest checkpoints to keep, at least 1.
          skip_damaged: see `restore_latest`.

        Raises:
          UserError: Orbax cannot write below this path.
        """
        self._skip_damaged = skip_damaged
        self._folder = _folder_to_write(workdir)
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(every_steps),
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        with _listing(self._folder):
            self._manager = _Manager(
                self._folder, options=options, handler_registry=_handler_registry()
            )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A save needs all processes to complete, and some may have failed.
        if kind is None or jax.process_count() == 1:
            self.close()

    def latest_step(self) -> int | None:
        """Return the step of the latest complete checkpoint; None in a new workdir."""
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
        """Save if a checkpoint is due; wait for the previous save first.

        Args:
          step: number of finished updates.
          state: TrainState: step, params, target, opt_state and guard.
          data: JSON-like position of the data stream, `{"step", "fingerprint"}`.
          meta: JSON-like description of the run (config, model). The keys
            `format_version` and `versions` are added here.
          force: save even if no checkpoint is due, as at the end of a run.

        Returns:
          Whether a save was started; False if `step` is already saved.

        Raises:
          TypeError: `data` or `meta` contains a value that is not JSON.
          Exception: an earlier save failed in the background.
        """
        if step in self._manager.all_steps():
            return False
        if not force and not self.should_save(step):
            return False
        items: dict[str, ocp.args.CheckpointArgs] = {
            "state": ocp.args.StandardSave(_fields(state, _STATE_FIELDS)),
            "data": _json_args(data),
            "meta": _meta_args(meta),
        }
        if state.target is not None:
            items["target"] = ocp.args.StandardSave(state.target)
        args = ocp.args.Composite(**items)
        with self._naming_the_folder():
            return self._manager.save(step, args=args, force=True)

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Restore every item of one step, bit for bit.

        Processes do not wait for each other: if some fail, the others return.

        Args:
          step: a saved step, as from `latest_step`.
          abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings, which the
            restored one gets.

        Raises:
          DamagedCheckpoint, UserError: see `Saved` and `Saved.restore`; or the step is
            not of a training run.
        """
        saved = Saved(self._folder, _chosen(self._folder, self._steps(), step))
        if not saved.has_data:
            raise UserError(
                f"{saved.folder} contains converted weights, not a training run: start "
                "from it with config.init.path, in another --workdir"
            )
        data = saved.read_json("data")
        if not isinstance(data.get("fingerprint"), str):
            raise saved.damaged("data: no fingerprint of the videos")
        wanted = _fields(abstract_state, (*_STATE_FIELDS, "target"))
        state = abstract_state.replace(**saved.restore(wanted))
        return Restored(step, state, data, saved.meta)

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restore the latest step; every process calls it, and all get the same step.

        With `skip_damaged`, steps that some process cannot read are skipped: their
        folders are renamed, so that they are kept when the run reaches their steps
        again.

        Args:
          abstract_state: as for `restore`.

        Returns:
          The step; None in a new workdir.

        Raises:
          UserError: see `restore`; or the latest step is damaged and `skip_damaged` is
            not set, or no step can be read.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._steps()):
            restored, problem = None, ""
            try:
                restored = self.restore(step, abstract_state)
            except DamagedCheckpoint as error:
                problem = str(error)
            problem = distributed.first_problem(
                f"restored/{step}", problem, _READ_TIMEOUT_SECS
            )
            if problem:
                del restored  # before the next one is read: it may fill the memory
                damaged[step] = problem
                continue
            if damaged and not self._skip_damaged:
                raise UserError(
                    f"{damaged[max(damaged)]}; step {step} is intact: continue from it "
                    "with --config.checkpoint.skip_damaged=True, which renames the "
                    "folders of damaged steps, or restore the files from a copy"
                )
            self._set_aside(damaged)
            return restored
        if damaged:
            raise UserError(
                f"{damaged[max(damaged)]}; {_no_other(len(damaged) - 1)}: restore its "
                "files from a copy, or start anew in another --workdir"
            )
        return None

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Rename the folders of damaged steps, which Orbax would not save again."""
        if not damaged:
            return
        for step, problem in damaged.items():
            folder = self._folder / str(step)
            if distributed.is_main():
                kept = _free_name(self._folder / f"{step}.damaged")
                folder.rename(kept)
                distributed.print_on_main(f"{problem}: it is kept as {kept.name}")
        distributed.barrier("damaged checkpoints are renamed", _READ_TIMEOUT_SECS)
        self._manager.reload()

    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def check_errors(self) -> None:
        """Raise the error of a background save, if one failed; never wait."""
        # Orbax's `check_for_errors` finds nothing once the save has ended, since the
        # manager's own thread has consumed the error by then (0.12.8).
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until the running save is on disk; raise its error."""
        with self._naming_the_folder():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for the running save, then free threads and files."""
        with self._naming_the_folder():
            self._manager.close()

    @contextlib.contextmanager
    def _naming_the_folder(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            error.add_note(
                f"while saving a checkpoint to {self._folder}: "
                "check the free space and the permissions there"
            )
            raise


class _Manager(ocp.CheckpointManager):
    """A manager that does not detect preemptions: the run does, and forces a save."""

    def reached_preemption(self, step: int) -> bool:
        # Orbax would query jax's service again from a thread, for an earlier step, and
        # the service would forget the later step that this process has reported.
        return False


@contextlib.contextmanager
def _listing(folder: epath.Path) -> Iterator[None]:
    """Explain Orbax's errors about the file in which it describes a step."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(
            f"{folder}: a step's {ITEMS_FILE} is damaged ({error}): remove that file, "
            "which restoring does not need"
        ) from error


def _chosen(folder: epath.Path, steps: Sequence[int], step: int | None) -> int:
    """Return a step, by default the latest; raise UserError if it is not saved."""
    if not steps:
        raise UserError(
            f"no checkpoint in {folder}; give the workdir of a training run that has "
            "saved one"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"no checkpoint of step {step} in {folder}; saved steps: "
            f"{', '.join(map(str, steps))}"
        )
    return steps[-1] if step is None else step


def _no_other(count: int) -> str:
    return "the other steps are damaged too" if count else "there is no other step"


def _free_name(path: epath.Path) -> epath.Path:
    """Return the path, or the first of `path.2`, `path.3`, ... that does not exist."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.parent / f"{path.name}.{number}"
    return free


def _read_saved(
    path: str, step: int | None, read: Callable[[Saved], _Read], option: str = "step"
) -> _Read:
    """Read from a saved step of a workdir or a `checkpoints` folder.

    Args:
      path: local or remote folder.
      step: a saved step; None: the latest.
      read: what to read of it.
      option: by which the user chooses the step, for the message.

    Raises:
      UserError: there is no such folder or step; it is damaged (the message names the
        latest other step that can be read); or see `Saved` and `Saved.restore`.
    """
    folder = absolute(path)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give the workdir of a training run")
    if (folder / FOLDER).is_dir():
        folder = folder / FOLDER
    # Not `read_only`, which warns three times; a manager that never saves only reads.
    options = ocp.CheckpointManagerOptions(create=False)
    with _listing(folder), ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps())
    chosen = _chosen(folder, steps, step)
    try:
        return read(Saved(folder, chosen))
    except DamagedCheckpoint as error:
        others = [other for other in reversed(steps) if other != chosen]
        for other in others:
            with contextlib.suppress(DamagedCheckpoint):
                read(Saved(folder, other))
                raise UserError(
                    f"{error}; step {other} is intact: choose it with {option}={other}"
                ) from None
        raise UserError(
            f"{error}; {_no_other(len(others))}: restore its files from a copy, or "
            "convert its weights again"
        ) from None


def restore_target(
    path: str, step: int | None = None, option: str = "step"
) -> tuple[Any, dict[str, Any]]:
    """Restore the parameters for evaluations: the target, unless `meta` names others.

    Args:
      path: workdir or `checkpoints` folder, local or remote.
      step: a saved step; None: the latest.
      option: by which the user chooses the step, for messages.

    Returns:
      (params, meta): see `Saved.restore_here`, and the run's description.

    Raises:
      UserError: see `_read_saved`; or the checkpoint does not contain them.
    """

    def read(saved: Saved) -> tuple[Any, dict[str, Any]]:
        item = saved.meta.get("probe_item", "target")
        if item == "target":
            found = saved.restore_here("target")
        else:
            found = saved.restore_here("params").get("params", {})
        if item not in found:
            raise UserError(
                f"no {item} encoder in {saved.folder}; give a checkpoint that has one"
            )
        return found[item], saved.meta

    return _read_saved(path, step, read, option)


@contextlib.contextmanager
def explain_misfit(path: str) -> Iterator[None]:
    """Turn errors of models whose description was changed into UserErrors.

    Args:
      path: of the checkpoint.
    """
    try:
        yield
    except UserError:
        raise
    # A changed size or choice fails wherever a model is first built or computed.
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"the description of the model in {path} does not fit its weights; its "
            f"`meta` is damaged ({reason}): restore it from a copy, or choose another "
            "step"
        ) from error


def restore_models(
    path: str, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the parameters of all modules.

    Args:
      path, step: see `restore_target`.

    Returns:
      ({"encoder", "predictor", "target"}, meta); a converted encoder has only the
      target.

    Raises:
      UserError: see `restore_target`.
    """

    def read(saved: Saved) -> tuple[dict[str, Any], dict[str, Any]]:
        found = saved.restore_here("params", "target")
        return {**found.pop("params", {}), **found}, saved.meta

    return _read_saved(path, step, read)


def restore_start(
    path: str, abstract_state: Any, keep_moments: bool, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Restore the initial state of a new run from a checkpoint of another.

    Args:
      path, step: see `restore_target`.
      abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings.
      keep_moments: also restore the optimiser's state.

    Returns:
      (step, fields): the checkpoint's step; the TrainState's `params`, `target` and,
      with `keep_moments`, `opt_state`.

    Raises:
      UserError: see `restore_target` and `Saved.restore`; or there are no moments.
    """

    def read(saved: Saved) -> tuple[int, dict[str, Any]]:
        if keep_moments and not saved.stored(["opt_state"]):
            raise UserError(
                f"{saved.folder} has no moments of the optimiser: set "
                "config.init.keep_moments=False"
            )
        names = ["params", "target"] + ["opt_state"] * keep_moments
        return saved.step, saved.restore(_fields(abstract_state, names))

    return _read_saved(path, step, read, option="config.init.step")


def save_converted(
    path: str,
    target: Any,
    params: dict[str, Any] | None,
    meta: dict[str, Any],
) -> None:
    """Write converted weights as a checkpoint of step 0.

    Args:
      path: folder to be made, as a workdir.
      target: the target encoder's parameters.
      params: `{"encoder", "predictor"}`; None: store the target only.
      meta: as for `Checkpointer.save`.

    Raises:
      UserError: `path` contains checkpoints, or Orbax cannot write below it.
    """
    folder = _folder_to_write(path)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another folder")
    items: dict[str, ocp.args.CheckpointArgs] = {
        "target": ocp.args.StandardSave(target),
        "meta": _meta_args(meta),
    }
    if params is not None:
        items["state"] = ocp.args.StandardSave({"params": params})
    with ocp.CheckpointManager(folder, handler_registry=_handler_registry()) as manager:
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def quiet_orbax() -> None:
    """Drop Orbax's progress messages, but not its warnings, from absl's log.

    Also drop what Python prints about the reads that Orbax abandons when one fails.
    """
    logger = logging.getLogger("absl")
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)
        sys.unraisablehook = functools.partial(_print_unless_orbax, sys.unraisablehook)


def _print_unless_orbax(hook: Callable[[Any], None], ignored: Any) -> None:
    code = getattr(ignored.object, "cr_code", None)
    is_abandoned = code is not None and "/orbax/" in code.co_filename
    # TensorStore finishes a read whose event loop has ended.
    is_late = str(ignored.exc_value) == "Event loop is closed"
    if not (is_abandoned or is_late):
        hook(ignored)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
