"""Where the time of a train step or of decoding goes on this CPU: the share of each kind of operation.

    python benchmarks/profile_steps.py                          # the cells that docs/performance.md explains
    python benchmarks/profile_steps.py 110m-lora-bf16-4x128     # cells of against_peft/run.py, named as there

Each cell runs in a process of its own, as peftjax's side of the comparison with PEFT: some runs for their time, and as many in a
trace of the profiler. Shares are of the sum over all operations. Some of them run at the same time, and the trace takes time
itself, so the sum may exceed the time of a step. Use an otherwise idle machine.
"""

import argparse
import collections
import inspect
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax

from peftjax.plan.hlo import Instruction, Program, fused_computation, parse_program
from peftjax.training import step
from peftjax.training.operations import Operation, read_operations, read_times

sys.path.append(str(Path(__file__).resolve().parent / "against_peft"))

from cells import CELLS, NEW, Cell, select
from idle import LIMIT, Others
from peer_peftjax import decode, train
from run import ROOT, child_environment, machine, model_directory

CHOSEN = [
    *(f"110m-lora-{dtype}-{batch}" for dtype in ("f32", "bf16") for batch in ("4x128", "1x64")),
    "110m-full-bf16-4x128", "110m-full-bf16-1x64", "moe-full-bf16-4x128", "110m-qlora-bf16-4x128", "110m-qlora-bf16-1x64",
    "1.1b-lora-bf16-1x64", "1.1b-decode-dense-bf16-1", "1.1b-decode-nf4-bf16-1",
]  # fmt: skip
SECONDS = 3.0  # of the traced steps, about
COPIES = {"concatenate", "copy", "dynamic-slice", "dynamic-update-slice", "pad", "slice", "transpose"}
CHANGED_ON_THE_WAY = {"bitcast", "bitcast-convert", "broadcast", "constant", "convert", "parameter", "reshape"}


def kind(instruction: Instruction, operation: Operation, program: Program) -> str:
    """What an operation of a compiled program does."""
    inside = list((fused_computation(instruction, program) or {}).values()) or [instruction]
    codes = {each.code for each in inside if "[]" not in each.type}  # without the arithmetic of indices
    if "dot" in codes:
        of_attention = operation.source.startswith(("nn/attention", "nn/blockwise"))
        return "products of attention" if of_attention else "products with kernels, adapters and head"
    if codes & COPIES and codes <= COPIES | CHANGED_ON_THE_WAY:
        if "dynamic-update-slice" in codes:
            return "copies into stacks"
        return "copies out of stacks" if "dynamic-slice" in codes else "other copies"
    if any(each.type.startswith("s4[") for each in inside):
        return "decoding NF4"
    if operation.source.startswith("training/optim.py") or _updates(operation.source):
        return "optimizer update"
    return "element-wise operations and reductions" if instruction.code == "fusion" else "other"


def _updates(source: str) -> bool:
    """Whether an operation comes from the end of `accumulate`, which divides the gradients, or from `apply`."""
    line = re.match(r"training/step\.py:(\d+)", source)
    (body, start), (update, first) = inspect.getsourcelines(step.accumulate), inspect.getsourcelines(step.apply)
    return line is not None and start + len(body) - 1 <= int(line[1]) < first + len(update)


def profile(cell: Cell, directory: Path, dump: Path) -> None:
    """Print the table of a cell. XLA writes the programs of this process to the directory `dump`."""
    decodes = cell.kind == "decode"
    module, parts = ("jit__decode", NEW) if decodes else ("jit_train_step", 1)
    run = (decode if decodes else train)(cell, directory)
    run(1)
    count = max(1, round(SECONDS / seconds_of(run, 1)))
    others = Others()
    seconds, busy = seconds_of(run, count), others.share()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what it measures
    with tempfile.TemporaryDirectory() as trace:
        with jax.profiler.trace(trace, profiler_options=options):
            run(count)
        (file,) = dump.glob(f"*.{module}.*after_optimizations.txt")
        text = file.read_text()
        operations, program = read_operations(text), parse_program(text)
        times = read_times(Path(trace), module, operations)
    instructions = {name: each for computation in program.values() for name, each in computation.items()}
    by_kind = collections.defaultdict[str, float](float)
    for name, (_, spent) in times.items():
        by_kind[kind(instructions[name], operations[name], program)] += spent / count / parts
    total = sum(by_kind.values())
    print(
        f"\n{cell.name}: {seconds / parts * 1e3:.1f} ms per {'token' if decodes else 'step'}, all operations {total * 1e3:.1f} ms"
    )
    if busy > LIMIT:
        print(f"other processes used {busy:.0%} of the machine")
    for name, spent in sorted(by_kind.items(), key=lambda item: -item[1]):
        print(f"{spent / total:6.1%} {spent * 1e3:8.2f} ms  {name}")


def seconds_of(run: Callable[[int], float], count: int) -> float:
    """The time of one of `count` runs."""
    started = time.perf_counter()
    run(count)
    return (time.perf_counter() - started) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cells", nargs="*", default=CHOSEN, help="Words in the names of cells, as for against_peft/run.py"
    )
    parser.add_argument("--models", type=Path, default=ROOT / ".cache/bench", help="Directory for checkpoints")
    options = parser.parse_args()
    names = ("jax", "jaxlib", "flax", "optax", "peftjax")
    here, versions = machine(), ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{here['processor']}, {here['cores']} cores; {versions}", flush=True)
    cells = select(options.cells)
    if refused := [cell.name for cell in cells if cell.kind == "load" or cell.runs > 1]:
        parser.error(f"{refused[0]}: only train steps of one run and decoding can be profiled")
    for cell in cells:
        directory = model_directory(cell, options.models, sys.executable)
        with tempfile.TemporaryDirectory() as dump:
            flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_(train_step|_decode)$"
            command = [sys.executable, __file__, "--child", cell.name, str(directory), dump]
            subprocess.run(command, env=child_environment() | {"XLA_FLAGS": flags}, check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        profile(CELLS[sys.argv[2]], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
