"""Compile the step of a config for devices that are not here, and say whether it fits.

    python -m vjepa_jax.compile_check --config=configs/vjepa2.py:vitl16 \
        --topology=v5e:4x4 [--num_slices=2] [--config.key=value]

It is the very `train_step` of the run, sharded as there, compiled by the TPU compiler
(libtpu: `pip install -e ".[tpu]"`) or by jax's CUDA plug-in on any machine. Printed are
memory, FLOPs, collectives and the compile time of one device; exit code 1 means that it
does not fit. `--list` names the topologies, `--fast` compiles with less effort (for
sweeps: near the limit it is too hopeful), `--search` looks for the largest batch.
"""

import dataclasses
import json
import math
import sys
from typing import Any

import jax
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import defaults, rules
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build, compilation, hlo, step_report, topologies
from vjepa_jax.run import cli

EXIT_DOES_NOT_FIT = 1


def check(
    config: ConfigDict,
    devices: Any,
    trained: ConfigDict | None = None,
    fast: bool = False,
    hlo_file: str = "",
) -> step_report.Report:
    """Compile the step of a config for devices and look at it.

    Args:
      config: of a run; files that it names need not exist.
      devices: described or real ones.
      trained: config of its teacher, if it has one.
      fast: compile with optimisation level O1.
      hlo_file: where to write the compiled program's text; "": nowhere.

    Raises:
      UserError: the config contradicts itself or does not fit the number of devices.
    """
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    program = build.make_program(config, mesh, trained)
    report = step_report.describe(program, fast)
    before = jax.config.jax_optimization_level
    try:
        if fast:
            jax.config.update("jax_optimization_level", "O1")
        options = topologies.compiler_options(devices[0])
        compiled, seconds = compilation.compile_step(program.lower(), options)
    except jax.errors.JaxRuntimeError as error:
        if not compilation.is_out_of_memory(error):
            raise
        return dataclasses.replace(report, failure=compilation.shorten(error))
    finally:
        jax.config.update("jax_optimization_level", before)
    text = compiled.as_text()
    if hlo_file:
        with open(hlo_file, "w") as file:
            file.write(text)
    return step_report.complete(
        report, program, compilation.memory_of(compiled), hlo.account(text), seconds
    )


def largest_batch(config: ConfigDict, devices: Any, **options: Any):
    """Look for the most clips per device and microbatch that fit, other keys as given.

    Batches of further streams keep their proportion to the main one's.

    Returns:
      The report of the largest that fits, or of the smallest where none does.

    Raises:
      UserError: see `check`; or nobody knows what the devices hold.
    """
    if topologies.memory_limit(devices[0]) is None:
        raise UserError(
            f"the memory of a device of kind {devices[0].device_kind} is unknown, so "
            "that any batch would fit: leave out --search"
        )
    sizes = build.batch_sizes(config)
    # The smallest batch of every stream whose proportions are those of the config.
    shared = math.gcd(*sizes.values())
    parts = len(devices) * config.accumulate_steps

    def attempt(number):
        at = config.copy_and_resolve_references()
        with at.unlocked():
            at.batch_size = sizes[defaults.MAIN_STREAM] // shared * parts * number
            for name, fields in at.streams.items():
                fields.batch_size = sizes[name] // shared * parts * number
        report = check(at, devices, **options)
        verdict = "fits" if report.fits else "does not fit"
        _say(f"{report.clips_per_device:g} clips per device: {verdict}")
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


def without_files(config: ConfigDict) -> ConfigDict:
    """Return the config with names for the files that a run would need."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for fields in (config.data, *config.streams.values()):
            fields.path = fields.path or "videos"
        for key in ("init", "teacher"):
            if config[key].is_required:
                config[key].path = config[key].path or "run"
    return config


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Run the command line."""
    if _LIST.value:
        print(topologies.table())
        return
    if _CONFIG.value is None or not _TOPOLOGY.value:
        raise UserError("give --config and --topology, or --list to see topologies")
    if _SEARCH.value and _HLO.value:
        raise UserError("--search compiles many programs: leave out --hlo")
    if _TOPOLOGY.value != topologies.LOCAL:
        topologies.prepare()
    config = without_files(_CONFIG.value)
    rules.validate(config)
    trained = _TEACHER.value
    if config.teacher.path and trained is None:
        raise UserError(
            "this config learns from a teacher: give its config as well, "
            "--teacher=configs/vjepa2_1.py:vitG16"
        )
    devices = topologies.devices(_TOPOLOGY.value, _NUM_SLICES.value)
    options = {"trained": trained, "fast": _FAST.value}
    if _SEARCH.value:
        report = largest_batch(config, devices, **options)
    else:
        report = check(config, devices, hlo_file=_HLO.value, **options)
    print(report)
    if not report.fits:
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        print(compilation.suggest(config, mesh))
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(
                {"topology": _TOPOLOGY.value, "slices": _NUM_SLICES.value}
                | report.to_dict(),
                file,
                indent=2,
            )
    if not report.fits:
        sys.exit(EXIT_DOES_NOT_FIT)


if __name__ == "__main__":
    _CONFIG = define_config_flag(required=False)
    _TEACHER = define_config_flag("teacher", required=False)
    _TOPOLOGY = flags.DEFINE_string("topology", "", "v5e:4x4, v5p-32, h100-8, local")
    _NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Such slices together", 1)
    _FAST = flags.DEFINE_boolean("fast", False, "Compile at O1: a hint, no verdict")
    _SEARCH = flags.DEFINE_boolean("search", False, "Find the largest batch that fits")
    _LIST = flags.DEFINE_boolean("list", False, "List the known topologies")
    _JSON = flags.DEFINE_string("json", "", "File to write the report to")
    _HLO = flags.DEFINE_string("hlo", "", "File to write the compiled program to")
    cli.run(main)
