"""Restore, complete and compare the configs of runs and checkpoints."""

from typing import Any

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import (
    ConfigDict,
    evaluation,
    flatten,
    get_config,
    mask,
    stream,
)

# Keys that may change when a run continues: they change how it computes or reports, but
# not the result.
OPERATIONAL = (
    "mesh.",
    "compilation_cache",
    "checkpoint.",
    "log.",
    "profile.",
    "evals.",
    "data.num_workers",
    "data.prefetch_megabytes",
    "data.worker_timeout_secs",
    "data.max_bad_fraction",
    "data.accept_change",
    "data.path",
    "world.path",
    "world.physics_pairs",
    "world.segmentation_videos",
    "world.action_clips",
    "teacher.step",
    "optim.max_skipped_in_row",
    "model.scan_layers",
    "model.remat",
    "model.attention",
)
# Losses that are not means over clips: microbatches change them.
_JOINT_LOSSES = ("objective.variance_weight", "objective.covariance_weight")


def from_json(data: Any) -> Any:
    """Undo JSON: dictionaries become ConfigDicts, lists become tuples."""
    if isinstance(data, dict):
        return ConfigDict({key: from_json(value) for key, value in data.items()})
    return tuple(from_json(x) for x in data) if isinstance(data, list) else data


def restored(saved: dict[str, Any]) -> ConfigDict:
    """Return the config of a checkpoint.

    Keys that were added later get their defaults, which do not change the result.

    Args:
      saved: the parsed JSON.

    Raises:
      UserError: it is not a config, or a value is of another type than its default.
    """
    if not isinstance(saved, dict):
        raise UserError("the saved config is not a dictionary")
    try:
        config = from_json(saved)
    except (ValueError, TypeError) as error:  # names that no key can have
        raise UserError(f"the saved config cannot be read: {error}") from None
    _fill(config, get_config(), named=("masks", "streams"))
    for fields in config.streams.values():
        _fill(fields, stream(), named=("masks",))
    for masks in (config.masks, *(s.masks for s in config.streams.values())):
        for spec in masks.values():
            _fill(spec, mask())
    for entry in config.evals.values():
        _fill(entry, evaluation(""))
    return config


def _fill(config: ConfigDict, default: ConfigDict, named: tuple[str, ...] = ()) -> None:
    """Add missing keys, but no entries of `named` dicts, which the user defines."""
    _require_type("", config, default)
    for key, value in default.items():
        if key not in config:
            config[key] = ConfigDict() if key in named else value
            continue
        _require_type(key, config[key], value)
        if isinstance(value, ConfigDict) and key not in named:
            _fill(config[key], value)


def _require_type(key: str, value: Any, default: Any) -> None:
    kinds = (int, float) if type(default) is float else (type(default),)
    if type(value) not in kinds:
        raise UserError(
            f"the saved config has {key or 'an entry'}={value!r}, which is not a "
            f"{type(default).__name__}"
        )


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the changed keys, with values, that change the result of a run."""
    old, new = flatten(old), flatten(new)
    is_joint = any(new.get(key) for key in _JOINT_LOSSES)
    ignored = set() if is_joint else {"accumulate_steps"}
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in sorted((old.keys() | new.keys()) - ignored)
        if old.get(key) != new.get(key) and not _is_operational(key)
    ]


def _is_operational(key: str) -> bool:
    # The fingerprint of the data compares videos and their shares; only
    # `data.accept_change` overrides it.
    is_of_data = key.startswith(("data.", "streams."))
    is_fingerprinted = is_of_data and key.endswith((".path", ".mix_weights"))
    return is_fingerprinted or key.startswith(OPERATIONAL)
