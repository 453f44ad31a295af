"""One saved step of a run: its description and its arrays, read field by field.

Only this file and `checkpoint.py` import Orbax. Nothing here waits for other processes,
so that some of them may find damage and others not.
"""

import contextlib
import errno
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved as saved_config

# Increase it when a reader of the old layout would misread the new one.
FORMAT_VERSION = 1
_MAX_LISTED = 10
ITEMS_FILE = "_CHECKPOINT_METADATA"  # in which Orbax lists the items of a step
# Values in `meta` on which readers rely, where they are present.
_META_TYPES: dict[str, type] = {
    "format_version": int,
    "config": dict,
    "video_shape": list,
    "kind": str,
    "family": str,
    "probe_item": str,
    "official_keys": dict,
    "classifier": dict,
    "action_predictor": dict,
}
# What Orbax and TensorStore raise for files that are incomplete, missing or changed.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)
# Errors of a store that may pass; TensorStore raises them as ValueError too.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED|"
    r"UNAUTHENTICATED)\b"
)
_MAX_REASON = 200


class DamagedCheckpoint(UserError):
    """A saved step cannot be read: files of it are incomplete, missing or changed."""


class Saved:
    """One saved step, read field by field; what is not asked for is not read.

    Attributes:
      step: its number.
      folder: of the step.
      meta: description of the run, and the `step`.
      has_data: True if a training run saved it, False for converted weights.
    """

    def __init__(self, folder: epath.Path, step: int):
        """Read the description of a step.

        Args:
          folder: `<workdir>/checkpoints`.
          step: a saved step.

        Raises:
          DamagedCheckpoint: the description is damaged.
          UserError: vjepa_jax of this version cannot read the step.
        """
        self.step, self.folder = step, folder / str(step)
        self._items = self._list_items()
        self.has_data = "data" in self._items
        meta = self.read_json("meta")
        version = meta.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(
                f"{self.folder} has checkpoint format {version}, this release reads up "
                f"to {FORMAT_VERSION}; install the release that wrote it "
                f"({meta.get('versions')})"
            )
        wrong = [
            k for k, t in _META_TYPES.items() if not isinstance(meta.get(k, t()), t)
        ]
        wrong += [k for k in ("format_version",) if k not in meta]
        wrong += [k for k in ("video_shape",) if k not in meta and "config" in meta]
        if wrong:
            raise self.damaged(f"meta: missing or of a wrong type: {', '.join(wrong)}")
        with self._reading("meta"):
            if "config" in meta:
                saved_config.restored(meta["config"])
        self.meta = meta | {"step": step}

    def read_json(self, item: str) -> dict[str, Any]:
        """Read a JSON item; raise DamagedCheckpoint if it is no dictionary."""
        with self._reading(item):
            content = ocp.JsonCheckpointHandler().restore(self.folder / item)
        if not isinstance(content, dict):
            raise self.damaged(f"{item}: not a dictionary")
        return content

    def stored(self, fields: Iterable[str]) -> dict[str, Any]:
        """Return {field: tree of array metadata} of the fields that were saved.

        Fields are `target` and those of `state`.
        """
        found: dict[str, Any] = {}
        for item in ("state", "target"):
            wanted = [
                name for name in fields if (name == "target") == (item == "target")
            ]
            if not wanted or item not in self._items:
                continue
            with self._reading(item):
                handler = ocp.StandardCheckpointHandler()
                tree = handler.metadata(self.folder / item).tree
                if item == "target":
                    tree = {"target": tree}
                found |= {name: tree[name] for name in wanted if name in tree}
        return found

    def restore(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Restore fields, bit for bit; the arrays of other fields are not read.

        Args:
          wanted: {field: tree of `jax.ShapeDtypeStruct` with shardings}; these may
            differ from those of the run that saved (other mesh, other device count).

        Raises:
          DamagedCheckpoint: their files are damaged.
          UserError: names, shapes or dtypes differ (up to 10 of them are listed).
        """
        stored = {name: {} for name in wanted} | self.stored(wanted)
        require_fit(self.folder, stored=stored, wanted=wanted)
        fields = {k: tree for k, tree in wanted.items() if k != "target"}
        out = self._read_arrays("state", fields) if fields else {}
        if "target" in wanted:
            out["target"] = self._read_arrays("target", wanted["target"])
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

        return self.restore(jax.tree.map(abstract, self.stored(fields)))

    def _list_items(self) -> set[str]:
        """Return the items that were saved, also those whose folder is missing now."""
        found = {path.name for path in self.folder.iterdir() if path.is_dir()}
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            record = json.loads((self.folder / ITEMS_FILE).read_text())
            found |= set(record["item_handlers"])
        return found | {"state"} if "data" in found else found

    def _read_arrays(self, item: str, wanted: Any) -> Any:
        """Read some branches of an item, without waiting for other processes."""
        args = ocp.args.PyTreeRestore(
            wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with (
            self._reading(item),
            contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler,
        ):
            restored = handler.restore(self.folder / item, args=args)
            return jax.block_until_ready(restored)

    def damaged(self, reason: str) -> DamagedCheckpoint:
        """Return the error that names this step, with a reason."""
        return DamagedCheckpoint(f"checkpoint {self.folder} is damaged ({reason})")

    @contextlib.contextmanager
    def _reading(self, item: str) -> Iterator[None]:
        """Raise DamagedCheckpoint for errors of reading that repeating cannot help."""
        try:
            yield
        except Exception as error:
            # Orbax wraps the error of an array in a plain Exception.
            is_wrapped = type(error) is Exception and error.__cause__ is not None
            cause = error.__cause__ if is_wrapped else error
            # Of TensorStore's messages only the first part is for people.
            text = re.split(r" \[(?:tensorstore_spec|source)|\n", str(cause))[0]
            short = textwrap.shorten(text, _MAX_REASON, placeholder="...")
            reason = f"{item}: {short or type(cause).__name__}"
            if isinstance(cause, PermissionError) or "PERMISSION_DENIED" in text:
                raise UserError(f"{self.folder} cannot be read ({reason})") from None
            is_lost = isinstance(cause, _DAMAGE) or (
                isinstance(cause, OSError) and cause.errno == errno.EIO
            )
            if not is_lost or _PASSING.search(str(cause)):
                raise
            raise self.damaged(reason) from error


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
