"""Report the cost of a step on one device: memory, FLOPs, collectives."""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from vjepa_jax.program import compilation, flops, hlo, topologies
from vjepa_jax.program.build import Program

GIB = compilation.GIB
# Bytes. Smaller arrays that are not parameters are statistics, counts and norms.
_SMALL = 2**20
# Largest factor by which scattered arrays are padded to full tiles on every device.
_PADDED = 1.2
Dims = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one purpose, kind and dtype, of one device in one step."""

    purpose: str
    kind: str
    dtype: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class StepReport:
    """The cost of a config's step on a mesh; bytes, FLOPs and seconds are per device.

    Attributes:
      devices, device_kind, mesh: compiled for these.
      batch_sizes: {stream: clips per update, over all devices}.
      clips_per_device: of the main stream, in one microbatch.
      accumulate_steps, remat, attention: as in the config.
      level: effort of the compiler, `default` or `O1`.
      limit_bytes: available to a program; None: unknown.
      batch_bytes: the next batch, which waits on the device while the step runs.
      model_flops: the analytic count.
      ideal_secs: `model_flops` at the peak of the device; None: the peak is unknown.
      failure: the compiler's error if the program does not fit; "": it compiled.
      compile_secs: of the compiler alone.
      memory: see `compilation.Memory`.
      executed_flops: with recomputation and the padding of kernels.
      kernel_flops, remat_flops: see `hlo.DeviceWork`.
      unknown: loops and kernels that could not be counted.
      traffic: collectives; the purpose `activations` should not occur.
      largest_activations: the largest of that purpose, as text.
    """

    devices: int
    device_kind: str
    mesh: Mapping[str, int]
    batch_sizes: Mapping[str, int]
    clips_per_device: float
    accumulate_steps: int
    remat: str
    attention: str
    level: str
    limit_bytes: int | None
    batch_bytes: int
    model_flops: float
    ideal_secs: float | None
    failure: str = ""
    compile_secs: float = 0.0
    memory: compilation.Memory | None = None
    executed_flops: float = 0.0
    kernel_flops: float = 0.0
    remat_flops: float = 0.0
    unknown: tuple[str, ...] = ()
    traffic: tuple[Traffic, ...] = ()
    largest_activations: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the step and the next batch fit; True where nothing is known."""
        if self.failure:
            return False
        if self.memory is None or self.limit_bytes is None:
            return True
        return self.memory.peak + self.batch_bytes <= self.limit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `fits` as JSON-like values."""
        return {"fits": self.fits, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        sizes = " + ".join(f"{n} {name}" for name, n in self.batch_sizes.items())
        yield (
            f"{self.devices} x {self.device_kind}, mesh {dict(self.mesh)}; "
            f"batch {sizes}, {self.clips_per_device:g} per device in each of "
            f"{self.accumulate_steps} microbatches; remat {self.remat}, attention "
            f"{self.attention}"
        )
        ideal = f"{1e3 * self.ideal_secs:.0f} ms" if self.ideal_secs else "unknown"
        yield (
            f"model       {self.model_flops / 1e12:.2f} TFLOP per step and device, "
            f"{ideal} at the device's peak"
        )
        if self.failure:
            yield f"does not fit: {self.failure}"
            return
        yield f"compiled    in {self.compile_secs:.0f} s, level {self.level}"
        verdict = "its limit is unknown"
        if self.limit_bytes:
            verdict = "fits into " if self.fits else "does not fit into "
            verdict += f"{self.limit_bytes / GIB:.2f} GiB"
        yield (
            f"memory      {self.memory}, and {self.batch_bytes / GIB:.2f} GiB for the "
            f"next batch: {verdict}"
        )
        yield (
            f"executed    {self.executed_flops / 1e12:.2f} TFLOP, "
            f"{self.executed_flops / self.model_flops:.3f} of the model's; "
            f"{self.kernel_flops / 1e12:.2f} in attention kernels, "
            f"{self.remat_flops / max(self.executed_flops, 1):.1%} repeated"
        )
        for part in self.traffic:
            yield (
                f"{part.purpose:11} {part.kind} {part.dtype} x{part.count}: "
                f"{part.bytes / 1e9:.3f} GB"
            )
        for line in self.largest_activations:
            yield f"moves activations: {line}"
        if self.unknown:
            yield f"not counted: {', '.join(self.unknown)}"


def make_report(program: Program, fast: bool) -> StepReport:
    """Make the report of a program that is not compiled yet.

    Args:
      program: of the config.
      fast: whether it will be compiled with optimisation level O1.
    """
    config, mesh = program.config, program.mesh
    device = mesh.devices.flat[0]
    model_flops = program.step_flops / mesh.size
    peak = flops.peak_flops(device.device_kind)
    steps, sizes = config.accumulate_steps, program.batch_sizes
    batch = jax.tree.leaves(program.batch)
    return StepReport(
        devices=mesh.size,
        device_kind=device.device_kind,
        mesh=dict(mesh.shape),
        batch_sizes=sizes,
        clips_per_device=config.batch_size / mesh.size / steps,
        accumulate_steps=steps,
        remat=config.model.remat,
        attention=config.model.attention,
        level="O1" if fast else "default",
        limit_bytes=topologies.memory_limit(device),
        batch_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in batch)
        // mesh.size,
        model_flops=model_flops,
        ideal_secs=model_flops / peak if peak else None,
    )


def complete_report(
    report: StepReport,
    program: Program,
    memory: compilation.Memory | None,
    work: hlo.DeviceWork,
    seconds: float,
) -> StepReport:
    """Add the compiled program's memory, work and compile time to its report."""
    forms, parts = _parameter_forms(program), program.mesh.shape["fsdp"]
    traffic: collections.Counter[tuple[str, str, str]] = collections.Counter()
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    moved = []
    for collective in work.collectives:
        purpose = _purpose(collective, forms, parts)
        if purpose == "activations":
            moved.append(collective)
        dtypes = "+".join(sorted({shape.dtype for shape in collective.shapes}))
        key = purpose, collective.kind, dtypes
        traffic[key] += collective.bytes
        counts[key] += collective.count
    moved.sort(key=lambda collective: -collective.bytes)
    unknown = [f"loop {name}" for name in work.unknown_loops]
    unknown += [f"{n} x {name}" for name, n in work.unknown_kernels.items()]
    return dataclasses.replace(
        report,
        compile_secs=seconds,
        memory=memory,
        executed_flops=work.flops,
        kernel_flops=work.kernel_flops,
        remat_flops=work.remat_flops,
        unknown=tuple(unknown),
        traffic=tuple(
            Traffic(*key, counts[key], traffic[key]) for key in sorted(traffic)
        ),
        largest_activations=tuple(str(collective) for collective in moved[:5]),
    )


def _parameter_forms(program: Program) -> set[Dims]:
    """Return the forms in which parameters and gradients are exchanged.

    A form is the sorted dimensions above one. The array is a stack or one of its
    layers, full or divided over `fsdp` (a layer also by a divisor, between two rounds
    of a gather), with the output channels of attention split into heads or not.
    """
    state, parts = program.state, program.mesh.shape["fsdp"]
    divisors = [n for n in range(2, parts + 1) if parts % n == 0]
    heads = {
        (module.num_heads, module.width // module.num_heads)
        for module in program.objective.modules
    }
    leaves = [x.shape for x in jax.tree.leaves((state.params, program.frozen))]
    forms = set()
    for shape in leaves:
        for dims, by in ((shape, [parts]), (shape[1:], divisors)):
            variants = {dims}
            for i, size in enumerate(dims):
                for n, channels in heads:
                    by_head = {(n, channels), (3, n, channels), (3, n * channels)}
                    variants |= {
                        (*dims[:i], *split, *dims[i + 1 :])
                        for split in by_head
                        if math.prod(split) == size
                    }
            for variant in tuple(variants):
                for i, size in enumerate(variant):
                    variants |= {
                        (*variant[:i], size // n, *variant[i + 1 :])
                        for n in by
                        if size % n == 0
                    }
            forms |= {_form(variant) for variant in variants}
    return forms


def _form(dims: Dims) -> Dims:
    return tuple(sorted(size for size in dims if size > 1))


def _is_form(dims: Dims, forms: set[Dims], padded: bool) -> bool:
    """Whether dimensions are a form or, if `padded`, one that is padded on one axis."""
    wanted = _form(dims)
    if wanted in forms or not padded:
        return wanted in forms
    return any(
        len(form) == len(wanted)
        and all(a <= b <= _PADDED * a for a, b in zip(form, wanted, strict=True))
        and sum(a != b for a, b in zip(form, wanted, strict=True)) == 1
        for form in forms
    )


def _is_shift(shape: hlo.Shape, forms: set[Dims], parts: int) -> bool:
    """Whether rows of a gradient move to the next device.

    A scatter over `parts` devices with k rows of padding on each shifts the rows of
    device i by i * k, at most by (parts - 1) * k on the last device.
    """
    wanted = _form(shape.dims)
    if shape.dtype != "f32" or parts == 1:
        return False
    for i, moved in enumerate(wanted):
        padding, rest = divmod(moved, parts - 1)
        if not rest and any(
            parts * padding <= (_PADDED - 1) * whole
            and _form((*wanted[:i], *wanted[i + 1 :], whole)) == form
            for form in forms
            for whole in form
        ):
            return True
    return False


def _purpose(collective: hlo.Collective, forms: set[Dims], parts: int) -> str:
    """Classify: `parameters`, `gradients`, `activations` or `small`."""
    large = [shape for shape in collective.shapes if shape.bytes > _SMALL]
    arrays = large or collective.shapes
    is_permute = collective.kind == "collective-permute"
    if is_permute and all(_is_shift(shape, forms, parts) for shape in arrays):
        return "gradients"
    is_scatter = collective.kind == "reduce-scatter"
    if not all(_is_form(shape.dims, forms, is_scatter) for shape in arrays):
        return "activations" if large else "small"
    # Between slices the mesh has only `data`: they exchange gradients.
    if collective.kind in ("all-reduce", "reduce-scatter", "send", "recv"):
        return "gradients"
    return "parameters"
