"""Real runs of the commands in processes of their own: to start, to watch, to kill, and to compare."""

import contextlib
import itertools
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from peftjax.io.checkpoint import Checkpoints
from peftjax.log import is_speed, read_metrics
from tests import tiny
from tests.forks import Fork

STEPS, EVERY, EVAL_EVERY = 40, 10, 20
PATIENCE = 900  # seconds until a process is taken to hang; a busy machine is slow

CONFIG = """
from peftjax.core.config import defaults
from peftjax.methods import make_config

def get_config():
    config = defaults()
    config.model.path, config.model.init = "{root}/model", "random"
    config.method = make_config("lora", rank=4, dropout=0.1)
    config.data.train, config.data.eval = ("{root}/train.jsonl",), ("{root}/eval.jsonl",)
    config.data.format, config.data.max_length, config.data.pack = "completion", 64, True
    config.optim.learning_rate, config.optim.warmup_steps = 1e-2, 5
    config.train.steps, config.train.batch_size, config.train.accumulate = {steps}, 8, 2
    config.train.log_every, config.train.eval_every = 1, {eval_every}
    config.eval.exact_match, config.eval.max_new_tokens = 2, 4
    config.checkpoint.every = {every}
    return config
"""


def make_world(root: Path) -> Path:
    """A folder with a tiny model (its config and tokenizer, no weights), data, and a config file."""
    (root / "model").mkdir()
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(root / "model" / "tokenizer.json"))
    (root / "model" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "pad_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    model = tiny.CONFIG | {"vocab_size": len(letters) + 1, "architectures": ["LlamaForCausalLM"]}
    (root / "model" / "config.json").write_text(json.dumps(model))
    for name, numbers in (("train", range(200)), ("eval", range(200, 210))):
        records = [{"prompt": f"{n} and {n + 1} ", "completion": f"make {2 * n + 1}."} for n in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "config.py").write_text(CONFIG.format(root=root, steps=STEPS, every=EVERY, eval_every=EVAL_EVERY))
    return root


Child = subprocess.Popen[str] | Fork

USERS = "--xla_force_host_platform_device_count=1"  # compile as users do
# As these tests do (see tests/conftest.py), in a third of the time. Both sides of a comparison of bits have the same flags.
QUICK = re.sub(r"--xla_force_host_platform_device_count=\d+", USERS, os.environ["XLA_FLAGS"])


def start(world: Path, workdir: Path, *overrides: str, flags: str = QUICK) -> subprocess.Popen[str]:
    """`python -m peftjax.train` in a new process, as users start it. Only where that is the point: see `fork`."""
    return subprocess.Popen(
        [sys.executable, "-m", "peftjax.train", *arguments(world, workdir), *overrides],
        env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def fork(
    world: Path, workdir: Path, *overrides: str, command: str = "train", flags: str = QUICK, devices: int = 1
) -> Fork:
    """The command in a forked process: as `start`, but in a third of the time. Its bits are the same."""
    flags = flags.replace(USERS, f"--xla_force_host_platform_device_count={devices}")
    return Fork(command, [*arguments(world, workdir), *overrides], {"XLA_FLAGS": flags})


def start_together(
    world: Path,
    workdir: Path,
    count: int,
    *overrides: str,
    command: str = "train",
    flags: str = QUICK,
    of_last: Sequence[str] = (),
) -> list[Fork]:
    """The command as so many forked processes, each with one device; the last one has the overrides `of_last` as well."""
    place = f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}"
    return [
        fork(world, workdir, *overrides, *place, f"--process_id={index}", *own, command=command, flags=flags)
        for index, own in enumerate([()] * (count - 1) + [tuple(of_last)])
    ]


def free_port() -> int:
    """A free port below the ephemeral range, from which the system could give it to a connection before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as taken, contextlib.suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port


def in_process(command: str, *arguments: str) -> int:
    """Run a command in this process, as `python -m peftjax.COMMAND` does; returns its exit code."""
    given, names = sys.argv, [f"peftjax.{command}", f"peftjax.{command}.__main__"]
    sys.argv = [command, *arguments]
    imported = {name: sys.modules.pop(name) for name in names if name in sys.modules}  # of which runpy would warn
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(names[0], run_name="__main__")
    finally:
        sys.argv = given
        sys.modules |= imported
    return int(stop.value.code or 0)


def arguments(world: Path, workdir: Path) -> list[str]:
    return [f"--config={world / 'config.py'}", f"--workdir={workdir}"]


def ended(*children: Child) -> list[tuple[int, str]]:
    """How each command ended by itself, and all that it said."""
    try:
        outputs = [child.communicate(timeout=PATIENCE)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def finish(child: Child) -> str:
    """All that the command says, when it has ended by itself and well."""
    ((code, output),) = ended(child)
    assert code == 0, output
    return output


def wait_until(seen: Callable[[], bool], *children: Child) -> None:
    """Returns as soon as something is seen. Looked for all the time: what is to be hit lasts a few milliseconds."""
    deadline = time.monotonic() + PATIENCE
    for count in itertools.count():
        if seen():
            return
        for child in children if count % 100 == 0 else ():  # asking takes longer than looking
            assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill_when(child: Child, seen: Callable[[], bool]) -> None:
    """SIGKILL as soon as something is seen."""
    with child:
        try:
            wait_until(seen, child)
        finally:
            child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def logged(workdir: Path, step: int, kind: str = "train") -> Callable[[], bool]:
    path, text = workdir / "metrics.jsonl", f'"step": {step}, "kind": "{kind}"'
    size, found = -1, False

    def seen() -> bool:
        nonlocal size, found
        with contextlib.suppress(FileNotFoundError):
            before, size = size, path.stat().st_size
            found = found or (size != before and text in path.read_text())  # read only when it has grown
        return found

    return seen


def checkpoints(workdir: Path) -> set[str]:
    """The complete ones."""
    return {path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()}


def is_measured(name: str) -> bool:
    """Whether a field differs between two runs of the same config. All others are bit-identical, also after a resume."""
    return name in ("seconds", "peak_memory_bytes") or is_speed(name)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not is_measured(name)} for line in lines]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def last_arrays(workdir: Path) -> dict[str, bytes]:
    """The arrays of the newest checkpoint, as bytes."""
    step = max(map(int, checkpoints(workdir)))
    record = json.loads((workdir / "checkpoints" / str(step) / "about" / "metadata").read_text())["content"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(text: str) -> jax.ShapeDtypeStruct:
        dtype, sizes = text.rstrip("]").split("[")
        return jax.ShapeDtypeStruct([int(size) for size in re.findall(r"\d+", sizes)], jnp.dtype(dtype), sharding=place)

    with Checkpoints(workdir / "checkpoints", keep=9, keep_best=True) as saved:
        restored = saved.restore({name: abstract(text) for name, text in record["leaves"].items()})
    assert restored is not None
    assert (restored.step, restored.damaged) == (step, ())
    return {name: np.asarray(leaf).tobytes() for name, leaf in restored.state.items()}


def assert_same_run(workdir: Path, undisturbed: Path, result: str = "adapter") -> None:
    assert metrics(workdir) == metrics(undisturbed)
    assert files(workdir / result) == files(undisturbed / result)
    assert last_arrays(workdir) == last_arrays(undisturbed)
    # killed right after its last save, a run has not yet removed the checkpoint that it was to replace
    assert checkpoints(workdir) >= checkpoints(undisturbed)
    assert (workdir / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()
