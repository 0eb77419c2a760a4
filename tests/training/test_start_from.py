"""method.start_from: training that continues from an adapter in a directory."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax import methods, sharding, sweep
from peftjax.adapters import attached
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.io.adapter_method import read_method
from peftjax.tasks.model import ModelSection
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training import start_from
from peftjax.training.member import Member
from peftjax.training.start_from import attach_trained, with_options
from peftjax.training.trained import held_out_scores, load_trained, open_task
from tests import tiny
from tests.runs import files, last_arrays, metrics
from tests.test_train import config


def from_adapter(root: Path, path: Path, method: str = "lora", **options: Any) -> Any:
    """A config that starts from the adapter in a directory, with options of its own."""
    made = config(root, train__steps=2, eval__exact_match=0, eval__samples=0, optim__schedule="constant")
    made.method = methods.make_config(method, **options)
    made.method.start_from = str(path)
    return made


@pytest.mark.slow
def test_a_run_starts_from_an_adapter_and_resumes_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = peftjax.Lora(rank=2, alpha=4.0, targets=("v_proj", "q_proj"), dropout=0.2)
    given = peftjax.attach(peftjax.load_model(tiny.directory(tmp_path / "model")), first, rngs=nnx.Rngs(0))
    adapter = peftjax.save_adapter(tiny.randomize(given), tmp_path / "first" / "adapter", base="owner/base")

    # with a frozen A, which no checkpoint holds
    made, workdir = from_adapter(tmp_path, adapter, dropout=0.1, freeze_a=True), tmp_path / "run"
    train(configs.validate(made), workdir)
    printed = (
        f"starting from the adapter in {adapter} with a new optimizer state; targets=('v_proj', 'q_proj'), rank=2, "
    )
    assert printed + "alpha=4.0, dropout=0.1, freeze_a=True\n" in capsys.readouterr().out
    recorded = json.loads((workdir / "config.json").read_text())["method"]
    expected = {"rank": 2, "alpha": 4.0, "targets": ["v_proj", "q_proj"], "dropout": 0.1, "start_from": str(adapter)}
    assert {name: recorded[name] for name in expected} == expected
    start = next(line for line in metrics(workdir) if line["kind"] == "eval")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        one = configs.validate(made)
        task = open_task(one)
        loaded = load_trained(one, task, adapter, mesh)
        measured = held_out_scores(one, loaded, task, mesh)
    assert loaded.blocks.attention.implementation == "auto"  # long records fit the memory as they did in training
    assert start["step"] == 0
    assert start["eval_loss"] == pytest.approx(measured["eval_loss"], rel=1e-6)
    counts = {name: value for name, value in last_arrays(workdir).items() if name.endswith("count")}
    assert {int(np.frombuffer(value, np.int32)[0]) for value in counts.values()} == {2}
    card = (workdir / "adapter" / "README.md").read_text()
    assert "| Started from | `adapter` |" in card
    assert "base_model: owner/base\n" in card  # the base is a local copy

    made.train.steps = 3
    train(configs.validate(made), tmp_path / "straight")
    shutil.rmtree(adapter)
    train(configs.validate(made), workdir)
    assert "resuming after step 2 of 3" in capsys.readouterr().out
    assert last_arrays(workdir) == last_arrays(tmp_path / "straight")
    assert files(workdir / "adapter") == files(tmp_path / "straight" / "adapter")
    made.method.rank = 4
    with pytest.raises(UserError, match=r"another configuration: method\.rank: 4 here, 2 there\."):
        train(configs.validate(made), workdir)
    made.method.rank, made.method.start_from = 8, "elsewhere"
    with pytest.raises(UserError, match=r"method\.start_from: 'elsewhere' here, '.*adapter' there"):
        train(configs.validate(made), workdir)


def test_options_of_the_config_must_agree_with_the_adapter_unless_they_are_defaults(tmp_path: Path) -> None:
    model = peftjax.attach(tiny.model(), peftjax.Lora(rank=4, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
    path = peftjax.save_adapter(model, tmp_path / "adapter")

    def resolved(method: str = "lora", **options: Any) -> Any:
        return with_options(configs.validate(from_adapter(tmp_path, path, method, **options))).method

    assert resolved() == peftjax.Lora(rank=4, targets=("q_proj", "v_proj"))
    assert resolved(targets=("v_proj", "q_proj"), rank=4, lr_ratio=2.0).lr_ratio == 2.0
    with pytest.raises(
        UserError,
        match=r"method\.start_from=.*adapter holds an adapter with other options \(method\.dora: True in the config, False "
        r"in the adapter; method\.rank: 2 in the config, 4 in the adapter\); remove these options",
    ):
        resolved(rank=2, dora=True)
    with pytest.raises(UserError, match=r"holds an adapter of the method 'lora', but method\.name='ia3'; set method"):
        resolved("ia3")
    edited = json.loads((path / "adapter_config.json").read_text()) | {"lora_alpha": 0, "lora_dropout": 1.0}
    (path / "adapter_config.json").write_text(json.dumps(edited))
    with pytest.raises(
        UserError, match=r"adapter: the adapter has alpha=0\.0. It can be loaded, but not trained further"
    ):
        resolved(dropout=0.5)
    with pytest.raises(UserError, match=r"method\.dropout must be at least 0 and below 1, got 1\.0"):
        resolved(dropout=1.0)
    made = from_adapter(tmp_path, tmp_path / "adaptor")
    with pytest.raises(UserError, match="adaptor: no such directory"):
        with_options(configs.validate(made))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "method",
    [
        peftjax.Lora(rank=2, dora=True, token_indices=(3, 5), modules_to_save=("lm_head",)),
        peftjax.AdaLora(total_steps=10, init_rank=4, target_rank=2),
        peftjax.Vera(rank=4, projection_prng_key=7),
        peftjax.Miss(rank=8, variant="bat"),
        peftjax.PrefixTuning(tokens=3),
        peftjax.Houlsby(reduction_factor=4.0),
    ],
    ids=lambda method: method.method,
)
def test_an_adapter_of_any_method_has_the_values_of_the_directory(method: Any, tmp_path: Path) -> None:
    source = tiny.randomize(peftjax.attach(tiny.model(), method, rngs=nnx.Rngs(0)))
    path, model = peftjax.save_adapter(source, tmp_path / "adapter", base="owner/base"), tiny.model()
    assert attach_trained(model, method, path, nnx.Rngs(1)) == read_method(path)
    assert list(attached(model)) == ["default"]
    for given, recorded in (("embedded", "owner/base"), ("owner/copy", "owner/copy")):
        config = configs.Config(model=ModelSection(path=given))
        assert start_from.recorded_base(model, config).name == recorded
    np.testing.assert_allclose(model(tiny.tokens()), source(tiny.tokens()), rtol=1e-5, atol=1e-5)
    theirs, ours = (variables.trainable_mask(variables.flat(each)[1]) for each in (source, model))
    assert theirs == ours  # what a step trains, by path


@pytest.mark.slow
def test_a_file_of_single_experts_gives_the_options_of_all_experts(tmp_path: Path) -> None:
    """The magnitudes have the keys of a state dict that peft did not write."""
    fields = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    base = tmp_path / "moe"
    peftjax.save_model(tiny.model(**fields), base)
    method = peftjax.Lora(
        rank=2, dora=True, targets=("v_proj", "gate_up_proj", "down_proj"), rank_pattern={r"experts\.1\.w\d": 3}
    )
    source = tiny.randomize(peftjax.attach(peftjax.load_model(base), method, rngs=nnx.Rngs(0)))
    path = peftjax.save_adapter(source, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    renamed = {key.replace("magnitude_vector", "magnitude_vector.weight"): value for key, value in tensors.items()}
    save_file(renamed, path / "adapter_model.safetensors")
    made = from_adapter(tmp_path, path)
    made.model.path = str(base)
    resolved = with_options(configs.validate(made)).method
    assert dict(resolved.rank_pattern) == {r"experts\.gate_up_proj": 3, r"experts\.down_proj": 3}
    model = peftjax.load_model(base)
    assert attach_trained(model, resolved, path, nnx.Rngs(1)) == resolved
    np.testing.assert_allclose(model(tiny.tokens()), source(tiny.tokens()), atol=1e-5)


def test_parameters_that_a_directory_does_not_have_are_refused(tmp_path: Path) -> None:
    source = peftjax.attach(tiny.model(), peftjax.PrefixTuning(tokens=3), rngs=nnx.Rngs(0))
    path = peftjax.save_adapter(source, tmp_path / "adapter")
    made = from_adapter(tmp_path, path, "prefix", projection=True)
    with pytest.raises(UserError, match=r"method\.projection: True in the config, False in the adapter"):
        with_options(configs.validate(made))


def test_the_workdir_keeps_the_files_of_the_adapter_alone_and_may_be_started_from(tmp_path: Path) -> None:
    source, workdir = tmp_path / "trainer", tmp_path / "run"
    (source / "checkpoint-10").mkdir(parents=True)
    workdir.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "training_args.bin", "checkpoint-10/optimizer.pt"):
        (source / name).write_text(name)
    config = configs.Config(start_from=str(source))
    kept = {"adapter_config.json": b"adapter_config.json", "adapter_model.safetensors": b"adapter_model.safetensors"}
    for path in (source, source, workdir / start_from.KEPT):
        start_from.keep(dataclasses.replace(config, start_from=str(path)), workdir)
        assert files(workdir / start_from.KEPT) == kept
    assert [path.name for path in workdir.iterdir()] == [start_from.KEPT]


@pytest.mark.slow
def test_the_runs_of_a_sweep_start_from_an_adapter(tmp_path: Path) -> None:
    given = peftjax.attach(
        peftjax.load_model(tiny.directory(tmp_path / "model")), peftjax.Lora(rank=2), rngs=nnx.Rngs(0)
    )
    adapter = peftjax.save_adapter(tiny.randomize(given), tmp_path / "adapter")

    def make(steps: int) -> list[Member]:
        made, members = from_adapter(tmp_path, adapter), []
        made.train.steps = steps
        for rate in (1e-3, 1e-2):
            made.optim.learning_rate = rate
            values = {"optim.learning_rate": rate}
            members.append(Member(values, configs.validate(made), tmp_path / "sweep" / str(rate)))
        return members

    members = make(2)
    sweep.sweep(members, tmp_path / "sweep")
    lines = [metrics(member.workdir) for member in members]
    assert lines[0][0] == lines[1][0]  # the evaluation before the first step
    assert lines[0][-1]["eval_loss"] != lines[1][-1]["eval_loss"]
    assert all(json.loads((one.workdir / "config.json").read_text())["method"]["rank"] == 2 for one in members)
    assert sweep.finished(members[0])
    shutil.rmtree(adapter)
    sweep.sweep(make(3), tmp_path / "sweep")  # each run has kept a copy
    assert [metrics(member.workdir)[-1]["step"] for member in members] == [3, 3]
