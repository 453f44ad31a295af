"""What every command shares: flags, one-line errors, exit codes."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.host_memory import keep_freed_memory

EXIT_USER_ERROR = 2


def define_cluster_flags() -> Callable[[], dict[str, Any]]:
    """Define how the processes of a run find each other.

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
            "process_id", None, "Which of them this is, from 0", lower_bound=0
        ),
        "start_timeout_secs": flags.DEFINE_integer(
            "start_timeout_secs",
            300,
            "Longest wait for all processes to be there",
            lower_bound=1,
        ),
        "heartbeat_timeout_secs": flags.DEFINE_integer(
            "heartbeat_timeout_secs",
            100,
            "Silence after which a process counts as dead",
            lower_bound=1,
        ),
    }
    return lambda: {name: holder.value for name, holder in holders.items()}


def fail(message: str) -> None:
    """Print one line and exit with the code of a user's error."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        for name in ("config", "teacher"):
            if name in flags.FLAGS and flags.FLAGS[name].present:
                flags.FLAGS[name].value.keys()  # a file that failed to load shows here
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        # The config file's own mistakes and unknown keys arrive as these.
        message = " ".join(str(e.args[0] if e.args else e).split())
        # A config file's own UserError comes with its traceback in the text.
        fail(message.rsplit(f"{UserError.__name__}: ", 1)[-1])
    if len(rest) > 1:
        fail(f"argument '{rest[1]}' is not a flag: write --name=value")
    return rest


def run(main: Callable[[], None]) -> None:
    """Run `main` after parsing the flags; what the user caused gets no traceback."""

    def guarded(argv):
        del argv
        keep_freed_memory()
        try:
            main()
        except UserError as error:
            fail(str(error))

    app.run(guarded, flags_parser=_parse_flags)
