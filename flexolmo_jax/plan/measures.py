"""What a compiled program computes and sends, read from its instructions."""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from flexolmo_jax.plan.hlo import Computation, Instruction, Module, Run
from flexolmo_jax.plan.kernels import splash_flops

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Flops(NamedTuple):
    """Floating-point operations of matrix products that one device runs in one step.

    Attributes:
      needed: of the step itself.
      recomputed: of what rematerialisation computes a second time.
    """

    needed: int
    recomputed: int


def flops(module: Module) -> Flops:
    """Counts every `dot` and `convolution`, and what custom calls say of themselves, as often as they run."""
    needed = recomputed = 0
    for run in module.runs():
        count = run.times * _flops(run.instruction, run.computation)
        if splash := splash_flops(run.instruction, run.computation):
            count, again = (run.times * each for each in splash)
            recomputed += again
        if "rematted_computation" in run.instruction.op_name or ".remat" in run.instruction.name:
            recomputed += count
        else:
            needed += count
    return Flops(needed, recomputed)


def traffic(module: Module) -> dict[str, int]:
    """Bytes that one device receives in one step, by kind of collective.

    A gather of `b` bytes from `n` devices receives `b (n - 1) / n`, and so on: see `flexolmo_jax.plan.minimum.traffic`.
    On TPU a collective that runs behind other work stands in the program three times: where it starts, fused with that
    work, and where it ends. It counts where it starts.
    """
    found: dict[str, float] = defaultdict(float)
    runs = [run for run in module.runs() if run.instruction.opcode.removesuffix("-start") in COLLECTIVES]
    started = {_channel(run.instruction) for run in runs if _is_start(run)}
    for run in runs:
        if _channel(run.instruction) in started and not _is_start(run):
            continue
        kind = run.instruction.opcode.removesuffix("-start")
        operands = sum(run.computation[name].num_bytes for name in run.instruction.operands)
        devices = _group_size(run.instruction)
        if kind == "all-reduce" and _keeps_a_piece(run):
            kind = "reduce-scatter"
        received = {
            "all-gather": operands * (devices - 1),
            "all-reduce": 2 * operands * (devices - 1) / devices,
            "collective-permute": operands,
            "collective-broadcast": operands,
        }.get(kind, operands * (devices - 1) / devices)
        found[kind] += run.times * received
    return {kind: round(received) for kind, received in sorted(found.items()) if received}


def _flops(instruction: Instruction, computation: Computation) -> int:
    if instruction.opcode == "dot":
        lhs = computation[instruction.operands[0]].shapes[0]
        contracted = math.prod(lhs.dims[axis] for axis in _axes(instruction, "lhs_contracting_dims"))
        return 2 * instruction.shapes[0].size * contracted
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call":
        stated = re.search(r'cost_estimate"?:\{"?flops"?:"?(\d+)', instruction.attributes)
        return int(stated[1]) if stated else 0
    return 0


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    """Products that meet padding or the holes of a dilated operand are not computed.

    TPU programs say every matrix product as a convolution, and batched ones as one with as many holes as batches.
    """
    lhs, rhs = (computation[name].shapes[0] for name in instruction.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels, instruction.name
    left, right, result = labels.groups()
    window = _window(instruction, sum(label.isdigit() for label in left))
    meetings = 1
    for number, each in enumerate(window):
        size, out = lhs.dims[left.index(str(number))], instruction.shapes[0].dims[result.index(str(number))]
        reach = (size - 1) * each["lhs_dilate"] + 1
        places = (
            position * each["stride"] + tap * each["rhs_dilate"] - each["pad"]
            for position in range(out)
            for tap in range(each["size"])
        )
        meetings *= sum(0 <= place < reach and place % each["lhs_dilate"] == 0 for place in places)
    batch = instruction.shapes[0].dims[result.index("b")]
    features = instruction.shapes[0].dims[result.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2 * batch * features * rhs.dims[right.index("i")] * meetings // (int(groups[1]) if groups else 1)


def _window(instruction: Instruction, axes: int) -> list[dict[str, int]]:
    found = [{"size": 1, "stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1} for _ in range(axes)]
    stated = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    for part in stated[1].split() if stated else ():
        name, _, values = part.partition("=")
        for axis, value in enumerate(values.split("x")):
            found[axis][name] = int(value.split("_")[0])
    return found


def _group_size(collective: Instruction) -> int:
    """Devices that take part together, in whichever of XLA's three notations."""
    text = collective.attributes
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if "source_target_pairs" in text:
        return 2
    raise ValueError(f"cannot read which devices take part in {collective.name}: {text[:200]}")


def _is_start(run: Run) -> bool:
    return run.within is not None and run.within.name.startswith("async-collective-start")


def _channel(collective: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", collective.attributes)
    return found[1] if found else collective.name


def _keeps_a_piece(run: Run) -> bool:
    """Whether TPU's fused form of a reduce-scatter surrounds this all-reduce: the sum, of which a piece is kept."""
    if run.within is None or run.within.opcode != "fusion":
        return False
    users = [each for each in run.computation.values() if run.instruction.name in each.operands]
    return bool(users) and all(each.opcode in ("dynamic-slice", "bitcast") for each in users)


def _axes(instruction: Instruction, attribute: str) -> list[int]:
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(axis) for axis in found[1].split(",") if axis] if found else []


FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
"""Instructions that move nothing themselves."""


def memory_traffic(module: Module) -> int:
    """Bytes that one device reads from its memory and writes to it in one step, as XLA's own cost analysis counts them.

    Every instruction outside a fusion reads its operands and writes its result, but for what lies in a memory on the
    compute core. Of an array of which only slices are taken the slices count, of one updated in place the update.
    """
    return sum(run.times * _bytes_moved(run, module) for run in module.runs() if run.within is None)


def _bytes_moved(run: Run, module: Module) -> int:
    instruction, computation = run.instruction, run.computation
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    inner = instruction.called("calls") if instruction.opcode == "fusion" else None
    if inner:
        return _bytes_of_fusion(instruction, computation, module.computations[inner])
    if instruction.opcode == "dynamic-slice":
        return 2 * _in_memory(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _in_memory(computation[instruction.operands[1]])
    return _in_memory(instruction) + sum(_in_memory(computation[name]) for name in instruction.operands)


def _bytes_of_fusion(fusion: Instruction, around: Computation, inside: Computation) -> int:
    moved = 0
    updates = [each for each in inside.values() if each.opcode == "dynamic-update-slice"]
    for parameter in (each for each in inside.values() if each.opcode == "parameter"):
        operand = around[fusion.operands[int(parameter.literal)]]
        users = [each for each in inside.values() if parameter.name in each.operands]
        if users and all(each.opcode == "dynamic-slice" and each.operands[0] == parameter.name for each in users):
            moved += min(_in_memory(operand), sum(each.num_bytes for each in users))
        elif not (users and all(each in updates and each.operands[0] == parameter.name for each in users)):
            moved += _in_memory(operand)
    if updates and all(each.shapes[0].dims in {shape.dims for shape in fusion.shapes} for each in updates):
        return moved + sum(inside[each.operands[1]].num_bytes for each in updates)
    return moved + _in_memory(fusion)


def _in_memory(instruction: Instruction) -> int:
    return sum(shape.num_bytes for shape in instruction.shapes if not shape.on_chip)
