"""Examine all videos before a run: which give clips, and why others do not.

    python -m vjepa_jax.check --data=LIST_OR_FOLDER [--deep]
        [--output=FILE.jsonl] [--config=configs/vjepa.py]

Reads each video's packets and one clip of it; with --deep every frame. With --config,
clips are read as that config defines, and the report adds how many host cores its
training step needs. FILE gets a line per video: path, frames, width, height, fps,
codec, error. An interrupted command leaves FILE.partial; the same command continues
from it.

The exit code is 1 if the share of unreadable videos is above --max_bad_fraction.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator

import tqdm
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults, rules
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import make_sampling
from vjepa_jax.data.jobs import survey
from vjepa_jax.data.sources.open import open_mixture
from vjepa_jax.data.sources.records import Joined, Source
from vjepa_jax.data.transforms.transforms import ClipTransform
from vjepa_jax.program import flops
from vjepa_jax.run import cli

EXIT_TOO_MANY_BAD = 1

# The share of a chip's peak that a step is assumed to reach; few steps reach more.
ASSUMED_MFU = 0.5
CHIPS = {"v5e": "TPU v5e", "v5p": "TPU v5p", "H200": "NVIDIA H200"}

_TIMEOUT_SECS, _DEEP_TIMEOUT_SECS = 60.0, 600.0


def clips_per_second(flops_per_clip: float, chip: str) -> float:
    """Return the clips per second that a chip of `CHIPS` trains on at `ASSUMED_MFU`."""
    peak = flops.peak_flops(CHIPS[chip])
    assert peak is not None  # the peaks of all `CHIPS` are known
    return ASSUMED_MFU * peak / flops_per_clip


def flops_per_clip(config: ConfigDict) -> float:
    """Return the FLOPs of an update, of all streams, per clip of the main stream.

    A teacher is counted as if it had the size of the encoder.
    """
    # Imported here: the workers import this module, and do not need JAX.
    from vjepa_jax.program import build

    objective = build.make_objective(config)
    return build.step_flops(config, objective) / config.batch_size


def _host_cores(config: ConfigDict, rate: float) -> Iterator[str]:
    """Yield the lines on how many host cores keep one chip busy."""
    per_clip = flops_per_clip(config)
    yield (
        f"\nto keep a chip busy with this config ({per_clip / 1e12:.3g} TFLOP per clip "
        f"at {ASSUMED_MFU:.0%} of peak)"
    )
    yield "  chip    clips/s   host cores"
    for chip in CHIPS:
        wanted = clips_per_second(per_clip, chip)
        yield f"  {chip:<6} {wanted:8.1f} {wanted / rate:12.1f}"


def _print(lines: Iterable[str]) -> None:
    for line in lines:  # a path may have bytes that are not UTF-8
        print(line.encode(errors="backslashreplace").decode())


def check(
    config: ConfigDict,
    *,
    deep: bool,
    output_path: str | None,
    num_workers: int,
    timeout_secs: float,
    with_host_cores: bool,
) -> float:
    """Examine the videos of `config.data`; the report is on stdout, progress on stderr.

    Args:
      config: of a run, which defines how clips are read.
      deep: decode every frame.
      output_path: JSON lines file, or None.
      num_workers: processes.
      timeout_secs: processor time for decoding one video. A worker without a result
        after twice that is killed.
      with_host_cores: report how many host cores the config's step needs.

    Returns:
      The share of unreadable videos.

    Raises:
      UserError: the source is missing, or the output cannot be written.
      KeyboardInterrupt: after a report of the videos that were examined by then.
    """
    data = config.data
    source = Joined(open_mixture(data.path).sources)
    crop = data.resolution, data.crop_scale, data.crop_aspect_ratio
    sampling = make_sampling(data, data)
    limits = Limits(data.max_pixels, timeout_secs)
    reader = ClipReader(sampling, data.resolution, data.resize, limits)
    examine = survey.Examination(reader, ClipTransform(*crop), deep)
    output = None
    if output_path:
        asked_for = {"deep": deep, "max_pixels": data.max_pixels}
        asked_for |= dataclasses.asdict(sampling)
        output = survey.Output(output_path, source.fingerprint(**asked_for))
    done = output.done if output else {}
    summary = survey.Summary(sampling)
    if output and done:
        print(
            f"{output.partial_path} has {len(done)} of {len(source)} videos already",
            file=sys.stderr,
        )
    for finding in done.values():
        summary.add(finding)
    findings = survey.survey(
        source,
        examine,
        (index for index in range(len(source)) if index not in done),
        num_workers=num_workers,
        timeout_secs=2 * timeout_secs,
    )
    try:
        with (
            contextlib.closing(findings),
            tqdm.tqdm(
                total=len(source), initial=len(done), unit="video", disable=None
            ) as progress,
        ):
            for index, finding in findings:
                if output:
                    output.add(index, finding)
                summary.add(finding)
                progress.set_postfix(unreadable=summary.num_bad, refresh=False)
                progress.update()
    except KeyboardInterrupt:
        _print(summary.lines())
        count, kept = summary.num_videos, ""
        if output:
            # It may hold one more, if the interruption came before that was counted.
            count = output.count()
            kept = f"; {output.partial_path} has them, the same command continues"
        print(
            f"interrupted after {count} of {len(source)} videos{kept}",
            file=sys.stderr,
        )
        raise
    if output:
        output.finish()
    _print(_report(source, config, summary, with_host_cores))
    return summary.num_bad / summary.num_videos


def _report(
    source: Source, config: ConfigDict, summary: survey.Summary, with_host_cores: bool
) -> Iterator[str]:
    yield source.name
    yield from summary.lines()
    rate, data = summary.clips_per_second, config.data
    if rate is None:
        return
    spacings = {
        "frame_step": f"step {data.frame_step}",
        "fps": f"{data.fps:g} per second",
        "duration_secs": f"{data.duration_secs:g} s",
    }
    (step,) = (words for key, words in spacings.items() if data[key])
    yield (
        f"\n{rate:.1f} clips/s per core ({data.num_frames} frames, {step}, "
        f"{data.resolution} pixels; processor time)"
    )
    if with_host_cores:
        yield from _host_cores(config, rate)


def main() -> None:
    """Run the command line."""
    config = _CONFIG.value or defaults.get_config()
    if _DATA.value:
        config.data.path = _DATA.value
    if not config.data.path:
        raise UserError("--data is not set: give a folder of videos or a list file")
    rules.validate(config)
    limit = _MAX_BAD_FRACTION.value
    if limit is None:
        limit = config.data.max_bad_fraction
    default_secs = _DEEP_TIMEOUT_SECS if _DEEP.value else _TIMEOUT_SECS
    try:
        share = check(
            config,
            deep=_DEEP.value,
            output_path=_OUTPUT.value,
            num_workers=_WORKERS.value or os.cpu_count() or 1,
            timeout_secs=_TIMEOUT.value or default_secs,
            with_host_cores=_CONFIG.value is not None,
        )
    except UserError as error:
        message = str(error)
        if _DATA.value and message.startswith("data.path"):  # not what was set here
            message = "--data" + message.removeprefix("data.path")
        raise UserError(message) from error
    except KeyboardInterrupt:
        sys.exit(cli.EXIT_INTERRUPTED)
    if share > limit:
        print(
            f"{share:.1%} of the videos are unreadable, more than {limit:.1%}: fix or "
            "remove them, or allow more with --max_bad_fraction",
            file=sys.stderr,
        )
        sys.exit(EXIT_TOO_MANY_BAD)


if __name__ == "__main__":
    _CONFIG = define_config_flag(required=False)
    _DATA = flags.DEFINE_string(
        "data",
        None,
        "Folder or list file (`path label` lines) of videos; default: the config's",
    )
    _DEEP = flags.DEFINE_bool("deep", False, "Decode every frame")
    _OUTPUT = flags.DEFINE_string("output", None, "JSON lines file to write")
    _WORKERS = flags.DEFINE_integer(
        "workers", None, "Worker processes; default: one per core", lower_bound=1
    )
    _TIMEOUT = flags.DEFINE_float(
        "timeout_secs",
        None,
        f"Processor seconds for one video; default: {_TIMEOUT_SECS:g}, with --deep "
        f"{_DEEP_TIMEOUT_SECS:g}",
        lower_bound=0.001,
    )
    _MAX_BAD_FRACTION = flags.DEFINE_float(
        "max_bad_fraction",
        None,
        "Largest share of unreadable videos; default: the config's, 0.05",
        lower_bound=0,
        upper_bound=1,
    )
    cli.run(main)
