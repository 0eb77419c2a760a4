"""The process of one side. It builds its model, then reads commands from stdin and answers with times.

It imports neither jax nor torch, so that each side has only its own library.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cells import CELLS, Cell


class Side(NamedTuple):
    """What one side can do once its model is built.

    Attributes:
        run: Runs a given number of times, waits for the last result, and returns a number to compare: the last loss, or
            a count.
        product: A function that computes one matrix product of the step's dtype and waits for it, and the FLOP of the
            product.
        versions: Versions of the libraries.
    """

    run: Callable[[int], float]
    product: tuple[Callable[[], Any], float]
    versions: dict[str, str]


def serve(make: Callable[[Cell, Path], Side]) -> None:
    """Build the side of the cell that the command line names, and answer commands until stdin ends.

    {"run": 3} is answered by {"seconds": of one run, "result": ...}, {"product": 20} by {"flops_per_second": ...}. With
    {"run": 3, "before": 1}, another run that is not timed comes first: in the meantime, a virtual machine may have taken back
    the memory that was freed after the last run.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries apart from the answers
    cell, directory = CELLS[sys.argv[1]], Path(sys.argv[2])
    started = time.perf_counter()
    side = make(cell, directory)
    ready = {"seconds": time.perf_counter() - started, "versions": side.versions}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        if untimed := asked.get("before"):
            side.run(untimed)
        answer = _run(side, asked["run"]) if "run" in asked else _product(side, asked["product"])
        print(json.dumps(answer | {"peak_bytes": peak_resident()}), file=answers)


def _run(side: Side, count: int) -> dict[str, float]:
    started = time.perf_counter()
    result = side.run(count)
    return {"seconds": (time.perf_counter() - started) / count, "result": result}


def _product(side: Side, count: int) -> dict[str, float]:
    multiply, flops = side.product
    multiply()
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    return {"flops_per_second": flops / min(seconds)}


def peak_resident() -> int:
    """The peak resident memory of this process in bytes (VmHWM in /proc, so Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def product_shape(cell: Cell) -> tuple[int, int, int]:
    """Rows, input and output size of the product that the bound is computed from: a feed-forward layer of the cell."""
    return max(cell.rows * cell.length, 64), cell.sizes["hidden_size"], cell.sizes["intermediate_size"]
