"""What a compiled program costs, counted in the text that the compiler makes of it.

The compilers' own `cost_analysis()` counts the body of a loop once, however often it runs (and XLA:GPU gives none without
a GPU); layers and microbatches are loops here, so this multiplies by the trips of the loops around.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device moves. memory: bytes that its operations read and write in the device's memory, each fusion's
    operands and results, slices as slices; collectives: by kind, how many run and the bytes that the device sends, as in
    a ring; unknown: loops that were taken to run once, since their trips cannot be told."""

    memory: int
    collectives: dict[str, tuple[int, int]]
    unknown: int


@dataclasses.dataclass
class _Operation:
    name: str
    type: str
    code: str
    operands: list[str]
    rest: str  # the line after the operands
    root: bool


_Computation = dict[str, _Operation]


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


# They move nothing by themselves: they name, or what they contain is counted, or their other half is.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all",
    "opt-barrier", "partition-id", "replica-id", "async-start", "async-done", "copy-done",
}  # fmt: skip


_SLICES = {"dynamic-slice", "slice", "gather"}


_MARKERS = ("AllocateBuffer", "Assume", "AsyncCollective", "ConcatBitcast")  # the TPU compiler's custom calls


def traffic(text: str, *, trips: bool = True) -> Traffic:
    """Of a compiled program (`compiled.as_text()`); trips=False: loops run once, as in `cost_analysis()`."""
    program = _parse(text)
    memory, unknown = 0, 0
    sent: dict[tuple[str, str], tuple[int, int]] = {}  # of a collective: how often, and the bytes of once
    for computation, times in _executed(program, trips):
        for operation in computation.values():
            memory += times * _moved(operation, computation, program)
            if operation.code == "while" and trips and _trips(operation, program) is None:
                unknown += 1
    collectives: dict[str, tuple[int, int]] = {}
    for computation, times in _executed(program, trips, fusions=True):
        for operation in computation.values():
            kind = operation.code.removesuffix("-done")
            if kind in COLLECTIVES:
                start = computation[operation.operands[0]] if operation.code != kind else operation
                # an asynchronous one stands in the text for each part of it, under one channel
                channel = re.search(r"channel_id=(\d+)", start.rest)
                key = (kind, channel[1] if channel else f"{id(computation)} {operation.name}")
                sent[key] = max(sent.get(key, (0, 0)), (times, _ring(kind, operation, start)))
    for (kind, _), (times, size) in sent.items():
        count, total = collectives.get(kind, (0, 0))
        collectives[kind] = count + times, total + times * size
    return Traffic(memory, collectives, unknown)


def _parse(text: str) -> dict[str, _Computation]:
    """The computations by name; the one that is run stands as ""."""
    program: dict[str, _Computation] = {}
    current: _Computation = {}
    for line in text.splitlines():
        if (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)) is not None:
            current = program.setdefault("" if head[1] else head[2], {})
        elif (found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)) is not None:
            end = _closing(line, found.end()) if line[found.end()] == "(" else line.index(" ", found.end())
            opening = line.index("(", end)
            closing = _closing(line, opening)
            operands = [item.split()[-1].lstrip("%") for item in line[opening + 1 : closing - 1].split(", ") if item]
            kind, code = line[found.end() : end], line[end:opening].strip()
            current[found[2]] = _Operation(found[2], kind, code, operands, line[closing:], bool(found[1]))
    return program


def _closing(line: str, opening: int) -> int:
    """The position after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(line)


def _executed(program: dict[str, _Computation], trips: bool, fusions: bool = False) -> list[tuple[_Computation, int]]:
    """The computations that the program runs, and how often; those within fusions only if asked for."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for operation in program[name].values():
            own = re.findall(
                r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{.*?\}|[^,\s]+)",
                operation.rest,
            )
            for role, names in own:
                if not fusions and (
                    role == "to_apply" or operation.code not in ("while", "conditional", "call", "async-start")
                ):
                    continue
                again = (_trips(operation, program) or 1) if operation.code == "while" and trips else 1
                for inner in re.findall(r"[\w.\-]+", names):
                    if inner in program:
                        visit(inner, count * again)

    visit("", 1)
    return [(program[name], count) for name, count in times.items()]


def _trips(loop: _Operation, program: dict[str, _Computation]) -> int | None:
    """How often a loop runs: as the compiler says, or the one constant that its condition compares with."""
    if (known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)) is not None:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    operations = program.get(condition[1], {}).values() if condition else ()
    constants = [o.operands[0] for o in operations if o.code == "constant" and o.type.startswith("s32[]")]
    return int(constants[0]) if len(constants) == 1 and constants[0].isdigit() else None


def _moved(operation: _Operation, computation: _Computation, program: dict[str, _Computation]) -> int:
    """Bytes that an operation reads and writes in the device's memory."""
    code = operation.code
    if code in _FREE or (code.endswith("-done") and code != "slice-done"):
        return 0
    if code == "custom-call" and any(f'custom_call_target="{marker}' in operation.rest for marker in _MARKERS):
        return 0
    result = _size(operation.type)
    if code in _SLICES or code == "slice-done":
        return 2 * result
    if code.endswith("-start"):  # the result repeats the operands
        return result
    if code == "dynamic-update-slice":
        return 2 * _size(computation[operation.operands[1]].type)
    operands = [computation[name].type if name in computation else "" for name in operation.operands]
    if code == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", operation.rest)) is not None:
        fused = program[called[1]]
        return _written(fused, result) + sum(
            _size(kind) and min(_size(kind), _read(fused, index, program)) for index, kind in enumerate(operands)
        )
    return result + sum(map(_size, operands))


def _read(fused: _Computation, index: int, program: dict[str, _Computation]) -> int:
    """Bytes that a fusion reads of its operand number `index`: where it takes slices of it, the slices."""
    parameters = [o for o in fused.values() if o.code == "parameter" and o.operands == [str(index)]]
    names = {o.name for o in parameters}
    whole = sum(_size(o.type, anywhere=True) for o in parameters)
    read = 0
    for operation in fused.values():  # in an order in which operands come first
        if not names & set(operation.operands):
            continue
        first = operation.operands[0] in names
        if operation.code == "bitcast":
            names.add(operation.name)
        elif operation.code in _SLICES and first:
            read += _size(operation.type, anywhere=True)
        elif operation.code == "dynamic-update-slice" and first:
            pass  # in place
        elif operation.code == "fusion" and (called := re.search(r"calls=%?([\w.\-]+)", operation.rest)) is not None:
            inner = program[called[1]]
            read += sum(_read(inner, at, program) for at, name in enumerate(operation.operands) if name in names)
        else:
            return whole
    return read


def _written(fused: _Computation, result: int) -> int:
    """Bytes that a fusion writes: of a slice put into its place in a larger array, the slice."""
    operation = next((o for o in fused.values() if o.root), None)
    while operation is not None and operation.code == "bitcast":
        operation = fused.get(operation.operands[0])
    if operation is not None and operation.code == "dynamic-update-slice":
        return min(result, _size(fused[operation.operands[1]].type, anywhere=True))
    return result


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")


def _size(kind: str, anywhere: bool = False) -> int:
    """Bytes of the arrays of a type that are in the device's memory; those the TPU compiler keeps in other memories,
    marked S(1) and so on in their layouts, only if asked for."""
    total = 0
    for name, dimensions, layout in _ARRAY.findall(kind):
        if anywhere or re.search(r"S\([1-9]\)", layout) is None:
            width = re.search(r"\d+", name)
            total += math.prod(int(size) for size in dimensions.split(",") if size) * int(width[0] if width else 8)
    return total // 8


def _ring(kind: str, operation: _Operation, start: _Operation) -> int:
    """Bytes that a device sends for a collective of n devices, each of which holds an n-th of the whole S or all of it:
    (n - 1) / n S for all-gather, reduce-scatter and all-to-all, twice that for all-reduce (Patarasu and Yuan 2009)."""
    size = _size(operation.type, anywhere=True)
    if kind == "collective-permute":
        return size
    devices = _group(start.rest)
    if kind == "reduce-scatter":
        size *= devices
    return (2 if kind == "all-reduce" else 1) * size * (devices - 1) // devices


def _group(rest: str) -> int:
    """How many devices take part, from replica_groups: {{0,1},{2,3}}, [2,2]<=[4] or mesh['a'=2,'b'=2] {'a'}."""
    if (listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest)) is not None:
        return listed[1].count(",") + 1
    if (iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest)) is not None:
        return int(iota[1])
    if (mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)) is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return 1
