"""The time it takes to load a model, relative to a plain read of its files.

    python benchmarks/load_time.py

Writes random Llamas of about 315 million and, in TinyLlama's shape, 1.1 billion parameters to a temporary directory. Each
line of the table comes from a fresh process. "read s" is a read of the files, which are in the page cache, into an
allocated buffer; "check s" is the search for NaN and Inf in what was read; "load s" is `load_model`. "first" includes the
compilation of the programs that place and quantize the parameters. Loading includes at least one read and one write of the
model. All times but "first" are the best of three.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from load_memory import BYTES, SMALL, TINYLLAMA, write_model

# (config, stored dtype, dtype in memory, format of the kernels)
CASES = (
    (SMALL, "float32", "float32", ""),
    (SMALL, "float32", "bfloat16", ""),
    (SMALL, "bfloat16", "float32", ""),
    (TINYLLAMA, "bfloat16", "bfloat16", ""),
    (TINYLLAMA, "bfloat16", "float32", ""),
    (TINYLLAMA, "bfloat16", "bfloat16", "nf4"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print("width  stored    loaded    kernels  read s  check s  load s  load/read  first s")
        for config, stored, loaded, quantize in CASES:
            width = config["hidden_size"]
            directory = Path(folder, f"{width}-{stored}")
            if not directory.exists():
                write_model(directory, config, stored)
            command = [sys.executable, __file__, "child", str(directory), stored, loaded, quantize]
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
            found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            read, check, load, first = (found[name] for name in ("read", "check", "load", "first"))
            times = f"{read:6.2f}  {check:7.2f}  {load:6.2f}  {load / read:9.1f}  {first:7.2f}"
            print(f"{width:5}  {stored:9} {loaded:9} {quantize or 'dense':7}  {times}", flush=True)


def child(directory: str, stored: str, loaded: str, quantize: str) -> None:
    from peftjax.io.finite import is_finite
    from peftjax.io.load import load_model

    files = sorted(Path(directory).glob("*.safetensors"))
    buffer = np.empty(max(file.stat().st_size for file in files) + 8, np.uint8)  # written once: its pages exist
    buffer.fill(0)
    values = buffer[: buffer.size // BYTES[stored] * BYTES[stored]].view(stored)

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                stream.readinto(buffer.data)

    def load() -> None:
        load_model(directory, loaded, quantize or None)  # waits for all parameters

    size = sum(file.stat().st_size for file in files)
    times = {"first": timed(load), "read": best(read)}
    buffer.fill(0)
    times |= {"check": best(lambda: is_finite(values)) * size / values.nbytes, "load": best(load)}
    print(json.dumps(times))


def best(run: Callable[[], object]) -> float:
    return min(timed(run) for _ in range(3))


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
