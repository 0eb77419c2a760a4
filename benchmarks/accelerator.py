"""One accelerator: correctness compared with the CPU, and the speed and memory of LoRA and QLoRA on an 8B Llama.

    python benchmarks/accelerator.py [WORDS ...] [--json=FILE]      # WORDS select steps by name: "qlora packed"
    python benchmarks/accelerator.py --tiny                         # tiny shapes, also on a CPU, to test this script

Meant for an NVIDIA GPU with `pip install "peftjax[cuda]"`. It prints tables, and with --json writes all figures:

- Losses, logits and gradients of a small model, for each dtype and attention implementation, compared with the CPU.
- The rate of a bfloat16 product, and the bandwidth of a copy and of decoding NF4.
- Train steps with one sequence in bfloat16: tokens/s, FLOP/s relative to that product (counting only the products that a step
  cannot avoid: no recomputation, no masked scores), and peak memory next to the estimate of `peftjax plan`.
- With torch and peft in --torch-python: the same steps with PEFT, sdpa attention (flash attention) and bitsandbytes.

Each measurement runs in its own process, so that running out of memory ends only that measurement.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "against_peft"))

from cells import RANK, SHAPES, Cell  # noqa: E402

MODEL = json.loads((HERE / "models/llama-3.1-8b/config.json").read_text())
SHAPES["8b"] = MODEL | {"architectures": ["LlamaForCausalLM"], "head_dim": 128}
STEPS, ROUNDS = 3, 5
CHECKS = {
    f"{method} {dtype}{' packed' * packed}": (method, dtype, packed)
    for method, dtype in (("lora", "float32"), ("lora", "bfloat16"), ("qlora", "bfloat16"))
    for packed in (False, True)
}
KERNELS = {"splash": "tpu", "cudnn": "gpu", "triton": "gpu"}  # attention implementations of a single platform
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of the norm of a difference, relative to the norm


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured train step.

    Attributes:
        method: "lora" or "qlora".
        length: Positions of the one sequence.
        packed: Whether it holds several documents.
        attention: A choice of `model.attention`.
        remat: A choice of `model.remat`.
        shape: A key of SHAPES.
    """

    method: str
    length: int
    packed: bool
    attention: str
    remat: str
    shape: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.length}{'-packed' * self.packed}-{self.attention}-{self.remat}"

    @property
    def flops(self) -> float:
        return Cell("step", self.shape, self.method, "bfloat16", 1, self.length).flops()


def attention_forms(platform: str) -> list[str]:
    """The attention implementations that this version of peftjax has for a platform."""
    from peftjax.tasks.model import ModelSection

    choices = {field.name: field for field in dataclasses.fields(ModelSection)}["attention"].metadata["field"].choices
    return [form for form in choices if KERNELS.get(form, platform) == platform]


def runs(shape: str, lengths: tuple[int, ...], forms: list[str], words: list[str]) -> list[Run]:
    """The steps to measure."""
    made = itertools.product(("lora", "qlora"), lengths, (False, True), forms, ("none", "block"))
    found = [Run(*one, shape) for one in made]
    return [
        one for one in found if not words or any(all(w in one.name.split("-") for w in text.split()) for text in words)
    ]


def make_config(directory: str, method: str, length: int, **fields: Any) -> Any:
    import peftjax
    from peftjax.training import config as configs

    own = {
        "model.path": directory, "model.dtype": "bfloat16", "model.quantize": "nf4" if method == "qlora" else "",
        "data.max_length": length, "train.batch_size": 1, "method.targets": "all-linear", "method.rank": RANK,
    }  # fmt: skip
    return configs.changed(configs.Config(method=peftjax.Lora()), own | fields)


def run_config(run: Run, directory: str) -> Any:
    fields = {
        "model.init": "random",
        "model.attention": run.attention,
        "model.remat": run.remat,
        "data.pack": run.packed,
    }
    return make_config(directory, run.method, run.length, **fields)


# What the child processes do. Each returns what the parent prints.


def child_device(tiny: bool) -> dict[str, Any]:
    """The device, the rate of a product, and the bandwidths of a copy and of decoding NF4."""
    import jax
    import jax.numpy as jnp

    from peftjax.quant import nf4

    size = 256 if tiny else 8192
    a = jnp.ones((size, size), jnp.bfloat16)
    kernel = jax.jit(nf4.quantize)(jax.random.normal(jax.random.key(0), (size // 2, size), jnp.bfloat16))
    stored = sum(
        leaf.size * (0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize) for leaf in jax.tree.leaves(kernel)
    )
    device = jax.devices()[0]
    multiplied = _seconds(jax.jit(lambda a: jnp.matmul(a, a)), a)
    copied = _seconds(jax.jit(lambda a: a + 1), jnp.ones((16, size, size), jnp.bfloat16))
    decoded = _seconds(jax.jit(lambda kernel: kernel.astype(jnp.bfloat16)), kernel)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit", 0),
        "product_flops_per_second": 2 * size**3 / multiplied,
        "copy_bytes_per_second": 2 * 2 * 16 * size**2 / copied,
        "nf4_bytes_per_second": (stored + 2 * size**2 / 2) / decoded,
    }


def _seconds(function: Callable[[Any], Any], argument: Any) -> float:
    """The shortest time of a call, averaged over ten calls that are dispatched together."""
    import jax

    jax.block_until_ready(function(argument))
    found = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready([function(argument) for _ in range(10)])
        found.append((time.perf_counter() - started) / 10)
    return min(found)


def child_gradients(folder: str, attention: str) -> dict[str, Any]:
    """Write losses, logits and gradients with one attention implementation to files; returns the errors by case."""
    import numpy as np

    errors = {}
    for name, (method, dtype, packed) in CHECKS.items():
        try:
            np.savez(Path(folder, f"{name}.npz"), **_gradients(method, dtype, attention, packed))
        except Exception as error:  # of one case; the others still count
            errors[name] = str(error).splitlines()[0][:160]
    return errors


def _gradients(method: str, dtype: str, attention: str, packed: bool) -> dict[str, Any]:
    """The loss, the logits and the gradients of the bundled model with a random LoRA."""
    import jax
    import numpy as np
    from train_step import Step

    from peftjax.core import variables
    from peftjax.training.step import accumulate

    jax.config.update("jax_default_matmul_precision", "highest")  # float32 products on tensor cores would round to TF32
    fields = {"model.dtype": dtype, "model.attention": attention, "data.pack": packed, "train.batch_size": 2}
    step = Step(make_config("embedded", method, 128, **fields))
    random = np.random.default_rng(0)
    trainable = dict(step.state.trainable)
    for path in sorted(path for path, leaf in trainable.items() if isinstance(leaf, jax.Array)):
        leaf = trainable[path]
        trainable[path] = jax.device_put((0.05 * random.standard_normal(leaf.shape)).astype(leaf.dtype), leaf.sharding)
    state = step.state._replace(trainable=trainable)
    gradients, totals = jax.jit(functools.partial(accumulate, step.objective))(state, step.frozen, step.batch)
    variables.update(step.model, trainable)
    places = {name: step.batch[name][0] for name in ("positions", "segments") if packed}
    logits = step.model(step.batch["tokens"][0], **places).astype("float32")
    named = {f"gradient {path}": leaf for path, leaf in gradients.items() if isinstance(leaf, jax.Array)}
    return {"loss": totals.loss, "logits": logits, **named}


def child_step(directory: str, rounds: int, **fields: Any) -> dict[str, Any]:
    """The time and the memory of a train step."""
    import jax
    from train_step import Step

    from peftjax.core.memory import peak_memory

    step = Step(run_config(Run(**fields), directory))
    started = time.perf_counter()
    step.run()
    first = time.perf_counter() - started
    step.run()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        loss = step.run(STEPS)
        seconds.append((time.perf_counter() - started) / STEPS)
    peak = peak_memory() if jax.devices()[0].platform != "cpu" else 0  # on a CPU: of the whole process
    return {"seconds": seconds, "first": first, "loss": loss, "peak": peak, "compiled": step.compiled_bytes()}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "device": child_device,
    "gradients": child_gradients,
    "step": child_step,
}


def ask(child: str, /, *, platform: str = "", python: str = sys.executable, **arguments: Any) -> dict[str, Any]:
    """The answer of a child process, or its last line as "error"."""
    paths = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    environment |= {"JAX_PLATFORMS": platform} if platform else {}
    script = HERE / ("accelerator_torch.py" if child == "torch" else "accelerator.py")
    command = [python, str(script), f"--child={child}", json.dumps(arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    memory = re.search(r"RESOURCE_EXHAUSTED|OutOfMemory|out of memory", ended.stderr)
    last = (ended.stderr.strip().splitlines() or [f"ended with code {ended.returncode}"])[-1]
    return {"error": "out of memory" if memory else last[:160]}


# What the parent does.


def check(folder: Path, forms: list[str]) -> list[dict[str, Any]]:
    """Compare the device's losses, logits and gradients with the CPU's, for each dtype, method and attention implementation."""
    import numpy as np

    def ran(attention: str, where: str, platform: str = "") -> dict[str, str]:
        (folder / where).mkdir(exist_ok=True)
        answer = ask("gradients", platform=platform, folder=str(folder / where), attention=attention)
        return dict.fromkeys(CHECKS, answer["error"]) if "error" in answer else answer

    found = []
    unexpected = ran("xla", "cpu", "cpu")
    for attention in forms:
        errors = unexpected | ran(attention, "device")
        for name, (method, dtype, packed) in CHECKS.items():
            case = {"method": method, "dtype": dtype, "packed": packed, "attention": attention}
            if name in errors:
                found.append(case | {"error": errors[name]})
                continue
            expected, given = (np.load(folder / where / f"{name}.npz") for where in ("cpu", "device"))
            differences = {
                kind: max(_difference(given[key], expected[key]) for key in expected if key.startswith(kind))
                for kind in ("loss", "logits", "gradient")
            }
            found.append(case | differences | {"equal": max(differences.values()) < TOLERANCE[dtype]})
    return found


def _difference(given: Any, expected: Any) -> float:
    import numpy as np

    return float(np.linalg.norm(given - expected) / np.linalg.norm(expected))


def planned(run: Run, directory: str, kind: str) -> int | None:
    """The bytes that `peftjax plan` reports for a step on this kind of device; None if it is unknown or cannot compile."""
    from peftjax.core.errors import UserError
    from peftjax.plan import devices, worker
    from peftjax.plan.chips import CHIPS

    flat = kind.lower().replace(" ", "")
    names = ["cpu"] if kind == "cpu" else [name for name in CHIPS if all(part in flat for part in name.split("-"))]
    if not names or devices.find(names[0]).missing():
        return None
    try:
        return worker.ask(run_config(run, directory), SHAPES[run.shape], devices.find(names[0]), advise=False).needed
    except UserError:
        return None


def measure(run: Run, directory: str, device: dict[str, Any], python: str, rounds: int) -> dict[str, Any]:
    """Measure a step with peftjax, plan it, and measure it with PEFT if it is unpacked and uses "xla"."""
    from peftjax.core.errors import UserError

    try:
        run_config(run, directory)
    except UserError as error:
        return {"error": str(error)}
    found = ask("step", directory=directory, rounds=rounds, **dataclasses.asdict(run))
    if "error" not in found:
        found["planned"] = planned(run, directory, device["device"])
    if python and not run.packed and run.attention == "xla":
        step: dict[str, Any] = {"method": run.method, "length": run.length, "remat": run.remat, "rounds": rounds}
        found["torch"] = ask("torch", python=python, sizes=SHAPES[run.shape], **step)
    return found


def show(console: Any, results: dict[str, Any]) -> None:
    from rich.table import Table

    device = results["device"]
    product, copy = device["product_flops_per_second"], device["copy_bytes_per_second"]
    console.print(
        f"{device['device']}: bfloat16 product {product / 1e12:.3g} TFLOP/s; copy {copy / 1e9:.4g} GB/s; decoding NF4 "
        f"{device['nf4_bytes_per_second'] / 1e9:.4g} GB/s, {device['nf4_bytes_per_second'] / copy:.0%} of the copy"
    )
    table = Table("against the CPU", "packed", "attention", "loss", "logits", "gradients", "")
    for case in results["check"]:
        cells = [f"{case[kind]:.1e}" for kind in ("loss", "logits", "gradient")] if "error" not in case else [""] * 3
        verdict = case.get("error") or ("equal" if case["equal"] else "DIFFERENT")
        table.add_row(f"{case['method']} {case['dtype']}", str(case["packed"]), case["attention"], *cells, verdict)
    console.print(table)
    table = Table(
        "step", "tokens/s", "TFLOP/s", "of product", "peak GiB", "plan GiB", "first s", "PEFT tokens/s", "PEFT GiB"
    )
    for name, found in results["steps"].items():
        table.add_row(name, *_cells(found, product))
    console.print(table)


def _cells(found: dict[str, Any], product: float) -> list[str]:
    theirs = found.get("torch", {})
    if "seconds" in theirs:
        peer = [f"{found['length'] / statistics.median(theirs['seconds']):,.0f}", f"{theirs['peak'] / 2**30:.1f}"]
    else:
        peer = [theirs.get("error", ""), ""]
    if "error" in found:
        return [found["error"], "", "", "", "", "", *peer]
    seconds = statistics.median(found["seconds"])
    rate, peak = found["flops"] / seconds, found["peak"] or found["compiled"]
    plan = f"{found['planned'] / 2**30:.1f}" if found.get("planned") else ""
    figures = [
        f"{found['length'] / seconds:,.0f}",
        f"{rate / 1e12:.3g}",
        f"{rate / product:.0%}",
        f"{peak / 2**30:.1f}",
    ]
    return [*figures, plan, f"{found['first']:.0f}", *peer]


def main() -> None:
    if sys.argv[1:2] and sys.argv[1].startswith("--child="):
        answer = CHILDREN[sys.argv[1].removeprefix("--child=")](**json.loads(sys.argv[2]))
        print(json.dumps(answer))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help='Steps to measure, by words of their names: "qlora 4096 packed"')
    parser.add_argument("--tiny", action="store_true", help="Measure tiny shapes, to test this script")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="Python interpreter with torch and peft; empty: no comparison"
    )
    parser.add_argument("--json", type=Path, help="File for all figures; figures of other steps in it are kept")
    options = parser.parse_args()
    from rich.console import Console
    from train_step import model_directory

    probe = [options.torch_python, "-c", "import peft, torch"]
    peer = bool(options.torch_python) and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    shape, lengths = ("tiny", (128,)) if options.tiny else ("8b", (2048, 4096))
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 150)
    before = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        directory = str(model_directory(Path(folder, "model"), SHAPES[shape]))
        device = ask("device", tiny=options.tiny)
        if "error" in device:
            sys.exit(f"the device cannot be measured: {device['error']}")
        chosen = runs(shape, lengths, attention_forms(device["platform"]), options.words)
        checked = check(Path(folder), list(dict.fromkeys(run.attention for run in chosen)))
        results = {"device": device, "versions": versions(), "check": checked, "steps": before.get("steps", {})}
        for run in chosen:
            found = measure(run, directory, device, options.torch_python if peer else "", 1 if options.tiny else ROUNDS)
            results["steps"][run.name] = found | {"length": run.length, "flops": run.flops}
            done = found.get("error") or f"{statistics.median(found['seconds']):.3g} s"
            console.print(f"{run.name}: {done}")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    show(console, results)
    if different := [case for case in results["check"] if not case.get("equal", True)]:
        sys.exit(f"{len(different)} of {len(results['check'])} checks differ from the CPU")


def versions() -> dict[str, str]:
    names = ("peftjax", "jax", "jaxlib", "flax", "jax-cuda13-plugin", "torch", "peft", "transformers", "bitsandbytes")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
