"""What a checkpoint is, on disk: its items, their types, its version.

A step is a folder `<workdir>/checkpoints/<step>` with four items, so that each reader
takes only what it needs:

    state    step, params, opt_state, guard   what only training needs
    target   the target encoder               what probes and downstream users need
    data     JSON                             position and fingerprint of the data
    meta     JSON                             config, model description, versions
"""

from importlib import metadata
from typing import Any

import jax
from etils import epath

import vjepa_jax
from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError

FOLDER = "checkpoints"
# Raised when a reader of the old layout would misread the new one.
FORMAT_VERSION = 1


def absolute(path: str) -> epath.Path:
    """Returns a path as Orbax takes it."""
    return epath.Path(files.absolute(path))


def provenance() -> dict[str, Any]:
    """Returns what the item `meta` holds besides what the run says."""
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "vjepa_jax": vjepa_jax.__version__,
            "jax": jax.__version__,
            "orbax": metadata.version("orbax-checkpoint"),
        },
    }


def require_format(folder: epath.Path, meta: dict[str, Any]) -> None:
    """Raises UserError where this release cannot read what `meta` was written with."""
    version = meta.get("format_version")
    if version is None or version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format {version}, this release reads up to "
            f"{FORMAT_VERSION}; install the release that wrote it "
            f"({meta.get('versions')})"
        )
