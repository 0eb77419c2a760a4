"""The checkpoint that both sides of a cell load: `python checkpoint.py CELL DIRECTORY`, started by run.py."""

import shutil
import sys
from pathlib import Path

from cells import CELLS
from load_memory import write_model

from peftjax.io.hf_files import find_model


def write(cell: str, directory: Path) -> None:
    """Write random bfloat16 weights in the shape of a cell, and the tokenizer of the bundled model, which no step uses."""
    write_model(directory, CELLS[cell].sizes, "bfloat16")
    for file in find_model("embedded").glob("tokenizer*"):
        shutil.copy(file, directory)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
