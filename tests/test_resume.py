"""A run that is killed and started again ends with the bits of one that never was. Real processes, real SIGKILL."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from peftjax import methods, train
from peftjax.core import config as configs
from peftjax.io.checkpoint import Checkpoints
from peftjax.metrics import MEASURED, read_metrics
from tests import tiny

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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model (its config and tokenizer, no weights), data, and a config file."""
    root = tmp_path_factory.mktemp("world")
    (root / "model").mkdir()
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(root / "model" / "tokenizer.json"))
    (root / "model" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<eos>"}))
    model = tiny.CONFIG | {"vocab_size": len(letters) + 1, "architectures": ["LlamaForCausalLM"]}
    (root / "model" / "config.json").write_text(json.dumps(model))
    for name, numbers in (("train", range(200)), ("eval", range(200, 210))):
        records = [{"prompt": f"{n} and {n + 1} ", "completion": f"make {2 * n + 1}."} for n in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "config.py").write_text(CONFIG.format(root=root, steps=STEPS, every=EVERY, eval_every=EVAL_EVERY))
    return root


def start(world: Path, workdir: Path, *overrides: str, devices: int = 1) -> subprocess.Popen[str]:
    """The command, always the same for the same workdir."""
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, "-m", "peftjax.train", *arguments(world, workdir), *overrides],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def arguments(world: Path, workdir: Path) -> list[str]:
    return [f"--config={world / 'config.py'}", f"--workdir={workdir}"]


def finish(child: subprocess.Popen[str]) -> str:
    """All that the command says, when it has ended by itself."""
    with child:
        try:
            output, _ = child.communicate(timeout=PATIENCE)
        finally:
            child.kill()
    assert child.returncode == 0, output
    return output


def kill_when(child: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """SIGKILL as soon as something is seen. Looked for all the time: what is to be hit lasts a few milliseconds."""
    deadline = time.monotonic() + PATIENCE
    with child:
        try:
            while not seen():
                assert child.poll() is None, child.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def logged(workdir: Path, step: int, kind: str = "train") -> Callable[[], bool]:
    path, text = workdir / "metrics.jsonl", f'"step": {step}, "kind": "{kind}"'
    return lambda: path.exists() and text in path.read_text()


def checkpoints(workdir: Path) -> set[str]:
    """The complete ones."""
    return {path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()}


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def last_arrays(workdir: Path) -> dict[str, bytes]:
    """The arrays of the newest checkpoint, as bytes."""
    record = json.loads((workdir / "checkpoints" / str(STEPS) / "about" / "metadata").read_text())["content"]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def abstract(text: str) -> jax.ShapeDtypeStruct:
        dtype, sizes = text.rstrip("]").split("[")
        return jax.ShapeDtypeStruct([int(size) for size in re.findall(r"\d+", sizes)], jnp.dtype(dtype), sharding=place)

    with Checkpoints(workdir / "checkpoints", keep=9, keep_best=True) as saved:
        restored = saved.restore({name: abstract(text) for name, text in record["leaves"].items()})
    assert restored is not None
    assert (restored.step, restored.damaged) == (STEPS, ())
    return {name: np.asarray(leaf).tobytes() for name, leaf in restored.state.items()}


def assert_same_run(workdir: Path, undisturbed: Path, result: str = "adapter") -> None:
    assert metrics(workdir) == metrics(undisturbed)
    assert files(workdir / result) == files(undisturbed / result)
    assert last_arrays(workdir) == last_arrays(undisturbed)
    # killed right after its last save, a run has not yet removed the checkpoint that it was to replace
    assert checkpoints(workdir) >= checkpoints(undisturbed)
    assert (workdir / "config.json").read_bytes() == (undisturbed / "config.json").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Path:
    """The workdir of a run that nothing happened to."""
    workdir = world / "undisturbed"
    finish(start(world, workdir))
    return workdir


def test_the_undisturbed_run_learns_and_is_logged_at_every_step(undisturbed: Path) -> None:
    lines = metrics(undisturbed)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 20, 40]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]


def test_a_run_killed_again_and_again_ends_with_the_bits_of_one_that_never_was(world: Path, undisturbed: Path) -> None:
    workdir = world / "killed"

    kill_when(start(world, workdir), logged(workdir, 3))  # before the first checkpoint
    assert checkpoints(workdir) == set()

    between = logged(workdir, EVERY + 2)
    kill_when(start(world, workdir), lambda: between() and checkpoints(workdir) == {str(EVERY)})
    assert checkpoints(workdir) == {str(EVERY)}

    unfinished = workdir / "checkpoints" / f"{3 * EVERY}.orbax-checkpoint-tmp"
    kill_when(start(world, workdir), unfinished.exists)  # in the middle of a save
    assert unfinished.exists()
    assert str(3 * EVERY) not in checkpoints(workdir)

    last = workdir / "checkpoints" / str(STEPS)
    kill_when(start(world, workdir), last.exists)  # all is saved, and the adapter not yet written

    output = finish(start(world, workdir))
    assert f"going on after step {STEPS} of {STEPS}" in output
    assert_same_run(workdir, undisturbed)


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_with_the_same_bits(
    world: Path, undisturbed: Path
) -> None:
    workdir = Path(shutil.copytree(undisturbed, world / "damaged"))
    shutil.rmtree(workdir / "adapter")
    data = (workdir / "checkpoints" / str(STEPS)).rglob("d/*")
    os.truncate(largest := max(data, key=lambda path: path.stat().st_size), largest.stat().st_size // 2)
    output = finish(start(world, workdir))
    assert re.search(rf"checkpoint {STEPS} is damaged \(.+\); going back to checkpoint {STEPS - EVERY}\n", output)
    assert_same_run(workdir, undisturbed)


def refused(world: Path, workdir: Path, *overrides: str) -> str:
    """What the command, in this process, says when it refuses."""
    before = files(workdir)
    config = configs.load(world / "config.py", overrides, method_defaults=methods.method_defaults)
    with pytest.raises(ValueError, match="holds a run with another configuration") as caught:
        train.train(config, workdir)
    assert files(workdir) == before
    return str(caught.value)


def test_another_config_is_refused_and_names_what_differs(world: Path, undisturbed: Path) -> None:
    message = refused(world, undisturbed, "--config.optim.learning_rate=0.02", "--config.data.pack=false")
    assert "optim.learning_rate: 0.02 here, 0.01 there" in message
    assert "data.pack: False here, True there" in message


def test_another_method_is_refused_by_its_fields_and_not_by_its_shapes(world: Path, undisturbed: Path) -> None:
    assert "method.rank: 8 here, 4 there" in refused(world, undisturbed, "--config.method.rank=8")
    message = refused(world, undisturbed, "--config.method.name=full")
    assert "method.name: 'full' here, 'lora' there" in message


def test_another_base_under_the_same_name_is_refused(world: Path, undisturbed: Path) -> None:
    file = world / "model" / "config.json"
    original = file.read_text()
    file.write_text(json.dumps(json.loads(original) | {"initializer_range": 0.3}))  # other weights, same shapes
    try:
        message = refused(world, undisturbed)
    finally:
        file.write_text(original)
    assert re.search(r"the base model's weights: fingerprint [0-9a-f]{16} here, [0-9a-f]{16} there", message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "devices", "result"),
    [
        (("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.optim.name=lion"), 4, "adapter"),
        (("--config.method.name=full", "--config.optim.name=adafactor", "--config.data.workers=2"), 1, "model"),
    ],
)
def test_other_ways_to_train_resume_exactly_too(
    world: Path, tmp_path: Path, overrides: tuple[str, ...], devices: int, result: str
) -> None:
    finish(start(world, tmp_path / "undisturbed", *overrides, devices=devices))
    workdir = tmp_path / "killed"
    kill_when(start(world, workdir, *overrides, devices=devices), logged(workdir, EVERY + 4))
    kill_when(start(world, workdir, *overrides, devices=devices), logged(workdir, 3 * EVERY))  # as a save begins
    finish(start(world, workdir, *overrides, devices=devices))
    assert_same_run(workdir, tmp_path / "undisturbed", result)
