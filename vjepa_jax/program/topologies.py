"""Describe TPU slices and GPU nodes to the compiler without having them.

libtpu or jax's CUDA plug-in knows the devices by name and compiles for them. Neither
network nor device is used.
"""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from vjepa_jax.base.errors import UserError
from vjepa_jax.program import compilation

LOCAL = "local"


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator.

    Attributes:
      device_kind: name of one of its devices in jax.
      memory_gib: memory of one device that a program may use. On TPUs it is the
        compiler's own limit; on GPUs nine tenths, since driver and NCCL need the rest
        (`XLA_PYTHON_CLIENT_MEM_FRACTION=0.9` gives jax that much).
      slices: {name of a common machine: chips along each axis, or nodes x GPUs}.
      options: further options of libtpu.
    """

    device_kind: str
    memory_gib: float
    slices: dict[str, str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def _named(prefix: str, numbers: str, layouts: str) -> dict[str, str]:
    names = (f"{prefix}-{number}" for number in numbers.split())
    return dict(zip(names, layouts.split(), strict=True))


# Clouds count TensorCores of v4 and v5p, two a chip, but chips of v5e and v6e.
_PLANES = "4 8 16 32 64 128 256", "2x2 2x4 4x4 4x8 8x8 8x16 16x16"
_TORI = (
    "8 16 32 64 128 256 512 1024",
    "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8",
)
_NODES = "8 16 32 64", "1x8 2x8 4x8 8x8"
CHIPS = {
    # Without megacore a v4 chip would be two devices.
    "v4": Chip("TPU v4", 30.75, _named("v4", *_TORI), {"chip_config_name": "megacore"}),
    "v5e": Chip("TPU v5 lite", 15.75, _named("v5e", *_PLANES)),
    "v5p": Chip("TPU v5", 95.74, _named("v5p", *_TORI)),
    "v6e": Chip("TPU v6 lite", 31.25, _named("v6e", *_PLANES)),
    "tpu7x": Chip("TPU7x", 94.75, {}),
    "h100": Chip("NVIDIA H100 80GB HBM3", 71.0, _named("h100", *_NODES)),
    "h200": Chip("NVIDIA H200", 126.0, _named("h200", *_NODES)),
}

# What the CUDA compiler reads from a real device, here from the vendor's data sheets.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
"""
_GPU_MEMORY = {  # bytes per second, bytes
    "h100": (3_352_320_000_000, 85_028_896_768),
    "h200": (4_916_000_000_000, 150_754_820_096),
}


def hide_accelerators() -> None:
    """Keep this process from using accelerators; call it before jax starts."""
    jax.config.update("jax_platforms", "cpu")
    # libtpu would query a cloud's metadata server, and allows only one process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Only to avoid warnings; any topology may still be described.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def parse_topology(name: str) -> tuple[str, str]:
    """Return the chip and the layout of `v5e:4x4`, or of a machine's name (`v5e-16`).

    Raises:
      UserError: there is no such chip or machine.
    """
    for chip, known in CHIPS.items():
        if name in known.slices:
            return chip, known.slices[name]
        if re.fullmatch(rf"{chip}:\d+(x\d+)*", name):
            return chip, name.partition(":")[2]
    raise UserError(
        f"--topology={name} is unknown: give a name that --list shows, CHIP:LAYOUT "
        f"(v5e:4x4, h100:1x8) of {', '.join(CHIPS)}, or {LOCAL} for the devices here"
    )


def make_devices(name: str, num_slices: int = 1) -> Sequence[jax.Device]:
    """Make the devices of a machine that need not exist.

    Args:
      name: see `parse_topology`; `local`: the real devices of this machine.
      num_slices: number of such TPU slices, or groups of GPU nodes, that work together;
        1 for `local`.

    Raises:
      UserError: the name is unknown, or the compiler for it is not installed.
    """
    if name == LOCAL:
        if num_slices > 1:
            raise UserError(
                f"--topology={LOCAL} means the devices here: leave out --num_slices"
            )
        return jax.devices()
    chip, layout = parse_topology(name)
    try:
        if chip in _GPU_MEMORY:
            bandwidth, memory = _GPU_MEMORY[chip]
            kind = CHIPS[chip].device_kind
            spec = _GPU.format(bandwidth=bandwidth, memory=memory, kind=kind)
            return topologies.get_topology_desc(
                platform="cuda",
                topology_name=name,
                target_config=spec,
                topology=f"{num_slices}x{layout}",
            ).devices
        options = dict(CHIPS[chip].options)
        if layout == "1x1":
            options["chips_per_host_bounds"] = (1, 1, 1)
        if num_slices > 1:
            options["num_slices"] = num_slices
        return topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip}:{layout}", **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={name} cannot be described: {reason}") from None
    except (RuntimeError, ImportError) as error:
        missing = (
            "jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12"
            if chip in _GPU_MEMORY
            else 'libtpu: pip install -e ".[tpu]"'
        )
        reason = " ".join(str(error).split())
        raise UserError(f"--topology={name} needs {missing} ({reason})") from None


def compiler_options(device: jax.Device) -> dict[str, str | bool] | None:
    """Return the compiler's options for a described device; None: the defaults."""
    if device.platform == "gpu" and jax.default_backend() != "gpu":
        # Without a device to tune them on, Triton's kernels fail for some shapes.
        return {
            "xla_gpu_autotune_level": "0",
            "xla_gpu_enable_triton_gemm": False,
        }
    return None


def memory_limit(device: jax.Device) -> int | None:
    """Return the bytes of a device, described or real, that programs may use.

    None: unknown.
    """
    for chip in CHIPS.values():
        if device.device_kind == chip.device_kind:
            return int(chip.memory_gib * 2**30)
    return compilation.memory_limit(device)  # a real device


def list_topologies() -> str:
    """Return a table of the machines that can be named."""
    lines = ["name        topology       devices  GiB each  device kind"]
    for chip, known in CHIPS.items():
        for name, layout in known.slices.items():
            count = math.prod(map(int, layout.split("x")))
            lines.append(
                f"{name:11} {f'{chip}:{layout}':14} {count:7}  {known.memory_gib:8.2f}"
                f"  {known.device_kind}"
            )
    lines.append(
        f"tpu7x: two devices per chip, e.g. tpu7x:2x2x2; {LOCAL}: the devices here"
    )
    return "\n".join(lines)
