"""Reads the text of a compiled XLA program: its instructions, and how often each of them runs.

XLA's own cost analysis counts the body of a loop once, and the loop over layers is nearly the whole program. Here every
instruction comes with the product of the trip counts of the loops around it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
"""Bits of the types whose name does not say them."""


class Shape(NamedTuple):
    """An array as XLA sees it.

    Attributes:
      dtype: such as `bf16`.
      dims: its sizes.
      on_chip: whether it lies in a memory on the chip's compute core instead of in HBM.
    """

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        return self.size * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in the module.
      opcode: such as `fusion`.
      shapes: of the result; several if it is a tuple.
      operands: names of instructions of the same computation.
      literal: what stands between the parentheses, for constants and parameters.
      attributes: the rest of the line.
      is_root: whether it is the computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes)

    @property
    def op_name(self) -> str:
        """The path of the JAX operations that it comes from; empty if XLA did not keep it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, attribute: str) -> str | None:
        """Name of the computation under this attribute, such as `body`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]


class Run(NamedTuple):
    """An instruction, how often it runs, and where.

    Attributes:
      instruction: what runs.
      times: how often, in one run of the program.
      computation: the one that it stands in.
      within: the fusion or asynchronous operation around it, if any; what is inside does not touch HBM by itself.
    """

    instruction: Instruction
    times: int
    computation: Computation
    within: Instruction | None


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program as one device runs it.

    Attributes:
      computations: all of them, by name.
      entry: name of the one that it begins with.
    """

    computations: Mapping[str, Computation]
    entry: str

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs. Of the branches of a conditional all are given, as an upper bound."""
        yield from self._runs(self.entry, 1, None)

    def _runs(self, name: str, times: int, within: Instruction | None) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Run(instruction, times, computation, within)
            if instruction.opcode == "while":
                body, condition = instruction.called("body"), instruction.called("condition")
                assert body and condition
                trips = self.trip_count(instruction, computation)
                yield from self._runs(body, times * trips, within)
                yield from self._runs(condition, times * trips, within)
            elif instruction.opcode == "fusion" or instruction.opcode.endswith("-start"):
                if inner := instruction.called("calls"):
                    yield from self._runs(inner, times, instruction)
            elif instruction.opcode == "call":
                inner = instruction.called("to_apply")
                assert inner
                yield from self._runs(inner, times, within)
            elif instruction.opcode == "conditional":
                for inner in _branches(instruction):
                    yield from self._runs(inner, times, within)

    def trip_count(self, loop: Instruction, computation: Computation) -> int:
        """How often the body of a loop runs.

        Raises:
          ValueError: it is not a loop from one constant to another, as `jax.lax.scan` makes them.
        """
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes):
            return int(known[1])
        condition, body = (self.computations[loop.called(part) or ""] for part in ("condition", "body"))
        test = next(each for each in condition.values() if each.is_root)
        if test.opcode == "fusion":
            test = next(each for each in self.computations[test.called("calls") or ""].values() if each.is_root)
        limits = [int(each.literal) for each in condition.values() if each.opcode == "constant"]
        counters = [_index(each) for each in condition.values() if each.opcode == "get-tuple-element"]
        if "direction=LT" not in test.attributes or len(limits) != 1 or len(counters) != 1:
            raise ValueError(f"cannot read how often the loop {loop.name} runs")
        begin = _constant(_element(computation, loop.operands[0], counters[0]), computation)
        return max(0, -(-(limits[0] - begin) // self._stride(body, counters[0])))

    def _stride(self, body: Computation, counter: int) -> int:
        """By how much a loop's counter grows each time."""
        root = next(each for each in body.values() if each.is_root)
        following = _element(body, root.name, counter)
        while following.opcode in ("copy", "bitcast"):
            following = body[following.operands[0]]
        if following.opcode == "fusion":
            inner = self.computations[following.called("calls") or ""]
            constants = [int(each.literal) for each in inner.values() if each.opcode == "constant"]
        else:
            constants = [int(body[name].literal) for name in following.operands if body[name].opcode == "constant"]
        if len(constants) != 1:
            raise ValueError(f"cannot read by how much the counter {following.name} grows")
        return constants[0]


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
            name = line.removeprefix("ENTRY ").removeprefix("%").split(" ", 1)[0].split("(", 1)[0]
            current = computations.setdefault(name, {})
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    line = line.strip()
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    literal = rest[opening + 1 : closing]
    return Instruction(
        name=name.removeprefix("%"),
        opcode=rest[:opening],
        shapes=_shapes(kind),
        operands=tuple(re.findall(r"%([\w.\-]+)", literal)),
        literal=literal,
        attributes=rest[closing + 1 :],
        is_root=is_root,
    )


@functools.lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), "S(1)" in layout)
        for dtype, dims, layout in found
    )


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    digits = re.search(r"\d+", dtype)
    assert digits, dtype
    return int(digits[0])


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at a place closes."""
    depth = 0
    for place in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    raise ValueError(f"a parenthesis is never closed in {text[:100]!r}")


def _branches(conditional: Instruction) -> list[str]:
    if listed := re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes):
        return re.findall(r"%([\w.\-]+)", listed[1])
    both = (conditional.called("true_computation"), conditional.called("false_computation"))
    return [name for name in both if name]


def _index(instruction: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", instruction.attributes)
    assert found, instruction.name
    return int(found[1])


def _element(computation: Computation, tuple_name: str, index: int) -> Instruction:
    """The instruction that gives an element of a tuple."""
    made = computation[tuple_name]
    while made.opcode in ("copy", "opt-barrier"):
        made = computation[made.operands[0]]
    if made.opcode != "tuple":
        raise ValueError(f"cannot see where element {index} of {tuple_name} comes from")
    return computation[made.operands[index]]


def _constant(instruction: Instruction, computation: Computation) -> int:
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation[instruction.operands[0]]
    if instruction.opcode != "constant":
        raise ValueError(f"{instruction.name} is not a constant")
    return int(instruction.literal)
