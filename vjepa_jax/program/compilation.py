"""Compile a lowered step; report its memory, and what to change if that is too much."""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict

GIB = 2**30
# What the backward pass recomputes, from nothing to everything. `dots` is left out: it
# stores the scores of attention and hardly saves memory.
_REMATS = ("none", "dots_no_batch", "attention", "full")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a compiled program on each device, in bytes.

    Attributes:
      peak: the maximum in use at once, arguments included, as the compiler plans it.
      arguments: state and batch.
      temporaries: reserved in addition; on TPUs an upper bound only.
    """

    peak: int
    arguments: int
    temporaries: int

    def __str__(self) -> str:
        return (
            f"{self.peak / GIB:.2f} GiB at its peak on each device "
            f"({self.arguments / GIB:.2f} GiB of it state and batch)"
        )


def memory_of(compiled: jax.stages.Compiled) -> Memory | None:
    """Return the memory of a program; None if its compiler does not report it."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    arguments = stats.argument_size_in_bytes
    temporaries = stats.temp_size_in_bytes
    (device, *_) = jax.tree.leaves(compiled.input_shardings)[0].device_set
    # The peak of CPUs does not contain the temporaries.
    planned = 0 if device.platform == "cpu" else stats.peak_memory_in_bytes
    peak = planned or arguments + temporaries
    return Memory(peak, arguments, temporaries)


def compile_step(
    lowered: jax.stages.Lowered, options: dict[str, str | bool] | None = None
) -> tuple[jax.stages.Compiled, float]:
    """Compile with options of the compiler; return the program and the seconds."""
    began = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    return compiled, time.perf_counter() - began


def memory_limit(device: jax.Device) -> int | None:
    """Return the bytes of a real device that programs may use; None: unknown."""
    stats = device.memory_stats()
    return stats and stats.get("bytes_limit")


def use_cache(folder: str) -> None:
    """Keep compiled programs in a folder for later starts.

    Args:
      folder: local or remote (`gs://`), made if it is missing; "" leaves jax's own
        setting (`JAX_COMPILATION_CACHE_DIR`) as it is.

    Raises:
      UserError: the folder cannot be made.
    """
    if not folder:
        return
    folder = files.absolute(folder)
    if not files.is_remote(folder):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"config.compilation_cache={folder}: {error.strerror}; give a folder "
                'that can be written, or ""'
            ) from None
    jax.config.update("jax_compilation_cache_dir", folder)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of jax means that a device has too little memory."""
    return bool(re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)))


@contextlib.contextmanager
def explain_out_of_memory(config: ConfigDict, mesh: Mesh) -> Iterator[None]:
    """Turn jax's errors about device memory into UserErrors that name the fix.

    Args:
      config, mesh: of the run.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory on the devices ({first_line(error)}): "
            f"{suggest_less_memory(config, mesh)}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error of jax, without its code."""
    line = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
    return line[:200].rstrip(". ")


def suggest_less_memory(config: ConfigDict, mesh: Mesh) -> str:
    """Name the settings that need less memory, the cheapest first."""
    sizes = [config.batch_size]
    sizes += [fields.batch_size for fields in config.streams.values()]
    sizes = [size for size in sizes if size]
    steps = config.accumulate_steps
    finer = [
        n
        for n in range(steps + 1, min(sizes) // mesh.size + 1)
        if all(size % (mesh.size * n) == 0 for size in sizes)
    ]
    ways = []
    if mesh.shape["fsdp"] < mesh.size:
        ways.append("--config.mesh.fsdp=-1 --config.mesh.data=1")
    if config.model.remat in _REMATS[:-1]:
        stronger = _REMATS[_REMATS.index(config.model.remat) + 1]
        ways.append(f"--config.model.remat={stronger}")
    if finer:
        ways.append(f"--config.accumulate_steps={finer[0]}")
    of_streams = "" if len(sizes) == 1 else f" (of {MAIN_STREAM} and the other streams)"
    ways.append(f"a smaller batch_size than {config.batch_size}{of_streams}")
    return "try " + ", or ".join(ways)
