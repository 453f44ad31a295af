"""What a compiled program does, counted from its text: matmuls, kernels, collectives.

The compiler's own cost analysis counts the body of a loop once and knows nothing of
Pallas kernels. Here every computation counts as often as it runs: the text is that of
`compiled.as_text()`, partitioned (so numbers are one device's) and scheduled.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from vjepa_jax.program.hlo_text import Computation, Instruction, Shape, parse

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "send",
    "recv",
)
_COPIES = ("copy", "copy-start", "copy-done", "bitcast", "opt-barrier")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices exchange at one place of the program.

    Attributes:
      kind: opcode; a TPU's fused all-reduce and slice is a `reduce-scatter`.
      shapes: of the whole arrays, before they are scattered or after being gathered.
      count: how often it runs in one step.
      op_name: see `Instruction`.
    """

    kind: str
    shapes: tuple[Shape, ...]
    count: int
    op_name: str

    @property
    def bytes(self) -> int:
        """Of all runs together."""
        return self.count * sum(shape.bytes for shape in self.shapes)

    def __str__(self) -> str:
        arrays = ", ".join(f"{s.dtype}{list(s.dims)}" for s in self.shapes[:4])
        return (
            f"{self.kind} x{self.count}, {self.bytes / 1e6:.1f} MB: {arrays} "
            f"({self.op_name})"
        )


@dataclasses.dataclass(frozen=True)
class Account:
    """What one device does in one run of the program.

    Attributes:
      matmul_flops: of dots and convolutions, two per multiply-add.
      kernel_flops: of attention kernels, padding included.
      remat_flops: those of both that repeat what was computed before.
      collectives: every exchange once, in however many pieces it is written.
      unknown_loops: loops whose trip count was not found, counted once.
      unknown_kernels: how often kernels run that are not attention's.
    """

    matmul_flops: float
    kernel_flops: float
    remat_flops: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    unknown_kernels: Mapping[str, int]

    @property
    def flops(self) -> float:
        """Executed FLOPs."""
        return self.matmul_flops + self.kernel_flops


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = instruction.rest.split(")")[0]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _through_copies(name: str, computation: Computation) -> Instruction | None:
    made = computation.get(name)
    while made and made.opcode in _COPIES:
        made = computation.get(made.operands[0])
    return made


def _result(computation: Computation) -> Instruction | None:
    """Return the tuple that the body of a loop gives, if it is written as one."""
    return next(
        (i for i in reversed(computation.values()) if i.opcode == "tuple"), None
    )


def _initial(loop: Instruction, index: int, owner: str, computations, loops):
    """Return the constant that place `index` of a loop's state starts from, if any.

    The loop stands in the computation `owner`. If that is the body of another loop, of
    {body: (loop, its owner)}, the constant may be carried through it.
    """
    inside = computations[owner]
    state = _through_copies(loop.operands[0], inside)
    if state is None or state.opcode != "tuple":
        return None
    made = _through_copies(state.operands[index], inside)
    if made is None or made.opcode != "get-tuple-element" or owner not in loops:
        return _constant(made)
    outer_index = int(made.attribute(r"index=(\d+)"))
    result = _result(inside)
    if result is None or outer_index >= len(result.operands):
        return None
    carried = _through_copies(result.operands[outer_index], inside)
    is_argument = inside[made.operands[0]].opcode == "parameter"
    if carried is not made or not is_argument:  # another in every turn
        return None
    return _initial(loops[owner][0], outer_index, loops[owner][1], computations, loops)


def _trip_count(loop: Instruction, owner: str, computations, loops) -> int | None:
    """The compiler's note, else from the counter's start, bound and step.

    The TPU compiler draws a layer out of some loops, which then start from one.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"?(\d+)')
    if known:
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = computations[loop.attribute(r"body=%?([\w.\-]+)")]
    bound = index = None
    for compare in condition.values():
        if compare.opcode != "compare":
            continue
        for name in compare.operands:
            operand = condition.get(name)
            value = _constant(operand)
            if value is not None:
                bound = value + ("direction=LE" in compare.rest)
            elif operand and operand.opcode == "get-tuple-element":
                index = int(operand.attribute(r"index=(\d+)"))
    if bound is None or index is None:
        return None
    start = _initial(loop, index, owner, computations, loops)
    if start is None:
        return None
    step = 1
    result = _result(body)
    if result is not None and index < len(result.operands):
        counter = _through_copies(result.operands[index], body)
        if counter and counter.opcode == "add":
            values = [_constant(body.get(name)) for name in counter.operands]
            step = next((v for v in values if v), 1)
    return max(0, -((start - bound) // step))


def _executions(computations, entry):
    """Return ({computation: how often it runs}, {computation: host}, unknown loops).

    The host is the entry, or the body of a loop or branch, that a fusion is part of.
    """
    counts: collections.Counter[str] = collections.Counter()
    hosts: dict[str, str] = {}
    loops: dict[str, tuple[Instruction, str]] = {}  # by their bodies, with their owners
    unknown = []

    def visit(name, times, host):
        counts[name] += times
        hosts[name] = host
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                trips = _trip_count(instruction, name, computations, loops)
                if trips is None:
                    unknown.append(instruction.name)
                body = instruction.attribute(r"body=%?([\w.\-]+)")
                loops[body] = instruction, name
                visit(body, times * (1 if trips is None else trips), body)
            elif instruction.opcode in ("fusion", "call", "custom-call", "async-start"):
                for called in _CALLED.findall(instruction.rest):
                    if called in computations:
                        visit(called, times, host)
            elif instruction.opcode == "conditional":
                branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
                for branch in re.findall(r"[\w.\-]+", branches or ""):
                    visit(branch, times, branch)

    visit(entry, 1, entry)
    return counts, hosts, tuple(unknown)


def _window(text: str, key: str, default: str, count: int) -> list[str]:
    found = re.search(rf"\b{key}=(\S+)", text)
    return found.group(1).split("x") if found else [default] * count


def _taps(out: int, size: int, stride: int, low: int, dilate: int, by: int, has: int):
    """Count pairs of output and window places that meet an input element."""
    places = np.arange(out)[:, None] * stride + np.arange(size)[None] * by - low
    is_real = (places >= 0) & (places % dilate == 0) & (places // dilate < has)
    return int(is_real.sum())


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """TPUs write every matmul as a convolution, batched ones as dilated windows."""
    out = instruction.shapes[0].dims
    labels = instruction.attribute(r"dim_labels=([\w>\-]+)")
    lhs, rest = labels.split("_", 1)
    rhs, result = rest.split("->")
    spatial = [c for c in rhs if c.isdigit()]
    flops = 2.0 * math.prod(out) * right.dims[rhs.index("i")]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    sizes = [int(n) for n in _window(window, "size", "1", len(spatial))]
    strides = [int(n) for n in _window(window, "stride", "1", len(spatial))]
    low = [int(n.split("_")[0]) for n in _window(window, "pad", "0_0", len(spatial))]
    dilates = [int(n) for n in _window(window, "lhs_dilate", "1", len(spatial))]
    by = [int(n) for n in _window(window, "rhs_dilate", "1", len(spatial))]
    for axis, digit in enumerate(sorted(spatial)):
        size = out[result.index(digit)]
        taps = _taps(
            size,
            sizes[axis],
            strides[axis],
            low[axis],
            dilates[axis],
            by[axis],
            left.dims[lhs.index(digit)],
        )
        flops *= taps / size
    return flops


def _dot_flops(instruction: Instruction, left: Shape) -> float:
    axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    contracted = math.prod(left.dims[int(i)] for i in axes.split(",") if i)
    return 2.0 * math.prod(instruction.shapes[0].dims) * contracted


def _cublas_flops(instruction: Instruction, left: Shape) -> float:
    axes = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ""
    contracted = math.prod(left.dims[int(i)] for i in re.findall(r"\d+", axes))
    # The second result is scratch space.
    return 2.0 * math.prod(instruction.shapes[0].dims) * contracted


def _attention_flops(instruction: Instruction, operands: list[Shape]) -> float | None:
    """Two matmuls forward, five backward, of queries against all keys.

    The operands that count are the first three of floats: q, k, v, of which the last
    two axes are places and channels.
    """
    named = f"{instruction.name} {instruction.op_name} {instruction.rest[-4000:]}"
    is_attention = re.search(r"splash|flash_attention|mha|attention", named)
    arrays = [s for s in operands if s.dtype in ("bf16", "f16", "f32")]
    arrays = [s for s in arrays if len(s.dims) >= 3]
    if not is_attention or len(arrays) < 2:
        return None
    q, k = arrays[:2]
    unit = 2.0 * math.prod(q.dims) * k.dims[-2]
    if "dkv" in instruction.name:
        return unit * 5
    return unit * (3 if "dq" in instruction.name else 2)


def _is_repeated(instruction: Instruction) -> bool:
    """By `jax.checkpoint`, or by the compiler when memory is short."""
    by_jax = "rematted_computation" in instruction.op_name
    return by_jax or ".remat" in instruction.name


def _matmuls(computation: Computation) -> Iterator[tuple[Instruction, float, bool]]:
    """Yield (instruction, FLOPs, is a kernel) of what multiplies."""
    for instruction in computation.values():
        operands = [
            computation[name].shapes[0]
            for name in instruction.operands
            if name in computation and computation[name].shapes
        ]
        if instruction.opcode == "dot":
            yield instruction, _dot_flops(instruction, operands[0]), False
        elif instruction.opcode == "convolution":
            yield instruction, _convolution_flops(instruction, *operands[:2]), False
        elif instruction.opcode == "custom-call":
            target = instruction.attribute(r'custom_call_target="([^"]+)"') or ""
            if target.startswith("__cublas$"):
                yield instruction, _cublas_flops(instruction, operands[0]), False
            elif target == "tpu_custom_call" or "fmha" in target:
                flops = _attention_flops(instruction, operands)
                yield instruction, math.nan if flops is None else flops, True


def _source(name: str, computation: Computation) -> Instruction:
    """Return what a value is, seen through changes of shape."""
    made = computation[name]
    while made.opcode == "bitcast" and made.operands[0] in computation:
        made = computation[made.operands[0]]
    return made


def _joined(name: str, computations, owner: str) -> tuple[Shape, ...]:
    """Return the arrays that were laid end to end to be exchanged as one.

    GPUs are given one flat array of several, which a fusion or an instruction of its
    own joins. An array that was not made so is itself; a name that is no instruction
    of `owner` gives ().
    """
    outer = computations[owner]
    if name not in outer:
        return ()
    made = outer[name]
    inner = computations.get(made.attribute(_CALLED.pattern))
    root = made if inner is None else list(inner.values())[-1]
    if root.opcode != "concatenate" or len(made.shapes[0].dims) != 1:
        return made.shapes
    parts = []
    for operand in root.operands:
        part = _source(operand, outer if inner is None else inner)
        if inner is not None and part.opcode == "parameter":
            part = _source(made.operands[int(part.rest.split(")")[0])], outer)
        parts += part.shapes
    return tuple(parts)


def _collective(
    instruction: Instruction, computations, owner: str, times: int
) -> Collective | None:
    """Return what an instruction of the computation `owner` exchanges, if it does."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start"):
        # Operands, results and contexts; of an all-reduce the results alone.
        count = len(instruction.operands)
        shapes = shapes[count : 2 * count] or shapes
    if kind in ("send", "recv"):  # the array, a context and a token
        shapes = shapes[:1]
    inputs = [_joined(name, computations, owner) for name in instruction.operands]
    inputs = tuple(s for of_operand in inputs for s in of_operand)
    if kind in ("all-reduce", "reduce-scatter") and inputs:
        shapes = inputs
    if kind == "all-reduce" and owner.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, shapes, times, instruction.op_name)


def account(text: str) -> Account:
    """Count what a program does.

    Args:
      text: of `compiled.as_text()`.
    """
    computations, entry = parse(text)
    counts, hosts, unknown_loops = _executions(computations, entry)
    flops = {True: 0.0, False: 0.0}
    remat, unknown_kernels = 0.0, collections.Counter()
    collectives: dict[tuple, Collective] = {}
    for name, times in counts.items():
        for instruction, once, is_kernel in _matmuls(computations[name]):
            if math.isnan(once):
                unknown_kernels[re.sub(r"[.\d]+$", "", instruction.name)] += times
                continue
            flops[is_kernel] += times * once
            remat += times * once * _is_repeated(instruction)
        for instruction in computations[name].values():
            found = _collective(instruction, computations, name, times)
            if found:
                # The pieces of an asynchronous one (start, steps, done) are fusions of
                # one host and share a channel; else a channel says nothing, as several
                # hosts, and collectives of one host, may use the same.
                channel = instruction.attribute(r"channel_id=(\d+)")
                in_pieces = channel and hosts[name] != name
                place = (hosts[name], channel) if in_pieces else (instruction.name,)
                collectives[found.kind, found.shapes, *place] = found
    return Account(
        matmul_flops=flops[False],
        kernel_flops=flops[True],
        remat_flops=remat,
        collectives=tuple(collectives.values()),
        unknown_loops=unknown_loops,
        unknown_kernels=dict(unknown_kernels),
    )
