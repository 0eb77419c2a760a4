"""As many runs of a sweep are trained side by side as fit the memory."""

from pathlib import Path
from typing import Any, cast

import jax
import pytest
from jax.sharding import Mesh

from peftjax import methods, sharding, sweep
from peftjax.core import memory
from peftjax.tasks import make_task
from peftjax.training import concurrency, precision
from peftjax.training import config as configs
from peftjax.training.abstract import abstract_step
from peftjax.training.abstract_population import abstract_population
from peftjax.training.alike import group_runs
from peftjax.training.compile_ahead import CompileAhead
from peftjax.training.setup import abstract_run, open_data
from tests.test_train import config
from tests.training.test_sweep import member


@pytest.mark.parametrize(("shared", "each", "guess"), [(0, 10, 10), (40, 10, 50), (40, 10, 1), (5, 30, 30), (99, 5, 2)])
@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_the_largest_number_that_fits_is_found_by_a_few_trials(shared: int, each: int, guess: int, most: int) -> None:
    tried: dict[int, int] = {}

    def needed(members: int) -> int:
        tried[members] = 100 + shared + members * each  # 100 for the base
        return tried[members]

    found = concurrency.largest(needed, 100, guess, most, 300)
    best = max((count for count in range(1, most + 1) if needed(count) <= 300), default=1)
    tried.clear()
    assert concurrency.largest(needed, 100, guess, most, 300) == found
    assert best - best // 8 <= found <= best
    assert len(tried) <= 5
    assert most == 1 or (tried[found] <= 300 and max(tried) <= most)


@pytest.mark.slow
def test_no_more_runs_are_trained_together_than_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, eval__exact_match=0, eval__samples=0, train__steps=1)
    made.data.eval, made.method = (), methods.make_config("lora", rank=2)
    options: list[dict[str, Any]] = [
        {"method__rank": 5}, {"method__targets": "q_proj"}, {"method__targets": "down_proj"}, {"method__alpha": 2.0},
        {"optim__name": "sgd"}, {"method__init": "pissa"},
    ]  # fmt: skip
    several = [member(made, tmp_path / "sweep", **values) for values in options]
    mesh = sharding.make_mesh()
    task, _ = open_data(several[0].config, mesh)
    resolved = [precision.resolve_dtype(one.config, task.hf_config) for one in several]
    models, _ = group_runs(resolved, lambda one: one.method, lambda one: abstract_run(one, task))
    assert [len(alike) for _, alike in models] == [5, 1]  # the structure of PiSSA differs
    with jax.set_mesh(mesh):
        largest, _, _ = concurrency.largest_step(models[0][1], task, models[0][0], mesh)
    predicted = concurrency.compiled_bytes(largest, task, models[0][0], mesh, 2)

    monkeypatch.setattr(concurrency, "free_memory", lambda devices: 2**40)
    with monkeypatch.context() as patch:
        patch.setattr(concurrency, "compiled_bytes", lambda *given: pytest.fail("a step was compiled"))
        assert concurrency.concurrent_groups(several) == [(several[:5], 5), (several[5:], 1)]
    assert "all 5 runs fit side by side: they need at most about" in capsys.readouterr().out

    taken = list[tuple[int, int]]()
    call = CompileAhead.__call__

    def measured_call(ahead: CompileAhead, *arguments: Any) -> Any:
        found = cast(Any, ahead._step).lower(*arguments).compile().memory_analysis()
        created = found.output_size_in_bytes + found.generated_code_size_in_bytes
        taken.append((len(arguments[0]), found.argument_size_in_bytes + found.temp_size_in_bytes + created))
        return call(ahead, *arguments)

    monkeypatch.setattr(CompileAhead, "__call__", measured_call)
    monkeypatch.setattr(concurrency, "free_memory", lambda devices: int((predicted + 1) / 0.8))
    sweep.sweep(several, tmp_path / "sweep")
    assert "2 of 5 runs are trained side by side: their step takes" in capsys.readouterr().out
    assert sorted(count for count, _ in taken) == [1, 1, 2, 2]
    assert 0.8 * predicted < max(size for _, size in taken) <= predicted  # without the moments


def test_on_cpus_runs_without_a_shared_base_are_trained_one_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path)
    made.method = methods.make_config("full")
    pair = [member(made, tmp_path / "sweep", optim__learning_rate=rate) for rate in (1e-3, 1e-2)]
    assert concurrency.concurrent_groups(pair) == [(pair, 1)]
    assert "the 2 runs share no base weights: they are trained one at a time" in capsys.readouterr().out
    assert concurrency.concurrent_groups(pair, 2) == [(pair, 2)]


@pytest.mark.parametrize(("count", "everyone"), [(2, "both"), (3, "all 3")])
def test_all_runs_are_trained_together_if_the_memory_is_not_known(
    count: int, everyone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(concurrency, "common_memory", lambda mesh: None)
    several = [member(config(tmp_path), tmp_path / "sweep", seed=seed) for seed in range(count)]
    assert concurrency.concurrent_groups(several) == [(several, count)]
    assert f": {everyone} runs are trained side by side" in capsys.readouterr().out


@pytest.mark.slow
def test_the_data_axis_splits_members_even_if_it_does_not_divide_their_batches(tmp_path: Path) -> None:
    made = config(tmp_path, train__batch_size=1, train__accumulate=1)
    made.method = methods.make_config("lora", rank=2)
    one = configs.validate(made)
    task = make_task(one.task, one.data, Path(one.model.path))
    model = abstract_run(one, task)

    def flops(mesh: Mesh) -> float:
        with jax.set_mesh(mesh):
            _, arguments = abstract_step(one, task, model, mesh)
            step, given = abstract_population(one, task, model, arguments, 2)
            return cast(dict[str, float], step.lower(*given).compile().cost_analysis())["flops"]

    mesh = sharding.make_mesh({"data": 2})
    assert flops(sharding.split_members(mesh, 2)) < 0.6 * flops(mesh)


def test_a_control_group_limits_the_memory(tmp_path: Path) -> None:
    groups, mounted = tmp_path / "cgroup", tmp_path / "fs"
    job = mounted / "slurm" / "job_1" / "step_0"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job.parent / "memory.max").write_text("4096\n")
    groups.write_text("0::/slurm/job_1/step_0\n")
    assert memory._group_limits(groups, mounted) == [4096]
    (mounted / "memory").mkdir()
    (mounted / "memory" / "memory.limit_in_bytes").write_text("512\n")  # a container sees only its own group
    groups.write_text("5:cpuset:/\n4:memory:/elsewhere/0db1\n0::/\n")
    assert memory._group_limits(groups, mounted) == [512]
    assert memory._group_limits(tmp_path / "no file", mounted) == []
    devices = jax.devices()
    assert 0 < (memory.free_memory(devices) or 0) <= memory.host_memory() // len(devices)
