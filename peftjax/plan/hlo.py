"""Compiled HLO text, parsed into computations and instructions, and what can be read off them."""

import dataclasses
import math
import re
from collections.abc import Mapping


@dataclasses.dataclass
class Instruction:
    """One line of a computation: `name = type code(operands), attributes`.

    Attributes:
        name: Name of the result.
        type: Type of the result with its layout, such as f32[8,64]{1,0}; a tuple in parentheses.
        code: Opcode, such as fusion or all-gather-start.
        operands: Names of the operands; the literal of a constant, the number of a parameter.
        attributes: The line after the operands.
        root: Whether the computation returns this result.
    """

    name: str
    type: str
    code: str
    operands: list[str]
    attributes: str
    root: bool


Computation = dict[str, Instruction]  # in an order in which operands come first
Program = dict[str, Computation]

ENTRY = ""  # the name under which a program has its entry computation


def parse_program(text: str) -> Program:
    """Return the computations of a compiled program (`compiled.as_text()`) by name, the entry as `ENTRY`."""
    program: Program = {}
    current: Computation = {}
    for line in text.splitlines():
        if (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)) is not None:
            current = program.setdefault(ENTRY if head[1] else head[2], {})
        elif (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)) is not None:
            current[found[2]] = _parse_instruction(line, found[2], found.end(), root=bool(found[1]))
    return program


def _parse_instruction(line: str, name: str, start: int, *, root: bool) -> Instruction:
    """start: the position of the type."""
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    operands = [item.split()[-1].lstrip("%") for item in line[opening + 1 : closing - 1].split(", ") if item]
    return Instruction(name, line[start:end], line[end:opening].strip(), operands, line[closing:], root)


def _closing(line: str, opening: int) -> int:
    """The position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(line)


_CALLS = re.compile(
    r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{.*?\}|[^,\s]+)"
)


def executions(
    program: Program, *, trips: bool, fusions: bool = False, conditions: Mapping[str, float] | None = None
) -> list[tuple[Computation, float]]:
    """Return the computations that run, and how often each of them runs.

    Args:
        program: A parsed program.
        trips: Whether the body of a loop counts as often as it runs, or once.
        fusions: Whether to include computations inside of fusions and reductions.
        conditions: The share of its executions in which a conditional runs each branch, by the `jax.named_scope` of the
            conditional. For all others, every branch counts as often as the conditional runs.
    """
    times: dict[str, float] = {}
    shares = (conditions or {}).items()

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0) + count
        for instruction in program[name].values():
            for role, names in _CALLS.findall(instruction.attributes):
                control = instruction.code == "call" or (
                    instruction.code in ("while", "conditional", "async-start") and role != "to_apply"
                )
                if not (control or fusions):
                    continue
                again: float = (trip_count(instruction, program) or 1) if instruction.code == "while" and trips else 1
                if instruction.code == "conditional":
                    again = min((share for scope, share in shares if scope in instruction.attributes), default=1)
                for inner in re.findall(r"[\w.\-]+", names):
                    if inner in program:
                        visit(inner, count * again)

    visit(ENTRY, 1)
    return [(program[name], count) for name, count in times.items()]


def trip_count(loop: Instruction, program: Program) -> int | None:
    """Return how often a loop runs: the compiler's annotation, or else the only constant in the loop's condition. None
    if neither exists."""
    if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)) is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
    instructions = program.get(condition[1], {}).values() if condition else ()
    constants = [o.operands[0] for o in instructions if o.code == "constant" and o.type.startswith("s32[]")]
    return int(constants[0]) if len(constants) == 1 and constants[0].isdigit() else None


def fused_computation(instruction: Instruction, program: Program) -> Computation | None:
    """Return the computation of a fusion, or None for any other instruction."""
    called = re.search(r"calls=%?([\w.\-]+)", instruction.attributes) if instruction.code == "fusion" else None
    return program[called[1]] if called else None


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def type_bytes(kind: str, *, anywhere: bool = False) -> int:
    """Return the bytes of the arrays of a type.

    `anywhere` includes arrays that the TPU compiler keeps outside of the device's main memory, which are marked S(1) and so on
    in their layouts.
    """
    total = 0
    for name, dimensions, layout in _ARRAY.findall(kind):
        if anywhere or re.search(r"S\([1-9]\)", layout) is None:
            width = re.search(r"\d+", name)
            total += math.prod(int(size) for size in dimensions.split(",") if size) * int(width[0] if width else 8)
    return total // 8


def group_size(collective: Instruction) -> int:
    """Return the number of devices that take part in a collective, from its replica_groups: {{0,1},{2,3}},
    [2,2]<=[4], mesh['a'=2,'b'=2] {'a'} or mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}; 'b':(1)2 is a part of an axis."""
    attributes = collective.attributes
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)) is not None:
        return listed[1].count(",") + 1
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)) is not None:
        return int(iota[1])
    if (mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)) is not None:
        sizes: Mapping[str, str] = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2]))
    return 1
