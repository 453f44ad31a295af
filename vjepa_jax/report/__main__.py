"""Show what a run has done and learned, on one page.

    python -m vjepa_jax.report --workdir=RUN [--compare=RUN2] [--output=FILE]

Writes `report.html` into the workdir, or FILE: one file that needs no network. What a
run does not have (a checkpoint, its data, results of evaluations) is said on the page.
See docs/report.md.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.report import page, run_files, sections
from vjepa_jax.run import checkpoint, cli

FILE = "report.html"


def write_report(workdir: str, compare: str = "", output: str = "") -> str:
    """Write the page of a run, beside another one if there is one.

    Args:
      workdir: of the run, local or remote.
      compare: workdir of the other run; "": none.
      output: file to write, local; "": `report.html` in the workdir.

    Returns:
      The path that was written.

    Raises:
      UserError: a workdir holds no run, or the file cannot be written.
    """
    workdirs = [workdir, compare] if compare else [workdir]
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(run_files.opened(path, label, letter))
            for path, label, letter in zip(
                workdirs, run_files.labels(workdirs), "AB", strict=False
            )
        ]
        html = page.render(runs, sections.tiles(runs), sections.make(runs))
        path = pathlib.Path(output) if output else runs[0].folder / FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, html)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return output or os.path.join(workdir, FILE)


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    path = write_report(_WORKDIR.value, _COMPARE.value, _OUTPUT.value)
    print(f"report in {path}", file=sys.stderr)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run", required=True)
    _COMPARE = flags.DEFINE_string("compare", "", "Folder of a run to set beside it")
    _OUTPUT = flags.DEFINE_string("output", "", "File to write; report.html there")
    cli.run(main)
