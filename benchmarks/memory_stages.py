"""The memory of a process that trains, after each stage, for a cell of against_peft:

    python benchmarks/memory_stages.py CELL [--models=DIR]

Prints the resident memory, its peak so far, and the bytes of all arrays. What the first steps add is compared with the compiler's
temporaries.
"""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE / "against_peft"))

from cells import CELLS  # noqa: E402
from run import model_directory  # noqa: E402


def status(field: str) -> float:
    """A field of /proc/self/status in MiB."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the memory of a train step's process by stage.")
    parser.add_argument("cell", choices=[name for name, cell in CELLS.items() if cell.kind == "step"], metavar="CELL")
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache/bench", help="Directory for checkpoints")
    options = parser.parse_args()
    cell = CELLS[options.cell]
    directory = model_directory(cell, options.models, sys.executable)

    def show(stage: str) -> None:
        arrays = sum(array.nbytes for array in jax.live_arrays()) / 2**20
        print(f"{stage:16}{status('VmRSS'):9,.0f} MiB{status('VmHWM'):9,.0f} MiB{arrays:9,.0f} MiB", flush=True)

    import jax
    from peer_peftjax import step_config
    from train_step import Step

    print(f"{options.cell:16}{'resident':>13}{'peak':>13}{'arrays':>13}")
    show("imports")
    step = Step(step_config(cell, directory))
    show("model, method")
    compiled = step.step.lower(step.state, step.frozen, step.batch).compile()  # type: ignore[attr-defined]
    show("compiled")
    before = status("VmRSS")
    step.run(4)
    show("four steps")
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    added = status("VmHWM") - before
    print(f"the steps add {added:,.0f} MiB, {added / temporary:.2f} times the {temporary:,.0f} MiB of temporaries")


if __name__ == "__main__":
    main()
