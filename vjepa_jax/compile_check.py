"""Compile the step of a config for devices that are not here; report whether it fits.

    python -m vjepa_jax.compile_check --config=configs/vjepa2.py:vitl16 \
        --topology=v5e:4x4 [--num_slices=2] [--config.key=value]

The step is that of the run, sharded as in the run, compiled by the TPU compiler
(libtpu: `pip install -e ".[tpu]"`) or by jax's CUDA plug-in on any machine. The report
gives memory, FLOPs and collectives of one device, and the compile time; exit code 1
means that the step does not fit. `--list` names the topologies, `--fast` compiles with
less effort (for sweeps: too optimistic near the limit), `--search` finds the largest
batch.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults, rules
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, compilation, hlo, step_report, topologies
from vjepa_jax.program.step_report import StepReport
from vjepa_jax.run import cli

EXIT_DOES_NOT_FIT = 1


def check_step(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    trained: ConfigDict | None = None,
    fast: bool = False,
    hlo_file: str = "",
) -> StepReport:
    """Compile the step of a config for devices and report its cost.

    Args:
      config: of a run; files that it names need not exist.
      devices: described or real.
      trained: config of its teacher, if it has one.
      fast: compile with optimisation level O1.
      hlo_file: file for the compiled program's text; "": none.

    Raises:
      UserError: the config contradicts itself or does not fit the number of devices.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    program = build.make_program(config, mesh, trained)
    report = step_report.make_report(program, fast)
    before = jax.config.values["jax_optimization_level"]
    try:
        if fast:
            jax.config.update("jax_optimization_level", "O1")
        options = topologies.compiler_options(devices[0])
        compiled, seconds = compilation.compile_step(program.lower(), options)
    except jax.errors.JaxRuntimeError as error:
        if not compilation.is_out_of_memory(error):
            raise
        return dataclasses.replace(report, failure=compilation.first_line(error))
    finally:
        jax.config.update("jax_optimization_level", before)
    text = compiled.as_text()
    assert text is not None
    if hlo_file:
        pathlib.Path(hlo_file).write_text(text)
    memory, work = compilation.memory_of(compiled), hlo.count_work(text)
    return step_report.complete_report(report, program, memory, work, seconds)


def find_largest_batch(
    config: ConfigDict, devices: Sequence[jax.Device], **options: Any
) -> StepReport:
    """Find the largest number of clips per device and microbatch that fits.

    Batches of further streams keep their proportion to the main one's.

    Args:
      config, devices: see `check_step`.
      **options: further arguments of `check_step`.

    Returns:
      The report of the largest batch that fits, or of the smallest if none fits.

    Raises:
      UserError: see `check_step`; or the memory of the devices is unknown.
    """
    if topologies.memory_limit(devices[0]) is None:
        raise UserError(
            f"the memory of a device of kind {devices[0].device_kind} is unknown, "
            "so any batch would fit: leave out --search"
        )
    sizes = build.batch_sizes(config)
    # The smallest batches have the proportions of the config.
    shared = math.gcd(*sizes.values())
    parts = len(devices) * config.accumulate_steps

    def attempt(number: int) -> StepReport:
        at = config.copy_and_resolve_references()
        with at.unlocked():
            at.batch_size = sizes[defaults.MAIN_STREAM] // shared * parts * number
            for name, fields in at.streams.items():
                fields.batch_size = sizes[name] // shared * parts * number
        report = check_step(at, devices, **options)
        verdict = "fits" if report.fits else "does not fit"
        message = f"{report.clips_per_device:g} clips per device: {verdict}"
        print(message, file=sys.stderr, flush=True)
        return report

    best, too_many = attempt(1), None
    if not best.fits:
        return best
    number = 1
    while too_many is None or too_many - number > 1:
        following = 2 * number if too_many is None else (number + too_many) // 2
        report = attempt(following)
        if report.fits:
            best, number = report, following
        else:
            too_many = following
    return best


def with_file_names(config: ConfigDict) -> ConfigDict:
    """Return the config with names for the files that a run needs."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for fields in (config.data, *config.streams.values()):
            fields.path = fields.path or "videos"
        for key in ("init", "teacher"):
            if config[key].is_required:
                config[key].path = config[key].path or "run"
    return config


def main() -> None:
    """Run the command line."""
    if _LIST.value:
        print(topologies.list_topologies())
        return
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UserError("give --config and --topology, or --list to see topologies")
    if _SEARCH.value and _HLO.value:
        raise UserError("--search compiles many programs: leave out --hlo")
    if _TOPOLOGY.value != topologies.LOCAL:
        topologies.hide_accelerators()
    config = with_file_names(_CONFIG.value)
    rules.validate(config)
    trained = _TEACHER.value
    if config.teacher.path and trained is None:
        raise UserError(
            "this config has a teacher: give its config, too, "
            "--teacher=configs/vjepa2_1.py:vitG16"
        )
    devices = topologies.make_devices(_TOPOLOGY.value, _NUM_SLICES.value)
    if _SEARCH.value:
        report = find_largest_batch(config, devices, trained=trained, fast=_FAST.value)
    else:
        report = check_step(config, devices, trained, _FAST.value, _HLO.value)
    print(report)
    if not report.fits:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        print(compilation.suggest_less_memory(config, mesh))
    if _JSON.value:
        machine = {"topology": _TOPOLOGY.value, "slices": _NUM_SLICES.value}
        values = machine | report.to_dict()
        pathlib.Path(_JSON.value).write_text(json.dumps(values, indent=2))
    if not report.fits:
        sys.exit(EXIT_DOES_NOT_FIT)


if __name__ == "__main__":
    _CONFIG = define_config_flag(required=False)
    _TEACHER = define_config_flag("teacher", required=False)
    _TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:4x4, v5p-32, h100-8, local")
    _NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Number of such slices", 1)
    _FAST = flags.DEFINE_boolean("fast", False, "Compile at O1: faster, less exact")
    _SEARCH = flags.DEFINE_boolean("search", False, "Find the largest batch that fits")
    _LIST = flags.DEFINE_boolean("list", False, "List the known topologies")
    _JSON = flags.DEFINE_string("json", "", "File to write the report to")
    _HLO = flags.DEFINE_string("hlo", "", "File to write the compiled program to")
    cli.run(main)
