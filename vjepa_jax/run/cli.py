"""Shared by all commands: flags, --help, one-line errors, exit codes."""

import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.host_memory import keep_freed_memory
from vjepa_jax.config.flags import expand_home

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as shells report a process that Ctrl-C ended

# How ml_collections begins the message about a file that cannot be read.
_NOT_LOADED = (
    r"^Configuration is not available because of an earlier failure to load: "
    r"Failed loading config file \S+ (Attempted \[[^\]]*\]: \S+ )*"
)


def define_cluster_flags() -> Callable[[], dict[str, Any]]:
    """Define the flags by which the processes of a run find each other.

    Returns:
      Once the flags are parsed: the arguments of `distributed.initialize`.
    """
    holders = {
        "coordinator_address": flags.DEFINE_string(
            "coordinator_address", None, "host:port of the first process"
        ),
        "num_processes": flags.DEFINE_integer(
            "num_processes", None, "Processes of the run", lower_bound=1
        ),
        "process_id": flags.DEFINE_integer(
            "process_id", None, "Rank of this process, from 0", lower_bound=0
        ),
        "start_timeout_secs": flags.DEFINE_integer(
            "start_timeout_secs",
            300,
            "Longest wait until all processes have started",
            lower_bound=1,
        ),
        "heartbeat_timeout_secs": flags.DEFINE_integer(
            "heartbeat_timeout_secs",
            100,
            "Time without a heartbeat after which a process counts as dead",
            lower_bound=1,
        ),
    }
    return lambda: {name: holder.value for name, holder in holders.items()}


def fail(message: str) -> NoReturn:
    """Print one line and exit with the code of a user's error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _help() -> str:
    """Return the command's docstring and its own flags, `--config` among them."""
    ours = ("vjepa_jax.", "ml_collections.")
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module.startswith(ours) else ():
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    doc = inspect.cleandoc(sys.modules["__main__"].__doc__ or "")
    return f"{doc}\n\nflags:\n{flags.FLAGS.main_module_help()}"


def _unknown_key(message: str, argv: Sequence[str]) -> str | None:
    """Return a message that names the flag of an unknown config key.

    Args:
      message: of ml_collections' error: the key, and perhaps a similar one.
      argv: the command line.

    Returns:
      The message; None if this is another error.
    """
    parts = re.fullmatch(r"""['"]*(\w+)['"]*( Did you mean "(\w+)" .*)?""", message)
    if not parts:
        return None
    key, _, similar = parts.groups()
    hint = f': did you mean "{similar}"?' if similar else ""
    for argument in argv:
        flag = re.match(rf"--?((?:config|teacher)(?:\.\w+)*)\.{key}\b", argument)
        if flag:
            return f'unknown key "{key}" in --{flag[1]}{hint}'
    return None


def _parse_flags(argv: list[str]) -> list[str]:
    if {"--help", "-help", "-h"} & set(argv):
        print(_help())
        sys.exit()
    try:
        rest = flags.FLAGS(argv)
        for name in ("config", "teacher"):
            if name in flags.FLAGS and flags.FLAGS[name].present:
                config: Any = flags.FLAGS[name].value
                config.keys()  # raises if the file failed to load
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        # Mistakes in the config file and unknown keys arrive as these.
        cause: BaseException = e
        while cause.args and isinstance(cause.args[0], Exception):
            cause = cause.args[0]
        message = " ".join(str(cause.args[0] if cause.args else cause).split())
        # The text of a config file's own UserError begins with its traceback.
        message = message.rsplit(f"{UserError.__name__}: ", 1)[-1]
        message = re.sub(_NOT_LOADED, "the config cannot be loaded: ", message)
        fail(_unknown_key(message, argv) or message)
    expand_home(flags.FLAGS)
    if len(rest) > 1:
        fail(f"argument '{rest[1]}' is not a flag: write --name=value")
    return rest


def _is_wanted(record: logging.LogRecord) -> bool:
    """Return False for jax's line about a missing TPU library on other machines.

    Where there is a TPU, jax logs a warning of its own.
    """
    message = record.getMessage()
    is_tpu = "Unable to initialize backend 'tpu'" in message
    return not (is_tpu and "Failed to open libtpu.so" in message)


def run(main: Callable[[], None]) -> None:
    """Parse the flags and run `main`; a user's error prints one line, no traceback."""

    def guarded(argv: list[str]) -> None:
        del argv
        keep_freed_memory()
        try:
            main()
        except UserError as error:
            fail(str(error))

    logging.getLogger("jax._src.xla_bridge").addFilter(_is_wanted)
    app.run(guarded, flags_parser=_parse_flags)
