"""Reads the text of a compiled program: computations, their instructions, shapes."""

import dataclasses
import functools
import math
import re

_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an array: element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return _BYTES.get(self.dtype, 1) * math.prod(self.dims)


@dataclasses.dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its module.
      opcode: such as `dot`.
      shapes: of the result, several of a tuple.
      rest: operands and attributes, as written.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    rest: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(re.findall(r"%([\w.\-]+)", self.rest.split(")")[0]))

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of what matches in the attributes."""
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """Path of the operation that it was made for; '' if unknown."""
        return self.attribute(r'op_name="([^"]*)"') or ""


Computation = dict[str, Instruction]


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


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return all computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry, last = "", None
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
        elif last is not None:  # a kernel's metadata may hold line breaks
            last.rest += line
    return computations, entry
