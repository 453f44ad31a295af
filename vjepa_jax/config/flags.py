"""Define the flag that names a config file and overrides its values."""

import os
import re
from collections.abc import Callable, Mapping

from absl import flags
from ml_collections import ConfigDict, config_flags

# `~` where a path begins: of one source, of several, of a folder of TFDS, and of an
# override of an evaluation during training.
_HOME = re.compile(r"(^|(?<=[,@= ]))~(?=[/, ]|$)")


class _NamedConfigs(flags.ArgumentParser):
    """Parser of `NAME[:ARGUMENT]` of a config of the package, or `FILE.py[:ARGUMENT]`.

    Attributes:
      named: functions that make configs, by name.
      files: parser of files.
    """

    def __init__(
        self,
        named: Mapping[str, Callable[..., ConfigDict]],
        files: flags.ArgumentParser,
    ):
        """Set the attributes."""
        self.named, self.files = named, files

    def parse(self, argument: str) -> ConfigDict:
        """Return the config."""
        name, *arguments = argument.split(":", 1)
        if name not in self.named:
            return self.files.parse(os.path.expanduser(argument))
        return self.named[name](*arguments).lock()

    def flag_type(self) -> str:
        """Return the name of the type in help texts."""
        return self.files.flag_type()


def define_config_flag(
    name: str = "config",
    required: bool = True,
    named: Mapping[str, Callable[..., ConfigDict]] | None = None,
) -> flags.FlagHolder[ConfigDict]:
    """Define `--NAME=FILE.py[:argument]` with overrides `--NAME.key=value`.

    Args:
      name: of the flag.
      required: whether the command fails without it.
      named: configs of the package that the flag accepts by name, from any folder.
    """
    holder = config_flags.DEFINE_config_file(
        name, None, "File with get_config(), e.g. configs/world_tiny.py"
    )
    flag = flags.FLAGS[name]
    flag.parser = _NamedConfigs(named or {}, flag.parser)
    if named:
        flag.help = f"{', '.join(named)}, or a file with get_config()"
    flag.help += f"; --{name}.KEY=VALUE changes a value"
    if required:
        flags.mark_flag_as_required(name)
    return holder


def expand_home(values: flags.FlagValues) -> None:
    """Replace `~` at the start of paths in flags of text and in configs.

    A shell leaves it in `--workdir=~/run`, and in a list of sources.
    """
    for name in values:
        flag = values[name]
        if isinstance(flag.value, str):
            flag.value = _with_home(flag.value)
        elif isinstance(flag.value, ConfigDict):
            _expand_config(flag.value)


def _expand_config(config: ConfigDict) -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _expand_config(value)
        elif isinstance(value, str):
            config[key] = _with_home(value)


def _with_home(text: str) -> str:
    return _HOME.sub(lambda _: os.path.expanduser("~"), text)
