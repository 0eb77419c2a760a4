"""A run that is killed and started again ends with the bits of one that never was. Real processes, real SIGKILL."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from peftjax.train import train
from peftjax.training import config as configs
from tests.runs import (
    EVERY,
    STEPS,
    USERS,
    assert_same_run,
    checkpoints,
    ended,
    files,
    finish,
    fork,
    kill_when,
    logged,
    make_world,
    metrics,
    start,
    wait_until,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


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

    kill_when(fork(world, workdir), logged(workdir, 3))  # before the first checkpoint
    assert checkpoints(workdir) == set()

    between = logged(workdir, EVERY + 2)
    kill_when(fork(world, workdir), lambda: between() and checkpoints(workdir) == {str(EVERY)})
    assert checkpoints(workdir) == {str(EVERY)}

    unfinished = workdir / "checkpoints" / f"{3 * EVERY}.orbax-checkpoint-tmp"
    kill_when(fork(world, workdir), unfinished.exists)  # in the middle of a save
    assert unfinished.exists()
    assert str(3 * EVERY) not in checkpoints(workdir)

    last = workdir / "checkpoints" / str(STEPS)
    kill_when(fork(world, workdir), last.exists)  # all is saved, and the adapter not yet written

    output = finish(fork(world, workdir))
    assert f"resuming after step {STEPS} of {STEPS}" in output
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_a_run_preempted_interrupted_and_interrupted_twice_saves_says_so_and_ends_with_the_same_bits(
    world: Path, undisturbed: Path
) -> None:
    workdir = world / "stopped"
    child = start(world, workdir)
    wait_until(logged(workdir, 3), child)
    for number in (signal.SIGTERM, signal.SIGTERM):  # an impatient scheduler
        child.send_signal(number)
    ((code, output),) = ended(child)
    assert code == 75, output
    step = int(re.search(rf"stopped by SIGTERM after step (\d+) of {STEPS}; saved the trainable parameters", output)[1])
    assert str(step) in checkpoints(workdir)
    assert metrics(workdir)[-1]["step"] == step

    child = start(world, workdir)
    wait_until(logged(workdir, 13), child)
    child.send_signal(signal.SIGINT)
    ((code, output),) = ended(child)
    assert code == 130, output
    assert f"resuming after step {step} of {STEPS}" in output
    assert "saving and stopping; press Ctrl-C again to exit at once" in output
    step = re.search(
        rf"interrupted after step (\d+) of {STEPS}; saved .* resume from {workdir}/checkpoints/(\1)\n", output
    )[1]
    assert step in checkpoints(workdir)

    child = start(world, workdir)
    unfinished = workdir / "checkpoints" / f"{3 * EVERY}.orbax-checkpoint-tmp"
    wait_until(unfinished.exists, child)
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGINT):
        child.send_signal(number)
        time.sleep(0.01)  # two signals of one kind at once are one
    ((code, output),) = ended(child)
    assert code == 130, output
    assert time.monotonic() - began < 5
    again = "interrupted again; exiting at once. The last complete checkpoint is intact"
    assert re.search(rf"{again}: {workdir}/checkpoints/({2 * EVERY}|{3 * EVERY})\n", output)
    assert "Traceback" not in output

    assert "resuming after step" in finish(fork(world, workdir))
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_still_ends_with_the_same_bits(
    world: Path, undisturbed: Path
) -> None:
    workdir = Path(shutil.copytree(undisturbed, world / "damaged"))
    shutil.rmtree(workdir / "adapter")
    data = (workdir / "checkpoints" / str(STEPS)).rglob("d/*")
    os.truncate(largest := max(data, key=lambda path: path.stat().st_size), largest.stat().st_size // 2)
    output = finish(fork(world, workdir))
    assert re.search(rf"checkpoint {STEPS} is damaged \(.+\); falling back to checkpoint {STEPS - EVERY}\n", output)
    assert_same_run(workdir, undisturbed)


def refused(world: Path, workdir: Path, *overrides: str) -> str:
    """What the command, in this process, says when it refuses."""
    before = files(workdir)
    config = configs.load(world / "config.py", overrides)
    with pytest.raises(ValueError, match="holds a run with another configuration") as caught:
        train(config, workdir)
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
    assert "method.rank" not in message  # other methods have other options


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
    ("line", "message"),
    [
        ('{"prompt": "1 and 2 ", "completion":', r"train\.jsonl:150: not valid JSON: .* at column \d+"),
        ('{"prompt": "1 and 2 "}', r"train\.jsonl:150: the record has no field 'completion'"),
    ],
)
def test_a_bad_record_in_the_middle_is_named_and_costs_no_checkpoint(
    world: Path, tmp_path: Path, line: str, message: str
) -> None:
    lines = (world / "train.jsonl").read_text().splitlines()
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join([*lines[:149], line, *lines[150:]]) + "\n")
    overrides = (
        f"--config.data.train={data}", "--config.data.eval=", "--config.data.shuffle=false", "--config.eval.exact_match=0",
        "--config.checkpoint.every=1", "--config.train.steps=12",
    )  # fmt: skip
    config = configs.load(world / "config.py", overrides)
    with pytest.raises(ValueError, match=message):  # with which the command exits with 2
        train(config, tmp_path / "run")
    last = max(map(int, checkpoints(tmp_path / "run")))
    assert 0 < last < 12
    data.write_text("\n".join(lines) + "\n")
    train(config, tmp_path / "run")
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_costs_no_checkpoint(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    disk, workdir = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("no disk of its own can be mounted here")
    try:
        child = fork(world, workdir)
        wait_until(lambda: str(EVERY) in checkpoints(workdir), child)
        with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        ((code, output),) = ended(child)
        assert code == 2, output
        assert "No space left on device" in output
        assert str(EVERY) in checkpoints(workdir)
        (disk / "filler").unlink()
        assert f"resuming after step {EVERY} of {STEPS}" in finish(fork(world, workdir))
        assert_same_run(workdir, undisturbed)
    finally:
        child.kill()
        child.wait()
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_run_killed_at_8_random_moments_ends_with_the_bits_of_one_that_never_was(world: Path, tmp_path: Path) -> None:
    often = ("--config.checkpoint.every=1", "--config.train.eval_every=0", "--config.optim.schedule=constant")
    run = partial(fork, world, flags=USERS)
    overrides = (*often, "--config.train.steps=50")
    finish(run(tmp_path / "undisturbed", *overrides))
    began = time.monotonic()
    finish(run(tmp_path / "measured", *often, "--config.train.steps=12"))  # how far a life goes at most
    life, workdir, rng = time.monotonic() - began, tmp_path / "killed", random.Random(0)
    kills = 0
    while kills < 8:
        child = run(workdir, *overrides)
        try:
            child.wait(rng.uniform(0, life))
        except subprocess.TimeoutExpired:
            kills += 1
        child.kill()
        ((code, output),) = ended(child)
        assert code in (0, -signal.SIGKILL), output
    assert "resuming after step" in finish(run(workdir, *overrides))
    assert_same_run(workdir, tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "devices", "result"),
    [
        (("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.optim.name=lion"), 4, "adapter"),
        (("--config.method.name=full", "--config.optim.name=adafactor", "--config.data.workers=2"), 1, "model"),
        (  # killed and resumed in the middle of a text, and of an epoch
            (
                "--config.data.format=text",
                "--config.data.text_field=prompt",
                "--config.data.too_long=split",
                "--config.data.max_length=5",
                "--config.data.pack=false",
                "--config.eval.exact_match=0",
            ),
            1,
            "adapter",
        ),
    ],
)
def test_other_ways_to_train_resume_exactly_too(
    world: Path, tmp_path: Path, overrides: tuple[str, ...], devices: int, result: str
) -> None:
    workdir, run = tmp_path / "killed", partial(fork, world, devices=devices)
    finish(run(tmp_path / "undisturbed", *overrides))
    kill_when(run(workdir, *overrides), logged(workdir, EVERY + 4))
    kill_when(run(workdir, *overrides), logged(workdir, 3 * EVERY))  # as a save begins
    finish(run(workdir, *overrides))
    assert_same_run(workdir, tmp_path / "undisturbed", result)
