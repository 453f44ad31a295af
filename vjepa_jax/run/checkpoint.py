"""Save and restore checkpoints. Only this file imports Orbax.

A step is a folder `<workdir>/checkpoints/<step>` with four items, so that each reader
reads only what it needs:

    state    step, params, opt_state, guard   what training needs
    target   averaged or frozen parameters    what evaluations need
    data     JSON                             position and fingerprint of the data
    meta     JSON                             config, description of the model, versions

`target` is absent where the objective has none; converted weights have no `data`. Orbax
writes a step under a temporary name and renames it when all items are complete: an
interrupted save never counts as a checkpoint.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

import vjepa_jax
from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError

FOLDER = "checkpoints"
# Increase it when a reader of the old layout would misread the new one.
FORMAT_VERSION = 1
_STATE_FIELDS = ("step", "params", "opt_state", "guard")
_MAX_LISTED = 10


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


class Saved:
    """One saved step, read field by field.

    Attributes:
      step: its number.
      folder: of the step.
      meta: description of the run, and the `step`.
      stored: {field: tree of array metadata}; fields are `target` and those of `state`.
      has_data: True if a training run saved it, False for converted weights.
    """

    def __init__(self, manager: ocp.CheckpointManager, step: int | None = None):
        """Read the metadata of a step, by default of the latest.

        Raises:
          UserError: the step does not exist, or vjepa_jax of this version cannot read
            it.
        """
        steps = sorted(manager.all_steps())
        if not steps:
            raise UserError(
                f"no checkpoint in {manager.directory}; give the workdir of a training "
                "run that has saved one"
            )
        self.step = steps[-1] if step is None else step
        if self.step not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {manager.directory}; saved steps: "
                f"{', '.join(map(str, steps))}"
            )
        self.folder = manager.directory / str(self.step)
        items = manager.item_metadata(self.step)
        trees = {k: items[k].tree for k in ("state", "target") if items.get(k)}
        if "meta" not in items or not trees:
            raise UserError(
                f"no model in {self.folder}; give a checkpoint that vjepa_jax wrote"
            )
        self.has_data = "data" in items
        self.stored = dict(trees.get("state", {}))
        if "target" in trees:
            self.stored["target"] = trees["target"]
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        self.meta = manager.restore(self.step, args=args)["meta"] | {"step": self.step}
        version = self.meta.get("format_version")
        if version is None or version > FORMAT_VERSION:
            raise UserError(
                f"{self.folder} has checkpoint format {version}, this release reads up "
                f"to {FORMAT_VERSION}; install the release that wrote it "
                f"({self.meta.get('versions')})"
            )

    def restore(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Restore fields, bit for bit; the arrays of other fields are not read.

        Args:
          wanted: {field: tree of `jax.ShapeDtypeStruct` with shardings}; these may
            differ from those of the run that saved (other mesh, other device count).

        Raises:
          UserError: names, shapes or dtypes differ (up to 10 of them are listed).
        """
        stored = {name: self.stored.get(name, {}) for name in wanted}
        require_fit(self.folder, stored=stored, wanted=wanted)
        fields = {k: tree for k, tree in wanted.items() if k != "target"}
        out = _read(self.folder / "state", fields) if fields else {}
        if "target" in wanted:
            out["target"] = _read(self.folder / "target", wanted["target"])
        return out

    def restore_here(self, *fields: str) -> dict[str, Any]:
        """Restore fields without knowing the model.

        Returns:
          {field: nested dictionaries of arrays in the saved dtypes, each complete on
          the first device of this process}; fields that were not saved are absent.
        """
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def abstract(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        found = {name: self.stored[name] for name in fields if name in self.stored}
        return self.restore(jax.tree.map(abstract, found))


def _fields(state: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return fields of a TrainState, without a target that is None."""
    fields = {name: getattr(state, name) for name in names}
    return {name: tree for name, tree in fields.items() if tree is not None}


def _read(folder: epath.Path, wanted: Any) -> Any:
    """Read some branches of an item."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        return checkpointer.restore(folder, args=args)


def require_fit(folder: Any, *, stored: Any, wanted: Any) -> None:
    """Compare names, shapes and dtypes of two trees of arrays, or of their metadata.

    Args:
      folder: of the checkpoint, for the message.
      stored: tree of the checkpoint.
      wanted: tree of the model.

    Raises:
      UserError: they differ; up to 10 differences are listed.
    """
    old, new = _types(stored), _types(wanted)
    differing = [
        f"{name}: in checkpoint {old.get(name, 'missing')}, "
        f"in model {new.get(name, 'missing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if not differing:
        return
    listed = differing[:_MAX_LISTED]
    if len(differing) > len(listed):
        listed.append(f"and {len(differing) - len(listed)} more")
    raise UserError(
        f"{folder} does not fit this model ({len(differing)} arrays differ); train "
        "with the config it was written with, or choose a new workdir:\n  "
        + "\n  ".join(listed)
    )


def _types(tree: Any) -> dict[str, str]:
    """Return {path: type} of the leaves, e.g. `params/encoder/bias: float32[64]`.

    Attribute and dictionary keys look alike, since Orbax stores named tuples as
    dictionaries.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class Checkpointer:
    """Saves and restores the state of one run; a context manager.

    Saving is asynchronous: `save` returns when the arrays are copied to the host, so
    the next step may donate them. Files are written in the background; leaving the
    context without an error waits for them. Every process calls every method, with the
    same step.
    """

    def __init__(self, workdir: str, *, every_steps: int, keep: int):
        """Open `<workdir>/checkpoints`; make it if it is missing.

        Leftovers of interrupted saves are removed, so only one run may use a workdir.

        Args:
          workdir: folder of the run, local or remote (`gs://`).
          every_steps: steps between two checkpoints, at least 1.
          keep: number of latest checkpoints to keep, at least 1.
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

    def restore(
        self, step: int, abstract_state: Any
    ) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Restore every item of one step, bit for bit.

        Args:
          step: a saved step, as from `latest_step`.
          abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings.

        Returns:
          (state, data, meta): the TrainState with these shardings, and the two
          dictionaries given to `save`.

        Raises:
          UserError: see `Saved` and `Saved.restore`; or the step is not of a training
            run.
        """
        saved = Saved(self._manager, step)
        if not saved.has_data:
            raise UserError(
                f"{saved.folder} contains converted weights, not a training run: start "
                "from it with config.init.path, in another --workdir"
            )
        wanted = _fields(abstract_state, (*_STATE_FIELDS, "target"))
        state = abstract_state.replace(**saved.restore(wanted))
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        return state, self._manager.restore(step, args=args)["data"], saved.meta

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


def open_saved(path: str, step: int | None = None) -> Saved:
    """Open a saved step of a workdir or a `checkpoints` folder.

    Args:
      path: local or remote folder.
      step: a saved step; None: the latest.

    Raises:
      UserError: the folder does not exist; or see `Saved`.
    """
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
        return Saved(manager, step)


def restore_target(path: str, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Restore the parameters for evaluations: the target, unless `meta` names others.

    Args:
      path, step: see `open_saved`.

    Returns:
      (params, meta): see `Saved.restore_here`, and the run's description.

    Raises:
      UserError: see `open_saved`; or the checkpoint does not contain them.
    """
    saved = open_saved(path, step)
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


def restore_models(
    path: str, step: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Restore the parameters of all modules.

    Args:
      path, step: see `open_saved`.

    Returns:
      ({"encoder", "predictor", "target"}, meta); a converted encoder has only the
      target.

    Raises:
      UserError: see `open_saved`.
    """
    saved = open_saved(path, step)
    found = saved.restore_here("params", "target")
    return {**found.pop("params", {}), **found}, saved.meta


def restore_start(
    path: str, abstract_state: Any, keep_moments: bool
) -> tuple[int, dict[str, Any]]:
    """Restore the initial state of a new run from the latest checkpoint of another.

    Args:
      path: see `open_saved`.
      abstract_state: TrainState of `jax.ShapeDtypeStruct` with shardings.
      keep_moments: also restore the optimiser's state.

    Returns:
      (step, fields): the checkpoint's step; the TrainState's `params`, `target` and,
      with `keep_moments`, `opt_state`.

    Raises:
      UserError: see `open_saved` and `Saved.restore`; or there are no moments.
    """
    saved = open_saved(path)
    if keep_moments and "opt_state" not in saved.stored:
        raise UserError(
            f"{saved.folder} has no moments of the optimiser: set "
            "config.init.keep_moments=False"
        )
    names = ("params", "target", "opt_state") if keep_moments else ("params", "target")
    return saved.step, saved.restore(_fields(abstract_state, names))


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
      UserError: `path` contains checkpoints.
    """
    folder = absolute(path) / FOLDER
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
    """Drop Orbax's progress messages, but not its warnings, from absl's log."""
    logger = logging.getLogger("absl")
    if _is_wanted not in logger.filters:
        logger.addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "/orbax/" not in record.pathname
