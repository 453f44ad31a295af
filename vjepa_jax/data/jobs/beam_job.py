"""Work on numbers, spread by Apache Beam: over threads here, or by any Beam runner.

Locally one process is enough, since the work waits for processes of its own (see
`encoders`). Beam's own local processes would wait for ever for one that has died.
"""

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence

from vjepa_jax.base.errors import UserError

# The part of Beam's DirectRunner that runs in Python; what DirectRunner tries first
# downloads a binary.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_LOCAL_DEFAULTS = (
    "--direct_running_mode=multi_threading",
    "--direct_num_workers=0",  # one per core
)


def run(work: Callable[[int], None], numbers: range, options: Sequence[str]) -> None:
    """Calls `work` with every number, in any order.

    Args:
      work: picklable; may be called twice with a number, even at the same time.
      numbers: what to call it with.
      options: of Beam, as on its command lines; by default the numbers are spread over
        the cores of this machine.

    Raises:
      UserError: Beam is not installed, or refuses the options.
    """
    with _quiet_logs():
        try:
            with _no_warnings():  # of Google's clients, which few need
                import apache_beam as beam
        except ImportError as error:
            raise UserError(
                f"preparing shards needs Apache Beam ({error}): pip install "
                "'vjepa_jax[prepare]'"
            ) from error
        parsed = _parse(options)
        try:
            pipeline = beam.Pipeline(options=parsed)
        except (ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"Beam refuses the options behind --: {reason}") from error
        with pipeline:
            created = pipeline | beam.Create(numbers, reshuffle=True)
            _ = created | beam.Map(work)


def _parse(options: Sequence[str]):
    """Returns PipelineOptions, with the defaults of a local run where it is one."""
    from apache_beam.options.pipeline_options import (
        DirectOptions,
        PipelineOptions,
        StandardOptions,
    )

    complaint = io.StringIO()
    parsed = PipelineOptions([*options])
    try:
        with contextlib.redirect_stderr(complaint), _no_warnings():
            known = parsed.get_all_options()
            unknown = parsed.get_all_options(retain_unknown_options=True).keys() - known
            runner = parsed.view_as(StandardOptions).runner
            mode = parsed.view_as(DirectOptions).direct_running_mode
    except SystemExit:
        reason = complaint.getvalue().strip().rsplit("error: ", 1)[-1]
        raise UserError(f"Beam refuses the options behind --: {reason}") from None
    if runner not in (None, "DirectRunner"):
        return parsed  # it may know more options than Beam does
    if unknown:
        raise UserError(f"Beam has no option --{min(unknown)}, given behind --")
    if mode == "multi_processing":
        raise UserError(
            "--direct_running_mode=multi_processing is of no use: every video is "
            "encoded in a process of its own anyway, --direct_num_workers at a time"
        )
    return PipelineOptions([*_LOCAL_DEFAULTS, *options, f"--runner={_LOCAL_RUNNER}"])


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keeps Beam's account of its stages and servers out of the output."""
    logger = logging.getLogger("apache_beam")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
