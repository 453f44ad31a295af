"""Count what a compiled program does: matmuls, attention kernels, collectives.

The compiler's own cost analysis counts the body of a loop once and does not see Pallas
kernels. Here every computation counts as often as it runs. The input is the text of
`compiled.as_text()`: partitioned, so that all counts are those of one device, and
scheduled.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BODY = r"body=%?([\w.\-]+)"
_INDEX = r"index=(\d+)"
_DOT_AXES = r"lhs_contracting_dims=\{([\d,]*)\}"
_CUBLAS_AXES = r'"lhs_contracting_dimensions":\[([^\]]*)\]'
_COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "collective-permute"),
    *("all-to-all", "ragged-all-to-all", "collective-broadcast", "send", "recv"),
)
_COPIES = ("copy", "copy-start", "copy-done", "bitcast", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type and dimensions of an array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = re.search(r"\d+", self.dtype)  # none in `pred`
        size = max(int(bits.group()) // 8, 1) if bits else 1
        return size * math.prod(self.dims)


@dataclasses.dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its module.
      opcode: such as `dot`.
      shapes: of the result; a tuple has several.
      rest: operands and attributes, as text.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    rest: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([\w.\-]+)", self.rest.split(")")[0]))

    def attribute(self, pattern: str) -> str:
        """Return the first group of a match in the attributes; "" without a match."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else ""

    @functools.cached_property
    def op_name(self) -> str:
        """Path of the operation in the traced function; "" if unknown."""
        return self.attribute(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices, written once in the program.

    Attributes:
      kind: opcode; a TPU's fused all-reduce and slice is a `reduce-scatter`.
      shapes: of the full arrays, before a scatter or after a gather.
      count: number of runs in one step.
      op_name: see `Instruction`.
    """

    kind: str
    shapes: tuple[Shape, ...]
    count: int
    op_name: str

    @property
    def bytes(self) -> int:
        """Size of the arrays, summed over all runs."""
        return self.count * sum(shape.bytes for shape in self.shapes)

    def __str__(self) -> str:
        arrays = ", ".join(f"{s.dtype}{list(s.dims)}" for s in self.shapes[:4])
        return (
            f"{self.kind} x{self.count}, {self.bytes / 1e6:.1f} MB: {arrays} "
            f"({self.op_name})"
        )


@dataclasses.dataclass(frozen=True)
class DeviceWork:
    """The work of one device in one run of the program.

    Attributes:
      matmul_flops: of dots and convolutions, two per multiply-add.
      kernel_flops: of attention kernels, padding included.
      remat_flops: the part of both that repeats an earlier computation.
      collectives: each exchange once, even if it is compiled to several instructions.
      unknown_loops: loops of unknown trip count, which is taken as one.
      unknown_kernels: {name: runs} of kernels other than attention.
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


Computation = dict[str, Instruction]
Computations = Mapping[str, Computation]
# {body: (the loop, the computation that contains it)}
Loops = Mapping[str, tuple[Instruction, str]]


def _split_type(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        kind, _, rest = text.partition(" ")
        return kind, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :].lstrip()
    return text, ""


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return all computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    last: Instruction | None = None
    entry = ""
    for line in text.splitlines():
        if line and not line[0].isspace() and line.endswith("{") and "->" in line:
            words = line.split()
            name = words[words[0] == "ENTRY"].lstrip("%")
            current, last = computations.setdefault(name, {}), None
            if words[0] == "ENTRY":
                entry = name
        elif line.rstrip() == "}":
            current = None
        elif current is None:
            continue
        elif found := _INSTRUCTION.match(line):
            kind, rest = _split_type(found.group(2))
            opcode, _, rest = rest.partition("(")
            shapes = tuple(
                Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
                for dtype, dims in _SHAPE.findall(kind)
            )
            last = Instruction(found.group(1), opcode.strip(), shapes, rest)
            current[last.name] = last
        elif last is not None:  # a kernel's metadata may contain line breaks
            last.rest += line
    return computations, entry


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
    """Return the tuple that the body of a loop returns, if it is written as one."""
    return next(
        (i for i in reversed(computation.values()) if i.opcode == "tuple"), None
    )


def _initial(
    loop: Instruction, index: int, owner: str, computations: Computations, loops: Loops
) -> int | None:
    """Return the initial value of element `index` of a loop's state, if constant.

    The loop is an instruction of the computation `owner`. If that is the body of
    another loop, the constant may be carried through it.
    """
    inside = computations[owner]
    state = _through_copies(loop.operands[0], inside)
    if state is None or state.opcode != "tuple":
        return None
    made = _through_copies(state.operands[index], inside)
    if made is None or made.opcode != "get-tuple-element" or owner not in loops:
        return _constant(made)
    outer_index = int(made.attribute(_INDEX))
    result = _result(inside)
    if result is None or outer_index >= len(result.operands):
        return None
    carried = _through_copies(result.operands[outer_index], inside)
    is_argument = inside[made.operands[0]].opcode == "parameter"
    if carried is not made or not is_argument:  # it differs between iterations
        return None
    return _initial(loops[owner][0], outer_index, loops[owner][1], computations, loops)


def _trip_count(
    loop: Instruction, owner: str, computations: Computations, loops: Loops
) -> int | None:
    """Return how often a loop runs; None if unknown.

    The compiler may have noted it. Otherwise it follows from the counter's start, bound
    and step: the TPU compiler peels the first layer off some loops, which then start at
    one.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"?(\d+)')
    if known:
        return int(known)
    condition = computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = computations[loop.attribute(_BODY)]
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
                index = int(operand.attribute(_INDEX))
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


def _executions(
    computations: Computations, entry: str
) -> tuple[Mapping[str, int], Mapping[str, str], tuple[str, ...]]:
    """Count how often each computation runs.

    Returns:
      ({computation: count}, {computation: host}, unknown loops). The host is the entry,
      or the body of a loop or branch, that a fusion is part of.
    """
    counts: collections.Counter[str] = collections.Counter()
    hosts: dict[str, str] = {}
    loops: dict[str, tuple[Instruction, str]] = {}
    unknown: list[str] = []

    def visit(name: str, times: int, host: str) -> None:
        counts[name] += times
        hosts[name] = host
        for instruction in computations[name].values():
            if instruction.opcode == "while":
                trips = _trip_count(instruction, name, computations, loops)
                if trips is None:
                    unknown.append(instruction.name)
                body = instruction.attribute(_BODY)
                loops[body] = instruction, name
                visit(body, times * (1 if trips is None else trips), body)
            elif instruction.opcode in ("fusion", "call", "custom-call", "async-start"):
                for called in _CALLED.findall(instruction.rest):
                    if called in computations:
                        visit(called, times, host)
            elif instruction.opcode == "conditional":
                branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
                for branch in re.findall(r"[\w.\-]+", branches):
                    visit(branch, times, branch)

    visit(entry, 1, entry)
    return counts, hosts, tuple(unknown)


def _taps(
    out: int, has: int, size: int, stride: int, low: int, dilate: int, by: int
) -> int:
    """Count the pairs of output and window index that read an input, not padding."""
    indices = np.arange(out)[:, None] * stride + np.arange(size)[None] * by - low
    is_real = (indices >= 0) & (indices % dilate == 0) & (indices // dilate < has)
    return int(is_real.sum())


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Count a convolution; TPUs write matmuls as such, batched ones with dilation."""
    out = instruction.shapes[0].dims
    labels = instruction.attribute(r"dim_labels=([\w>\-]+)")
    lhs, rest = labels.split("_", 1)
    rhs, result = rest.split("->")
    spatial = sorted(c for c in rhs if c.isdigit())
    window = instruction.attribute(r"window=\{([^}]*)\}")

    def field(key: str, default: str) -> list[int]:
        found = re.search(rf"\b{key}=(\S+)", window)
        texts = found.group(1).split("x") if found else [default] * len(spatial)
        return [int(text.split("_")[0]) for text in texts]  # LOW of LOW_HIGH

    flops = 2.0 * math.prod(out) * right.dims[rhs.index("i")]
    for digit, *fields in zip(
        spatial,
        field("size", "1"),
        field("stride", "1"),
        field("pad", "0_0"),
        field("lhs_dilate", "1"),
        field("rhs_dilate", "1"),
        strict=True,
    ):
        size = out[result.index(digit)]
        flops *= _taps(size, left.dims[lhs.index(digit)], *fields) / size
    return flops


def _dot_flops(instruction: Instruction, left: Shape, axes_pattern: str) -> float:
    axes = re.findall(r"\d+", instruction.attribute(axes_pattern))
    contracted = math.prod(left.dims[int(i)] for i in axes)
    # cuBLAS has two results; the second is scratch space.
    return 2.0 * math.prod(instruction.shapes[0].dims) * contracted


def _attention_flops(instruction: Instruction, operands: list[Shape]) -> float | None:
    """Count the matmuls between queries and all keys: two forward, five backward.

    The first three operands of floats are q, k and v; their last two axes are tokens
    and channels.
    """
    named = f"{instruction.name} {instruction.op_name} {instruction.rest[-4000:]}"
    is_attention = re.search(r"splash|flash_attention|mha|attention", named)
    floats = ("bf16", "f16", "f32")
    arrays = [s for s in operands if s.dtype in floats and len(s.dims) >= 3]
    if not is_attention or len(arrays) < 2:
        return None
    q, k = arrays[:2]
    unit = 2.0 * math.prod(q.dims) * k.dims[-2]
    if "dkv" in instruction.name:
        return unit * 5
    return unit * (3 if "dq" in instruction.name else 2)


def _is_repeated(instruction: Instruction) -> bool:
    """Whether it is recomputed, by `jax.checkpoint` or because memory is short."""
    by_jax = "rematted_computation" in instruction.op_name
    return by_jax or ".remat" in instruction.name


def _matmuls(computation: Computation) -> Iterator[tuple[Instruction, float, bool]]:
    """Yield (instruction, FLOPs, is a kernel) of each matmul; NaN where unknown."""
    for instruction in computation.values():
        operands = [
            computation[name].shapes[0]
            for name in instruction.operands
            if name in computation and computation[name].shapes
        ]
        if instruction.opcode == "dot":
            yield instruction, _dot_flops(instruction, operands[0], _DOT_AXES), False
        elif instruction.opcode == "convolution":
            yield instruction, _convolution_flops(instruction, *operands[:2]), False
        elif instruction.opcode == "custom-call":
            target = instruction.attribute(r'custom_call_target="([^"]+)"')
            if target.startswith("__cublas$"):
                flops = _dot_flops(instruction, operands[0], _CUBLAS_AXES)
                yield instruction, flops, False
            elif target == "tpu_custom_call" or "fmha" in target:
                known = _attention_flops(instruction, operands)
                yield instruction, math.nan if known is None else known, True


def _source(name: str, computation: Computation) -> Instruction:
    """Return the instruction that makes a value, without changes of its shape."""
    made = computation[name]
    while made.opcode == "bitcast" and made.operands[0] in computation:
        made = computation[made.operands[0]]
    return made


def _joined(name: str, computations: Computations, owner: str) -> tuple[Shape, ...]:
    """Return the arrays that were concatenated to be exchanged as one.

    GPU programs exchange one flat array instead of several; a fusion or an instruction
    concatenates them. An array that is not a concatenation is returned unchanged; a
    name that is not an instruction of `owner` gives ().
    """
    outer = computations[owner]
    if name not in outer:
        return ()
    made = outer[name]
    inner = computations.get(made.attribute(_CALLED.pattern))
    root = made if inner is None else list(inner.values())[-1]
    if root.opcode != "concatenate" or len(made.shapes[0].dims) != 1:
        return made.shapes
    parts: list[Shape] = []
    for operand in root.operands:
        part = _source(operand, outer if inner is None else inner)
        if inner is not None and part.opcode == "parameter":
            part = _source(made.operands[int(part.rest.split(")")[0])], outer)
        parts += part.shapes
    return tuple(parts)


def _collective(
    instruction: Instruction, computations: Computations, owner: str, times: int
) -> Collective | None:
    """Return the exchange that an instruction of `owner` makes, if it makes one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start"):
        # `shapes` are operands, results and contexts; an all-reduce has only results.
        count = len(instruction.operands)
        shapes = shapes[count : 2 * count] or shapes
    if kind in ("send", "recv"):  # the array, a context and a token
        shapes = shapes[:1]
    if kind in ("all-reduce", "reduce-scatter"):
        inputs = (_joined(name, computations, owner) for name in instruction.operands)
        shapes = tuple(s for of_operand in inputs for s in of_operand) or shapes
    if kind == "all-reduce" and owner.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, shapes, times, instruction.op_name)


def count_work(text: str) -> DeviceWork:
    """Count the work of a compiled program.

    Args:
      text: of `compiled.as_text()`.
    """
    computations, entry = _parse(text)
    counts, hosts, unknown_loops = _executions(computations, entry)
    flops, remat = {True: 0.0, False: 0.0}, 0.0
    unknown_kernels: collections.Counter[str] = collections.Counter()
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
                # The parts of an asynchronous collective (start, steps, done) are
                # fusions of one host with one channel. Otherwise a channel identifies
                # nothing: several hosts, and collectives of one host, may share it.
                channel = instruction.attribute(r"channel_id=(\d+)")
                is_part = channel and hosts[name] != name
                key = (hosts[name], channel) if is_part else (instruction.name,)
                collectives[found.kind, found.shapes, *key] = found
    return DeviceWork(
        matmul_flops=flops[False],
        kernel_flops=flops[True],
        remat_flops=remat,
        collectives=tuple(collectives.values()),
        unknown_loops=unknown_loops,
        unknown_kernels=dict(unknown_kernels),
    )
