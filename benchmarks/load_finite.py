"""The time it takes to look for NaN and Inf in a checkpoint, relative to reading and converting its tensors.

    python benchmarks/load_finite.py

Writes 1 GB of each stored dtype to a temporary file and reads it, in the page cache, as `load_model` does. Each number is
the best of three.
"""

import tempfile
import time
from collections.abc import Callable
from typing import TypeVar

import ml_dtypes
import numpy as np

from peftjax.io.finite import is_finite

PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"))
BYTES, PARTS = 10**9, 8
T = TypeVar("T")


def main() -> None:
    print("stored    loaded    read s  check s  ratio")
    for names in PAIRS:
        stored, loaded = (np.dtype(getattr(ml_dtypes, name, name)) for name in names)
        part = np.random.default_rng(0).standard_normal(BYTES // PARTS // stored.itemsize, np.float32).astype(stored)
        with tempfile.NamedTemporaryFile() as file:
            for _ in range(PARTS):
                part.tofile(file)
            file.flush()
            tensor = np.memmap(file.name, stored, mode="r")
            reading, value = best(lambda tensor=tensor, loaded=loaded: np.array(tensor, loaded))
            checking, finite = best(lambda value=value: is_finite(value))
        assert finite
        print(f"{names[0]:9} {names[1]:9} {reading:6.2f}  {checking:7.2f}  {checking / reading:5.2f}", flush=True)


def best(run: Callable[[], T]) -> tuple[float, T]:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
    return min(times), result


if __name__ == "__main__":
    main()
