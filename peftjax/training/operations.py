"""The time of the operations of a compiled program, from a trace of `jax.profiler`."""

import collections
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

_CONTAINERS = ("while", "call", "conditional")  # the operations inside them are counted instead
# Files that most operations pass through, so that the line of a caller says more.
_LOW = ("peftjax/quant/", "peftjax/nn/linear.py", "peftjax/nn/residual.py", "peftjax/nn/slot.py", "peftjax/nn/stack.py")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program.

    Attributes:
        name: Its name in the program, such as fusion.12.
        type: The type of its result, such as bf16[512,2048]; "tuple" for several.
        path: The JAX operation that it comes from, such as dot_general, with its named scopes.
        source: The line that it comes from and the line of the model, such as nn/attention.py:124,
            models/decoder.py:86.
        backward: Whether it belongs to the backward pass.
    """

    name: str
    type: str
    path: str
    source: str
    backward: bool


def read_operations(program: str) -> dict[str, Operation]:
    """The operations of a program by name, from the text of the compiled program (`compiled.as_text()`)."""
    sources = _Sources(program)
    found = {}
    for line in program.splitlines():
        if (match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(|[\w\[\],]+)", line)) is None:
            continue
        scopes = re.search(r'op_name="([^"]*)"', line)
        path = scopes[1] if scopes else ""
        frame = re.search(r"stack_frame_id=(\d+)", line)
        found[match[1]] = Operation(
            match[1],
            "tuple" if match[2] == "(" else match[2],
            _short(path),
            sources.line(int(frame[1])) if frame else "",
            "transpose(" in path,
        )
    return found


def read_times(directory: Path, module: str, operations: Mapping[str, Operation]) -> dict[str, tuple[int, float]]:
    """How often each operation ran and how many seconds it took, over all devices of this process.

    Args:
        directory: The directory that was given to `jax.profiler.start_trace`; its newest trace is read.
        module: The name of the compiled program, such as jit_train_step.
        operations: Its operations.
    """
    counts, seconds = collections.Counter[str](), collections.defaultdict[str, float](float)
    with warnings.catch_warnings():
        # jax 0.12 builds its types in a way that Python 3.13 deprecates; turned into an error, this would abort the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        for file in _newest(directory):
            for name, duration in _events(ProfileData.from_file(str(file)), module):
                if name in operations and name.partition(".")[0] not in _CONTAINERS:
                    counts[name] += 1
                    seconds[name] += duration / 1e9
    return {name: (counts[name], seconds[name]) for name in counts}


def _newest(directory: Path) -> list[Path]:
    traces = sorted((directory / "plugins" / "profile").iterdir(), key=lambda made: made.stat().st_mtime)
    return sorted(traces[-1].glob("*.xplane.pb"))


def _events(data: ProfileData, module: str) -> Iterator[tuple[str, float]]:
    """The names and durations, in nanoseconds, of the events that may be operations of the program."""
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                if "hlo_op" in stats and stats.get("hlo_module", module) == module:  # CPUs and GPUs
                    yield str(stats["hlo_op"]), event.duration_ns
                elif line.name == "XLA Ops":  # TPUs, which name an event by the operation's text
                    yield event.name.partition(" = ")[0].lstrip("%"), event.duration_ns


def _short(path: str) -> str:
    """The named scopes and the operation of jit(train_step)/while/body/closed_call/jvp(scope)/dot_general."""
    parts = [re.sub(r"^(?:\w+\()*(.*?)\)*$", r"\1", part) for part in path.split("/")[1:]]
    plain = ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "")
    return "/".join(part for part in parts if part not in plain)


class _Sources:
    """The tables of source lines at the beginning of a program."""

    def __init__(self, program: str) -> None:
        self._tables: dict[str, dict[int, str]] = {}
        table: dict[int, str] = {}
        for line in program.splitlines()[1:]:
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self._tables.setdefault(line, {})
            elif (entry := re.match(r"(\d+) (.*)", line)) is not None:
                table[int(entry[1])] = entry[2].strip('"')
            elif line.strip():
                break

    def line(self, frame: int) -> str:
        """The innermost line of the package in a stack and the innermost one of a model; "" if unknown."""
        ours = [where for where in self._stack(frame) if where.startswith("peftjax/")]
        own = [where for where in ours if not where.startswith(_LOW)] or ours
        model = [where for where in ours if where.startswith("peftjax/models/")]
        return ", ".join(where.removeprefix("peftjax/") for where in dict.fromkeys(own[:1] + model[:1]))

    def _stack(self, frame: int) -> Iterator[str]:
        """The lines of a stack, innermost first, with paths that start at the package."""
        frames = self._tables.get("StackFrames", {})
        # Frame 1 is the outermost one. Its parent_frame_id stands for "none" and is the offset of all others.
        first = _numbers(frames.get(1, "")).get("parent_frame_id", 0)
        seen = set[int]()
        while frame in frames and frame not in seen:
            seen.add(frame)
            numbers = _numbers(frames[frame])
            where = _numbers(self._tables["FileLocations"][numbers["file_location_id"]])
            file = self._tables["FileNames"][where["file_name_id"]]
            yield f"{file[file.rfind('peftjax/') if 'peftjax/' in file else 0 :]}:{where['line']}"
            frame = numbers.get("parent_frame_id", 0) - first


def _numbers(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)}
