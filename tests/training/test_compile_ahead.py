"""A thread compiles a step once for each length of its batches, and the results are the same as without the thread."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import sharding
from peftjax.core.progress import COMPILING, Progress
from peftjax.sweep import sweep
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training import population_step, run
from peftjax.training.compile_ahead import CompileAhead
from peftjax.training.hooks import Hooks
from peftjax.training.sweep_members import members
from tests import runs
from tests.test_train import config

LENGTHS = (32, 64, 96)


class Phases(Progress):
    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.seen: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.seen.append(name)
        yield


def test_a_thread_compiles_in_the_order_of_use_and_a_call_waits_for_its_own_program_only() -> None:
    traced: list[tuple[int, str]] = []
    gate, progress, mesh = threading.Event(), Phases(), sharding.make_mesh()

    @jax.jit
    def step(state: jax.Array, batch: jax.Array) -> jax.Array:
        traced.append((len(batch), threading.current_thread().name[:7]))
        if len(batch) == LENGTHS[1]:
            gate.wait(60)
        if len(batch) == LENGTHS[2]:
            raise ValueError("too long")
        return state + batch.sum()

    where = sharding.spec((), (), mesh)
    state = jax.device_put(jnp.ones(()), where)
    batches = {n: jax.device_put(jnp.ones(n), where) for n in (*LENGTHS, 128)}
    shapes = [jax.ShapeDtypeStruct((n,), jnp.float32, sharding=where) for n in (32, 64, 32, 96)]
    compiled: list[str] = []

    def note(event: str, seconds: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(threading.current_thread().name[:7])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with jax.set_mesh(mesh), CompileAhead(step, mesh, (state,), shapes, progress) as ahead:
            assert float(ahead(state, batches[32])) == 33  # while the thread waits at the gate
            assert float(ahead(state, batches[32])) == 33
            assert float(ahead(state, batches[128])) == 129  # not among the expected lengths
            gate.set()
            assert float(ahead(state, batches[64])) == 65
            with pytest.raises(ValueError, match="too long"):
                ahead(state, batches[96])
            assert sorted(traced) == [(32, "compile"), (64, "compile"), (96, "compile"), (128, "MainThr")]
            assert sorted(compiled) == ["MainThr", "compile", "compile"]
            assert progress.seen == [COMPILING] * 4
            with CompileAhead(step, mesh, (state,), shapes[:1], progress) as ahead:  # one length: no thread
                assert float(ahead(state, batches[32])) == 33
            assert len(traced) == 4
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def world(root: Path) -> Any:
    """A config whose batches have lengths of 64 and 32 tokens, with dropout."""
    made = config(
        root, train__steps=6, train__batch_size=2, train__accumulate=2, data__max_length=64, data__shuffle=False
    )
    made.data.eval, made.eval.exact_match, made.eval.samples, made.method.dropout = (), 0, 0, 0.1
    sizes = (40, 9, 5, 9, 50, 20, 7, 11, 50, 30, 60, 2)
    records = [{"prompt": "#" * size, "completion": "ab"} for size in sizes]
    (root / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def traces_of(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[tuple[int, str]]:
    """The lengths for which the step of a module is traced, and by which thread."""
    found, accumulate = [], module.accumulate

    def noted(objective: Any, state: Any, frozen: Any, batch: Any) -> Any:
        found.append((batch["tokens"].shape[-1], threading.current_thread().name[:7]))
        return accumulate(objective, state, frozen, batch)

    monkeypatch.setattr(module, "accumulate", noted)
    return found


@pytest.mark.slow
def test_a_run_that_is_stopped_and_resumed_equals_one_that_compiles_at_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = configs.validate(world(tmp_path))
    traced = traces_of(monkeypatch, sys.modules["peftjax.train"])
    with monkeypatch.context() as patched:
        patched.setattr(run, "abstract_batch", lambda *arguments: {})
        train(made, tmp_path / "at first use")
    assert traced == [(64, "MainThr"), (32, "MainThr")]

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            raise RuntimeError("enough")

    traced.clear()
    with pytest.raises(RuntimeError, match="enough"):
        train(made, tmp_path / "ahead", Hooks(on_metrics=stop))
    assert traced == [(64, "compile"), (32, "compile")]
    traced.clear()
    train(made, tmp_path / "ahead")
    assert traced == [(32, "compile"), (64, "compile")]  # of steps 4 to 6
    runs.assert_same_run(tmp_path / "ahead", tmp_path / "at first use")


@pytest.mark.slow
def test_the_step_of_a_population_is_compiled_for_the_longest_of_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path)
    made.data.shuffle = True
    (tmp_path / "config.json").write_text(configs.to_json(configs.validate(made)))
    traced = traces_of(monkeypatch, population_step)
    pair = members(str(tmp_path / "config.json"), [], ["--sweep.seed=0,1"], tmp_path / "sweep")
    found = sweep(pair, tmp_path / "sweep")
    assert all(np.isfinite(one["scores"]["loss"]) for one in found)
    assert len(traced) == len(set(traced)) > 1
    assert {thread for _, thread in traced} == {"compile"}
