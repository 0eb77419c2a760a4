"""peftjax compared with PyTorch and Hugging Face PEFT: time, memory and first step.

    python benchmarks/against_peft/run.py short              # three cells; `make bench`
    python benchmarks/against_peft/run.py all                # everything; `make bench-all`
    python benchmarks/against_peft/run.py "110m lora" 1.1b-qlora-bf16-1x64    # cells with these words in their names

Each side of a cell is a process in its own environment, which builds its model and stays loaded. The two take turns, A B A B,
so that other load on the machine affects both. Results are merged into the JSON file by the name of the cell, so that some
cells can be measured again. The table and the plot are made from the whole file.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import report
from cells import CELLS, Cell, select
from idle import LIMIT, Others, before

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROUNDS, TURN = 7, 2.0  # rounds, and seconds of each side's turn
PAUSE = 0.2  # seconds between turns, for threads of the other side that spin


class Child:
    """A side of a cell in a process of its own."""

    def __init__(self, python: str, script: str, cell: Cell, directory: Path) -> None:
        self._process = subprocess.Popen(
            [python, str(HERE / script), cell.name, str(directory)],
            env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        self._name = f"{script} {cell.name}"
        self.pid = self._process.pid
        self.ready = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()
        self._process.wait()
        self._answers.close()

    def ask(self, **command: int) -> dict[str, Any]:
        time.sleep(PAUSE)
        print(json.dumps(command), file=self._questions)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        if not (line := self._answers.readline()):
            raise RuntimeError(f"{self._name} ended with code {self._process.wait()}; its message is above")
        return json.loads(line)


def measure(cell: Cell, pythons: dict[str, str], directory: Path, rounds: int, turn: float) -> dict[str, Any]:
    """All figures of a cell, by side."""
    idle = before()
    with contextlib.ExitStack() as opened:
        sides = {
            side: opened.enter_context(Child(python, f"peer_{side}.py", cell, directory))
            for side, python in pythons.items()
        }
        first = {side: child.ask(run=1) for side, child in sides.items()}
        check_results(cell, {side: answer["result"] for side, answer in first.items()})
        rates = (
            {side: child.ask(product=30)["flops_per_second"] for side, child in sides.items()} if cell.flops() else {}
        )
        counts = {side: max(1, round(turn / child.ask(run=1)["seconds"])) for side, child in sides.items()}
        others = Others(*(child.pid for child in sides.values()))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        peaks: dict[str, int] = {}
        for _ in range(rounds):
            for side, child in sides.items():
                answer = child.ask(run=counts[side], before=1)
                seconds[side].append(answer["seconds"])
                peaks[side] = answer["peak_bytes"]
        busy = max(idle, others.share())
    return {
        "seconds": seconds,
        "first_seconds": {side: answer["seconds"] for side, answer in first.items()},
        "first_result": {side: answer["result"] for side, answer in first.items()},
        "load_seconds": {side: child.ready["seconds"] for side, child in sides.items()},
        "peak_bytes": peaks,
        "product_flops_per_second": rates,
        "flops": cell.flops(),
        "work": cell.work,
        "others": busy,
        "busy": busy > LIMIT,
        "versions": {side: child.ready["versions"] for side, child in sides.items()},
        "machine": machine(),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check_results(cell: Cell, results: dict[str, float]) -> None:
    """Check that both sides compute the same: the first loss where the method starts as the base model, or the tokens.

    The peer takes the steps of several runs with one model, so its first result is the loss after some of them.
    """
    starts_alike = cell.kind == "step" and cell.method not in ("prompt", "prefix") and cell.runs == 1
    if (starts_alike or cell.kind == "decode") and abs(results["torch"] - results["peftjax"]) > 0.01 * results["torch"]:
        raise SystemExit(f"{cell.name}: the sides differ in their first results: {results}")


def child_environment() -> dict[str, str]:
    """The environment of the children: this checkout, the CPU, huge pages for both sides, and no programs compiled by an
    earlier run."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH"))))
    huge_pages = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    settings = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "PYTHONPATH": path}
    return os.environ | huge_pages | settings


def machine() -> dict[str, Any]:
    processors = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    name = processors[0].partition(": ")[2] if processors else platform.processor()
    cores = len(os.sched_getaffinity(0))
    return {"processor": name, "cores": cores, "memory_bytes": memory, "system": platform.platform()}


def model_directory(cell: Cell, root: Path, python: str) -> Path:
    """A checkpoint with random bfloat16 weights in the shape of a cell, written once, by a separate process."""
    directory = root / cell.shape
    if not (directory / "config.json").exists():
        shutil.rmtree(directory, ignore_errors=True)  # one that was not finished
        command = [python, str(HERE / "checkpoint.py"), cell.name, str(directory)]
        subprocess.run(command, env=child_environment(), check=True)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "cells", nargs="*", default=["short"], help='short, all, or words in the names of cells: "110m lora bf16"'
    )
    parser.add_argument("--list", action="store_true", help="Print the names of all cells")
    parser.add_argument(
        "--torch-python", default=str(ROOT / ".venv-peer/bin/python"), help="Python interpreter with torch and peft"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="Turns of each side")
    parser.add_argument("--turn", type=float, default=TURN, help="Seconds of a turn")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache/bench", help="Directory for checkpoints")
    parser.add_argument(
        "--results", type=Path, default=HERE.parent / "results/against_peft.json", help="JSON file for the results"
    )
    options = parser.parse_args()
    if options.list:
        print(*CELLS, sep="\n")
        return
    if not shutil.which(options.torch_python):
        parser.error(f"--torch-python={options.torch_python}: no such program; `make bench` installs it")
    pythons = {"torch": options.torch_python, "peftjax": sys.executable}
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    chosen = select(options.cells)
    for number, cell in enumerate(chosen, 1):
        directory = model_directory(cell, options.models, sys.executable)
        found[cell.name] = measure(cell, pythons, directory, options.rounds, options.turn)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{number}/{len(chosen)} {cell.name}: {report.line(found[cell.name])}", flush=True)
    report.write(found, options.results)


if __name__ == "__main__":
    main()
