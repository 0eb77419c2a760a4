"""Several real processes that train together: one run, whatever their number; and what becomes of it when one goes."""

import contextlib
import functools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from peftjax.core.workdir import MARK
from tests.runs import (
    assert_same_run,
    ended,
    finish,
    fork,
    logged,
    make_world,
    metrics,
    start_together,
    wait_until,
)

pytestmark = pytest.mark.slow

SHORT = ("--config.train.steps=8", "--config.train.eval_every=4", "--config.checkpoint.every=4")
MESHES = {2: ("--config.mesh.fsdp=2",), 4: ("--config.mesh.fsdp=2", "--config.mesh.sequence=2")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The workdir of a run of one process on one device."""
    finish(fork(world, world / "alone", *SHORT))
    return world / "alone"


class Together(NamedTuple):
    """An undisturbed run of several processes: its workdir, what they printed, and its seconds once all were connected."""

    workdir: Path
    outputs: list[str]
    life: float


@pytest.fixture(scope="module")
def together(world: Path) -> Callable[[int], Together]:
    @functools.cache
    def run(count: int) -> Together:
        workdir = world / f"together-{count}"
        children = start_together(world, workdir, count, *SHORT, *MESHES[count])
        wait_until((workdir / MARK).exists, *children)
        began = time.monotonic()
        outputs = assert_all_well(children)
        return Together(workdir, outputs, time.monotonic() - began)

    return run


def assert_same_numbers(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(line["step"], line["kind"]) for line in found] == [(line["step"], line["kind"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        numbers, others = ({name: value for name, value in each.items() if name != "kind"} for each in (line, other))
        assert numbers == pytest.approx(others, rel=2e-4)


def assert_all_well(children: list[subprocess.Popen[str]]) -> list[str]:
    results = ended(*children)
    assert [code for code, _ in results] == [0] * len(children), results
    return [output for _, output in results]


@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_together_as_one_would_alone(
    together: Callable[[int], Together], alone: Path, count: int
) -> None:
    workdir, outputs, _ = together(count)
    assert_same_numbers(metrics(workdir), metrics(alone))
    assert "step 8/8" in outputs[0]
    assert not any("step " in output for output in outputs[1:])  # one of them logs
    names = [[path.name.split(".")[0] for path in sorted(place.iterdir())] for place in (workdir, alone)]
    assert names[0] == names[1]
    mine, theirs = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (workdir, alone))
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_processes_compile_the_programs_of_several_lengths_ahead(world: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"{n} ", "completion": "x" * (5 if n % 12 else 40)} for n in range(200)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = (*SHORT, f"--config.data.train={tmp_path}/train.jsonl", "--config.data.pack=False")
    finish(fork(world, tmp_path / "one", *options))
    outputs = assert_all_well(start_together(world, tmp_path / "two", 2, *options, *MESHES[2]))
    assert "the first 8 batches to 32 or 64" in outputs[0]
    assert_same_numbers(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


def test_processes_prepare_a_dataset_at_once_and_evaluate_together(world: Path, tmp_path: Path) -> None:
    options = (
        "--config.model.path=embedded", "--config.model.init=pretrained", f"--config.data.tfds_data_dir={tmp_path / 'tfds'}",
        "--config.data.train=tfds:rewrite_dates/train", "--config.data.eval=tfds:rewrite_dates/test[:16]",
        "--config.train.steps=2", "--config.optim.warmup_steps=0", "--config.train.eval_every=0", "--config.mesh.data=2",
    )  # fmt: skip
    assert_all_well(start_together(world, tmp_path / "run", 2, *options))
    assert_all_well(start_together(world, tmp_path / "run", 2, *options, command="evaluate"))
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert scores["eval_loss"] == pytest.approx(metrics(tmp_path / "run")[-1]["eval_loss"], rel=1e-5)


def test_when_one_process_is_killed_the_others_stop_and_say_so_and_the_run_can_go_on(world: Path, alone: Path) -> None:
    workdir = world / "bereft"
    for victim in (1, 0):
        children = start_together(world, workdir, 2, *SHORT, *MESHES[2])
        wait_until(logged(workdir, 2 if victim else 5), *children)
        children[victim].send_signal(signal.SIGKILL)
        results = ended(*children)
        assert results[victim][0] == -signal.SIGKILL
        code, output = results[1 - victim]
        assert code != 0
        assert "error: " in output or "another task died" in output, output
        assert not (workdir / "adapter").exists()
    assert_all_well(start_together(world, workdir, 2, *SHORT, *MESHES[2]))
    assert_same_numbers(metrics(workdir), metrics(alone))


def test_any_process_killed_at_a_random_moment_stops_the_others_and_the_run_resumes_to_the_same_bits(
    world: Path, together: Callable[[int], Together]
) -> None:
    """$PEFTJAX_KILLS: how many runs lose a process."""
    count, rng = 4, random.Random(os.environ.get("PEFTJAX_KILLS_SEED", "0"))
    undisturbed, _, life = together(count)
    for repetition in range(int(os.environ.get("PEFTJAX_KILLS", "1"))):
        workdir, victim = world / f"killed-{count}-{repetition}", rng.randrange(count)
        children = start_together(world, workdir, count, *SHORT, *MESHES[count])
        wait_until((workdir / MARK).exists, *children)
        with contextlib.suppress(subprocess.TimeoutExpired):
            children[victim].wait(rng.uniform(0, life))
        children[victim].kill()
        results = ended(*children)
        for index, (code, output) in enumerate(results):
            if index != victim and not (workdir / "report.html").exists():
                assert code not in (0, 75), results
                assert "error: " in output or "another task died" in output, output
        assert_all_well(start_together(world, workdir, count, *SHORT, *MESHES[count]))
        assert_same_run(workdir, undisturbed)


def test_when_one_process_is_preempted_or_interrupted_all_save_and_another_mesh_goes_on(
    world: Path, alone: Path
) -> None:
    workdir = world / "preempted"
    for step, number, codes in ((1, signal.SIGTERM, [75, 75]), (4, signal.SIGINT, [75, 130])):
        children = start_together(world, workdir, 2, *SHORT, *MESHES[2])
        wait_until(logged(workdir, step), *children)
        children[1].send_signal(number)
        results = ended(*children)
        assert [code for code, _ in results] == codes, results
        assert "and the position in the data; run the same command to resume" in results[0][1]
    other = ("--config.mesh.data=2", "--config.mesh.tensor=2")
    assert "resuming after step" in finish(fork(world, workdir, *SHORT, *other, devices=4))
    assert_same_numbers(metrics(workdir), metrics(alone))


def test_a_mistake_ends_every_process_with_2(world: Path, tmp_path: Path) -> None:
    results = ended(*start_together(world, tmp_path / "run", 2, *SHORT))
    assert [code for code, _ in results] == [2, 2]
    assert "uses 1 of the 2 devices of 2 processes, but all must take part" in results[0][1]
    assert not list(tmp_path.iterdir())


def test_processes_with_other_configs_or_other_records_are_refused(world: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "0.jsonl", tmp_path / "1.jsonl"  # stand for one path, whose files differ between hosts
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    here.write_text("".join(lines))
    there.write_text("".join(lines[:150]))
    for own, message in (
        ("--config.optim.learning_rate=0.002", "process 0 (there) differ: optim.learning_rate: 0.002 here, 0.01 there"),
        (f"--config.data.train={there}", f"data.train: ('{there}',) here, ('{here}',) there"),
    ):
        options = (*SHORT, *MESHES[2], f"--config.data.train={here}")
        results = ended(*start_together(world, tmp_path / "run", 2, *options, of_last=(own,)))
        assert [code for code, _ in results] == [2, 2], results
        assert all(message in output for _, output in results), results
    assert not (tmp_path / "run").exists()
