"""The flag that names a config file and overrides its values."""

from absl import flags
from ml_collections import config_flags


def define_config_flag(name: str = "config", required: bool = True) -> flags.FlagHolder:
    """Define `--NAME=FILE.py[:argument]` with overrides `--NAME.key=value`."""
    holder = config_flags.DEFINE_config_file(
        name, None, "File with get_config(), e.g. configs/world_tiny.py"
    )
    if required:
        flags.mark_flag_as_required(name)
    return holder
