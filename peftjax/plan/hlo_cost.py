"""The memory traffic and the communication of a compiled program, counted in its HLO text.

The compilers' own `cost_analysis()` counts the body of a loop once, however often it runs, and XLA:GPU has none without
a GPU. Layers and microbatches are loops in this code base, so here a body counts once per trip.
"""

import dataclasses
import re

from peftjax.plan import hlo
from peftjax.plan.hlo import Computation, Instruction, Program
from peftjax.quant.grouped import IN_USE


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves.

    Attributes:
        memory: Bytes that instructions read from and write to the device's memory: the operands and results of each
            fusion, and only the slice where a slice of an array is read or updated.
        collectives: For each kind, how many run and the bytes that the device sends in a ring algorithm.
        unknown: Number of loops whose trip count is unknown; they are taken to run once.
    """

    memory: int
    collectives: dict[str, tuple[int, int]]
    unknown: int


_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# These move nothing themselves: they only name a value, or their contents or their other half are counted.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "async-start", "async-done", "copy-done",
}  # fmt: skip

_SLICES = {"dynamic-slice", "slice", "gather"}

_IN_PLACE = "output_to_operand_aliasing={{}: (0, {})}"  # a copy in the tiling of the TPU compiler, inside of a fusion

_MARKERS = ("AllocateBuffer", "Assume", "AsyncCollective", "ConcatBitcast")  # custom calls of the TPU compiler


def traffic(text: str, *, trips: bool = True, blocks_in_use: float = 1.0) -> Traffic:
    """Return what a compiled program moves.

    Args:
        text: The program, `compiled.as_text()`.
        trips: Whether the body of a loop counts as often as it runs; False counts it once, as `cost_analysis()` does.
        blocks_in_use: The share of the blocks of a mixture of experts that are in use; see `quant.grouped`.
    """
    program = hlo.parse_program(text)
    memory, unknown = 0.0, 0
    for computation, times in hlo.executions(program, trips=trips, conditions={IN_USE: blocks_in_use}):
        for instruction in computation.values():
            memory += times * _moved(instruction, computation, program)
            if instruction.code == "while" and trips and hlo.trip_count(instruction, program) is None:
                unknown += 1
    return Traffic(round(memory), _collectives(program, trips), unknown)


def _collectives(program: Program, trips: bool) -> dict[str, tuple[int, int]]:
    runs: dict[tuple[str, str], tuple[float, int]] = {}  # by kind and channel: how often, and the bytes of each run
    for computation, times in hlo.executions(program, trips=trips, fusions=True):
        for instruction in computation.values():
            kind = instruction.code.removesuffix("-done")
            if kind in _COLLECTIVES:
                start = computation[instruction.operands[0]] if instruction.code != kind else instruction
                # the parts of an asynchronous collective are separate instructions with the same channel
                channel = re.search(r"channel_id=(\d+)", start.attributes)
                key = (kind, channel[1] if channel else f"{id(computation)} {instruction.name}")
                runs[key] = max(runs.get(key, (0, 0)), (times, _sent(kind, instruction, start)))
    totals: dict[str, tuple[int, int]] = {}
    for (kind, _), (times, size) in runs.items():
        count, total = totals.get(kind, (0, 0))
        totals[kind] = count + round(times), total + round(times) * size
    return totals


def _moved(instruction: Instruction, computation: Computation, program: Program) -> int:
    """Bytes that an instruction reads from and writes to the device's memory."""
    code = instruction.code
    if code in _FREE or (code.endswith("-done") and code != "slice-done"):
        return 0
    if code == "custom-call" and any(f'custom_call_target="{marker}' in instruction.attributes for marker in _MARKERS):
        return 0
    result = hlo.type_bytes(instruction.type)
    if code in _SLICES or code == "slice-done":
        return 2 * result
    if code.endswith("-start"):  # the result repeats the operands
        return result
    if code == "dynamic-update-slice":
        return 2 * hlo.type_bytes(computation[instruction.operands[1]].type)
    operands = [computation[name].type if name in computation else "" for name in instruction.operands]
    if (fused := hlo.fused_computation(instruction, program)) is not None:
        return _written(fused, result) + sum(
            hlo.type_bytes(kind) and min(hlo.type_bytes(kind), _read(fused, index, program))
            for index, kind in enumerate(operands)
        )
    return result + sum(map(hlo.type_bytes, operands))


def _read(fused: Computation, index: int, program: Program) -> int:
    """Bytes that a fusion reads of its operand number `index`: only the slices if it takes slices."""
    parameters = [o for o in fused.values() if o.code == "parameter" and o.operands == [str(index)]]
    names = {o.name for o in parameters}
    whole = sum(hlo.type_bytes(o.type, anywhere=True) for o in parameters)
    read = 0
    for instruction in fused.values():
        if not names & set(instruction.operands):
            continue
        first = instruction.operands[0] in names
        if instruction.code == "bitcast" or _IN_PLACE in instruction.attributes:
            names.add(instruction.name)
        elif instruction.code in _SLICES and first:
            read += hlo.type_bytes(instruction.type, anywhere=True)
        elif instruction.code == "dynamic-update-slice" and first:
            pass  # in place
        elif (inner := hlo.fused_computation(instruction, program)) is not None:
            read += sum(_read(inner, at, program) for at, name in enumerate(instruction.operands) if name in names)
        else:
            return whole
    return read


def _written(fused: Computation, result: int) -> int:
    """Bytes that a fusion writes: only the slice if it updates a slice of a larger array."""
    instruction = next((o for o in fused.values() if o.root), None)
    while instruction is not None and instruction.code == "bitcast":
        instruction = fused.get(instruction.operands[0])
    if instruction is not None and instruction.code == "dynamic-update-slice":
        return min(result, hlo.type_bytes(fused[instruction.operands[1]].type, anywhere=True))
    return result


def _sent(kind: str, instruction: Instruction, start: Instruction) -> int:
    """Bytes that each of n devices sends for a collective over S bytes, in a ring (Patarasu and Yuan 2009): (n - 1) / n S
    for all-gather, reduce-scatter and all-to-all, twice that for all-reduce."""
    size = hlo.type_bytes(instruction.type, anywhere=True)
    if kind == "collective-permute":
        return size
    devices = hlo.group_size(start)
    if kind == "reduce-scatter":
        size *= devices
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) // devices
