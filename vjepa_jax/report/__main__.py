"""Write a page that shows what a model learned and how its run went.

    python -m vjepa_jax.report --workdir=RUN [--step=N] [--compare=RUN2] [--output=FILE]

Writes one HTML file that needs no network: `report.html` in the workdir, or FILE. The
page names what a run does not have (a checkpoint, its data, results of evaluations).
See docs/report.md.
"""

import contextlib
import os
import pathlib
import sys

from absl import flags

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.base.extras import imports_of
from vjepa_jax.report import run_files
from vjepa_jax.run import checkpoint, cli

FILE = "report.html"


def write_report(
    workdir: str, compare: str = "", output: str = "", step: int | None = None
) -> str:
    """Write the page of a run, or of two runs side by side.

    Args:
      workdir: of the run, local or remote.
      compare: workdir of a second run; "" for none.
      output: local file to write; "": `report.html` in the workdir.
      step: saved step of the run whose weights are shown; None: the latest.

    Returns:
      The path of the page.

    Raises:
      UserError: a workdir holds no run, the page cannot be written, or the packages of
        the extra `report` are not installed.
    """
    with imports_of("report"):
        from vjepa_jax.report import page, sections
    paths = [workdir, compare] if compare else [workdir]
    labels = run_files.make_labels(paths)
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(run_files.opened(*of_run))
            for of_run in zip(paths, labels, "AB", strict=False)
        ]
        runs[0].step = step
        tiles, made = sections.make_tiles(runs), sections.make_sections(runs)
        html = page.render(runs, tiles, made)
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
    path = write_report(_WORKDIR.value, _COMPARE.value, _OUTPUT.value, _STEP.value)
    print(f"report in {path}", file=sys.stderr)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run", required=True)
    _COMPARE = flags.DEFINE_string("compare", "", "Folder of a run to set beside it")
    _STEP = flags.DEFINE_integer("step", None, "Saved step of the run; the latest")
    _OUTPUT = flags.DEFINE_string(
        "output", "", "File to write; report.html in the workdir by default"
    )
    cli.run(main)
