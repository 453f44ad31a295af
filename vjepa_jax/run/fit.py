"""Whether stored arrays fit a model: names, shapes and dtypes, before any is read."""

from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.base.errors import UserError

_MAX_LISTED = 10


def require_fit(folder: Any, *, stored: Any, wanted: Any) -> None:
    """Compare two trees of arrays, or of what has their shapes and dtypes.

    Args:
      folder: where the checkpoint is, for the message.
      stored: tree of what the checkpoint holds.
      wanted: tree of what the model has.

    Raises:
      UserError: names, shapes or dtypes differ; up to 10 of them are listed.
    """
    stored, wanted = _describe(stored), _describe(wanted)
    differing = [
        f"{name}: in checkpoint {stored.get(name, 'missing')}, "
        f"in model {wanted.get(name, 'missing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
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


def _describe(tree: Any) -> dict[str, str]:
    """Maps each leaf's path to its type, e.g. `params/encoder/bias: float32[64]`.

    Attribute and dictionary keys look alike, since Orbax stores named tuples as
    dictionaries.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
