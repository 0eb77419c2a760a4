"""The memory of a process that trains, after each stage, for a cell of against_peft:

    python benchmarks/memory_stages.py CELL [--models=DIR]

Prints the resident memory, its peak so far, and the bytes of all arrays. What the first steps add is compared with the compiler's
temporaries.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE / "against_peft"))

from cells import CELLS  # noqa: E402
from load_memory import resident  # noqa: E402
from run import model_directory  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the memory of a train step's process by stage.")
    parser.add_argument("cell", choices=[name for name, cell in CELLS.items() if cell.kind == "step"], metavar="CELL")
    parser.add_argument("--models", type=Path, default=HERE.parent / ".cache/bench", help="Directory for checkpoints")
    options = parser.parse_args()
    cell = CELLS[options.cell]
    directory = model_directory(cell, options.models, sys.executable)

    def show(stage: str) -> None:
        figures = (resident("VmRSS"), resident("VmHWM"), sum(array.nbytes for array in jax.live_arrays()))
        print(f"{stage:16}" + "".join(f"{size / 2**20:9,.0f} MiB" for size in figures), flush=True)

    import jax
    from peer_peftjax import step_config
    from train_step import Step

    print(f"{options.cell:16}{'resident':>13}{'peak':>13}{'arrays':>13}")
    show("imports")
    step = Step(step_config(cell, directory))
    show("model, method")
    compiled = step.step.lower(step.state, step.frozen, step.batch).compile()  # type: ignore[attr-defined]
    show("compiled")
    before = resident("VmRSS")
    step.run(4)
    show("four steps")
    added, temporary = resident("VmHWM") - before, compiled.memory_analysis().temp_size_in_bytes
    ratio, sizes = added / temporary, (added / 2**20, temporary / 2**20)
    print("the steps add {:,.0f} MiB, {ratio:.2f} times the {:,.0f} MiB of temporaries".format(*sizes, ratio=ratio))


if __name__ == "__main__":
    main()
