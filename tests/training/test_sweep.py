"""Sweeps: many runs at once leave what each of them would have left alone."""

import contextlib
import io
import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from peftjax import methods, sharding, sweep
from peftjax.core.config import defaults
from peftjax.core.errors import NotFiniteError, UserError
from peftjax.core.terminal import make_console
from peftjax.core.workdir import MARK
from peftjax.io.checkpoint import Checkpoints
from peftjax.log import Log
from peftjax.report.data import ReportData
from peftjax.train import train
from peftjax.training import answers, population, precision, space, sweep_members, sweep_results
from peftjax.training import config as configs
from peftjax.training.halving import Halving
from peftjax.training.member import Member
from peftjax.training.run import Measured, Run
from peftjax.training.step import TrainState
from peftjax.training.sweep_table import make_table
from peftjax.training.united import United, unite_runs
from tests import runs
from tests.test_train import config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config file of the defaults, which name a Lora."""
    file = tmp_path / "config.py"
    file.write_text("from peftjax.core.config import defaults\n\n\ndef get_config():\n    return defaults()\n")
    return file


def member(made: Any, workdir: Path, **values: Any) -> Member:
    """A run with other values of some fields, `section__field`."""
    made = made.copy_and_resolve_references()
    for name, value in values.items():
        section, _, field = name.rpartition("__")
        (made[section] if section else made)[field] = value
    return Member(
        values, configs.validate(made), workdir / ",".join(f"{name}={value}" for name, value in values.items())
    )


def assert_same_run(one: Path, other: Path, result: str = "adapter/adapter_model.safetensors") -> None:
    lines, others = (runs.metrics(workdir) for workdir in (one, other))
    assert [(line.pop("step"), line.pop("kind")) for line in lines] == [
        (line.pop("step"), line.pop("kind")) for line in others
    ]
    for line, expected in zip(lines, others, strict=True):
        assert line == pytest.approx(expected, rel=2e-4)
    assert_same_result(one, other, result)


def assert_same_result(one: Path, other: Path, file: str) -> None:
    mine, theirs = load_file(one / file), load_file(other / file)
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_sweep_has_a_run_for_each_combination_of_values(file: Path, tmp_path: Path) -> None:
    fields = ("--sweep.optim.learning_rate=1e-2,1e-3", "--sweep.method.alpha=8,16")
    found = sweep_members.members(str(file), ["--config.train.steps=7"], fields, tmp_path)
    assert [one.name for one in found] == [
        f"learning_rate={rate},alpha={alpha}" for rate in (0.01, 0.001) for alpha in (8.0, 16.0)
    ]
    assert [(one.config.optim.learning_rate, one.config.method.alpha) for one in found] == [
        (1e-2, 8), (1e-2, 16), (1e-3, 8), (1e-3, 16),
    ]  # fmt: skip
    assert {one.config.train.steps for one in found} == {7}
    targets = sweep_members.members(str(file), [], ["--sweep.method.targets=('q_proj', 'v_proj');all-linear"], tmp_path)
    assert [one.config.method.targets for one in targets] == [("q_proj", "v_proj"), "all-linear"]
    assert [one.name for one in targets] == ["targets=q_proj+v_proj", "targets=all-linear"]


def test_the_directory_of_a_run_with_long_values_has_a_short_name_of_its_own(file: Path, tmp_path: Path) -> None:
    paths = [f"/{'data' * 80}/{name}.jsonl" for name in "ab"]
    found = sweep_members.members(str(file), [], [f"--sweep.data.train={','.join(paths)}"], tmp_path)
    assert len({one.name for one in found}) == 2
    for one in found:
        one.workdir.mkdir()


def test_random_search_draws_from_lists_and_ranges_and_keeps_its_draws(file: Path, tmp_path: Path) -> None:
    fields = [
        "--sweep.optim.learning_rate=loguniform(1e-5,1e-2)", "--sweep.method.rank=uniform(2,5)",
        "--sweep.method.dropout=uniform(0,0.5)", "--sweep.method.init=kaiming,gaussian",
    ]  # fmt: skip
    drawn = sweep_members.members(str(file), [], fields, tmp_path, trials=40, seed=3)
    assert len(drawn) == 40
    values = {name: [one.values[name] for one in drawn] for name in drawn[0].values}
    assert set(values["method.rank"]) == {2, 3, 4, 5}
    assert set(values["method.init"]) == {"kaiming", "gaussian"}
    rates = values["optim.learning_rate"]
    assert 1e-5 <= min(rates) < 1e-4 < 1e-3 < max(rates) <= 1e-2
    assert all(0 <= rate <= 0.5 for rate in values["method.dropout"])
    again = sweep_members.members(str(file), [], fields, tmp_path, trials=50, seed=3)
    assert [one.values for one in again[:40]] == [one.values for one in drawn]
    assert sweep_members.members(str(file), [], fields, tmp_path, trials=1, seed=4)[0].values != drawn[0].values

    drawn[1].trial["drawn"]["optim.learning_rate"] = "0.005"  # type: ignore[index]
    sweep_results.write_results(drawn, tmp_path)
    kept = sweep_members.members(str(file), [], fields, tmp_path, trials=2, seed=3)
    assert [one.values["optim.learning_rate"] for one in kept] == [rates[0], 0.005]
    narrow = [fields[0].replace("1e-5", "9e-3"), *fields[1:]]
    with pytest.raises(UserError, match=r"sweep.json records a draw from other fields or values: .*--search_seed"):
        sweep_members.members(str(file), [], narrow, tmp_path, trials=2, seed=3)
    few = sweep_members.members(str(file), [], ["--sweep.seed=0,1"], tmp_path / "few", trials=9)
    assert sorted(one.config.seed for one in few) == [0, 1]  # repeated draws are left out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "nothing to sweep"),
        (["--sweep.optim.learning_rate=uniform(1e-3,1e-2)"], "set the number of draws, for example --trials=20"),
        (["--sweep.optim.learning_rate=uniform(1e-3)"], "a range needs two numbers"),
        (["--sweep.optim.learning_rate=uniform(2,1)"], "the lower bound of a range must be below"),
        (["--sweep.optim.learning_rate=loguniform(0,1)"], "the lower bound of loguniform must be more than 0"),
        (["--sweep.seed="], "a swept field needs values, such as"),
        (["--sweep.seed"], "needs values"),
        (["--sweep.seed=1", "--sweep.seed=2"], "seed is swept twice"),
        (["--sweep.optim.learning_rate=1e-3,0.001"], "two runs of the sweep are the same: learning_rate=0.001"),
        (["--sweep.optim.learnin_rate=1"], "Did you mean 'learning_rate'"),
        (["--sweep.seed=-1"], "seed=-1 must be at least 0"),
    ],
)
def test_a_mistaken_sweep_is_refused(fields: list[str], message: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sweep_members.members(str(file), [], fields, tmp_path)


@pytest.mark.parametrize("values", ["loguniform(0.1,0.9)", "uniform(4.2,4.8)"])
def test_the_range_of_an_integer_field_needs_an_integer(values: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sweep\.method\.rank=.*: there is no integer from [\d.]+ to"):
        sweep_members.members(str(file), [], [f"--sweep.method.rank={values}"], tmp_path, trials=2)


def test_a_recorded_draw_that_is_no_number_is_in_no_range(file: Path, tmp_path: Path) -> None:
    trial = {"seed": 0, "index": 0, "drawn": {"train.eval_every": "10%"}}
    (tmp_path / "sweep.json").write_text(json.dumps([{"run": "eval_every=10%", "trial": trial}]))
    with pytest.raises(UserError, match="records a draw from other fields or values"):
        sweep_members.members(str(file), [], ["--sweep.train.eval_every=uniform(5,20)"], tmp_path, trials=1)


def test_a_config_file_can_name_the_fields_and_their_values(file: Path, tmp_path: Path) -> None:
    space = (
        """{"optim.learning_rate": "loguniform(1e-4,1e-3)", "method.targets": [("q_proj", "v_proj")], "seed": [0, 1]}"""
    )
    file.write_text(f"{file.read_text()}\n\ndef get_sweep():\n    return {space}\n")
    drawn = [one.values for one in sweep_members.members(str(file), [], ["--sweep.seed=5"], tmp_path, trials=3)]
    assert [values["method.targets"] for values in drawn] == [("q_proj", "v_proj")] * 3
    assert all(1e-4 <= values["optim.learning_rate"] <= 1e-3 for values in drawn)
    assert {values["seed"] for values in drawn} == {5}
    spaces = """[
        {"method.name": ["lora"], "method.rank": [4, 8], "method.dora": [False, True]},
        {"method.name": ["prompt"], "method.tokens": "uniform(8,64)"},
    ]"""
    file.write_text(f"{file.read_text()}\n\ndef get_sweep():\n    return {spaces}\n")
    drawn = [one.values for one in sweep_members.members(str(file), [], ["--sweep.seed=5"], tmp_path, trials=20)]
    assert {tuple(values) for values in drawn} == {
        ("method.name", "method.rank", "method.dora", "seed"),
        ("method.name", "method.tokens", "seed"),
    }
    assert all(type(values.get("method.tokens", 8)) is int for values in drawn)
    with pytest.raises(
        UserError, match=r"config.py: method.tokens=uniform\(8,64\): the range of method.tokens needs random search"
    ):
        sweep_members.members(str(file), [], [], tmp_path)
    file.write_text(file.read_text().replace('"uniform(8,64)"', "[16, 32]"))
    grid = [one.name for one in sweep_members.members(str(file), [], [], tmp_path)]
    assert grid[3:] == ["name=lora,rank=8,dora=True", "name=prompt,tokens=16", "name=prompt,tokens=32"]
    for wrong, message in (("{'seed': 3}", "seed needs a list of values or a range"), ("3", "must return a dict")):
        file.write_text(file.read_text() + f"\n\ndef get_sweep():\n    return {wrong}\n")
        with pytest.raises(UserError, match=message):
            sweep_members.members(str(file), [], [], tmp_path)


SPACES = {
    "py": """
from peftjax.core.config import defaults

def get_config():
    return defaults()

def get_sweep():
    return [
        {"method.name": ["lora"], "method.rank": [4, 8], "method.targets": [("q_proj", "v_proj"), "all-linear"]},
        {"method.name": ["prompt"], "optim.learning_rate": [1e-3, 3e-2], "method.tokens": "16,32"},
    ]
""",
    "yaml": """
sweep:
  - {method.name: [lora], method.rank: [4, 8], method.targets: [[q_proj, v_proj], all-linear]}
  - method.name: [prompt]
    optim.learning_rate: [1e-3, 3e-2]
    method.tokens: 16,32
""",
    "json": """{"sweep": [
        {"method.name": ["lora"], "method.rank": [4, 8], "method.targets": [["q_proj", "v_proj"], "all-linear"]},
        {"method.name": ["prompt"], "optim.learning_rate": [1e-3, 3e-2], "method.tokens": "16,32"}
    ]}""",
}


def test_yaml_and_json_define_the_search_spaces_that_python_defines(tmp_path: Path) -> None:
    found = {}
    for kind, text in SPACES.items():
        file = tmp_path / f"config.{kind}"
        file.write_text(text)
        assert configs.load(file) == configs.validate({})  # other commands ignore the search spaces
        found[kind] = [(one.values, one.config) for one in sweep_members.members(str(file), [], [], tmp_path)]
    assert len(found["py"]) == 8
    assert found["yaml"] == found["json"] == found["py"]

    file = tmp_path / "one.yaml"
    file.write_text("seed: 7\nsweep:\n  optim.learning_rate: loguniform(1e-4, 1e-3)\n  method.rslora: [true, false]\n")
    drawn = sweep_members.members(str(file), [], ["--sweep.method.rank=2"], tmp_path, trials=9)
    assert {one.values["method.rslora"] for one in drawn} == {True, False}
    assert all(1e-4 <= one.values["optim.learning_rate"] <= 1e-3 and one.values["method.rank"] == 2 for one in drawn)
    assert {one.config.seed for one in drawn} == {7}
    for nothing in ("sweep:", "sweep: {}", "sweep: []"):
        file.write_text(nothing)
        with pytest.raises(UserError, match="nothing to sweep"):
            sweep_members.members(str(file), [], [], tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seed: 1\nsweep: 3", "a.yaml, line 2: sweep must be a mapping of fields to their values, or a list of"),
        ("a.yaml", "sweep:\n  - [seed]", "a.yaml, line 1: sweep must be a mapping"),
        ("a.yaml", "sweep:\n  seed: 3", "a.yaml, line 2: the swept field seed needs a list of values or a range such as"),
        ("a.yaml", "sweep:\n  optim: {learning_rate: [1], b1: [0]}",
         "a.yaml, line 2: write each swept field of the section optim with a dot: optim.learning_rate, optim.b1"),
        ("a.yaml", "sweep:\n  seed: [0]\n  optim.learnin_rate: [1e-3]",
         "a.yaml, line 3: unknown field optim.learnin_rate. Did you mean 'learning_rate'?"),
        ("a.yaml", "sweep:\n- method.name: [lora]\n- method.name: [promt]",
         "a.yaml, line 3: method.name: 'promt' is not a method. Did you mean 'prompt'"),
        ("a.yaml", "sweep:\n- {seed: [0]}\n- {method.name: [lora], method.tokens: [4]}",
         "a.yaml, line 3: unknown field method.tokens."),
        ("a.yaml", "sweep:\n  seed: [0, -1]", "a.yaml, line 2: seed=-1 must be at least 0"),
        ("a.yaml", "sweep:\n  seed: [0]\n  seed: [1]", "a.yaml, line 3: seed is given twice, first on line 2"),
        ("a.yaml", "sweep:\n  seed: uniform(0)", "a.yaml, line 2: seed=uniform(0): a range needs two numbers"),
        ("a.json", '{"sweep": {"optim.b1": "uniform(0,1)"}}', "a.json: optim.b1=uniform(0,1): the range of optim.b1 needs"),
        ("a.json", '{"sweep": {"method.rank": ["four"]}}', "a.json: method.rank must be an int, not 'four' (str)"),
        ("a.json", '{"sweep": {"method.rank": []}}', "a.json: the swept field method.rank needs a list of values"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_search_space_of_a_file_is_one_line_with_its_place(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        sweep_members.members(str(tmp_path / name), [], [], tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


FIRST = ["--sweep.method.name=lora", "--sweep.method.rank=4,8", "--sweep.method.targets=('q_proj','v_proj');all-linear"]
SECOND = ["--sweep.method.name=prompt", "--sweep.optim.learning-rate=1e-3,3e-2", "--sweep.method.tokens=16,32"]


def test_or_separates_search_spaces_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(SPACES["py"])
    expected = sweep_members.members(str(file), [], [], tmp_path)
    file.write_text(SPACES["py"].partition("def get_sweep")[0])
    fields, rest = space.split_arguments(["--workdir=w", *FIRST, "--or", *SECOND, "--trials=2"])
    assert rest == ["--workdir=w", "--trials=2"]
    found = sweep_members.members(str(file), [], fields, tmp_path)
    assert [(one.values, one.config) for one in found] == [(one.values, one.config) for one in expected]
    drawn = sweep_members.members(str(file), [], fields, tmp_path, trials=20)
    assert {tuple(one.values) for one in drawn} == {tuple(one.values) for one in found}


@pytest.mark.parametrize("fields", [["--or"], ["--or", *SECOND], [*FIRST, "--or"], [*FIRST, "--or", "--or", *SECOND]])
def test_each_search_space_of_the_command_line_has_a_field(fields: list[str], file: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^--or separates search spaces: give at least one --sweep\.FIELD=V,V before it"
    ):
        sweep.main([f"--config={file}", f"--workdir={tmp_path / 'sweep'}", *fields])


def test_or_is_refused_if_the_config_file_has_a_search_space(tmp_path: Path) -> None:
    file = tmp_path / "config.py"
    file.write_text(SPACES["py"])
    with pytest.raises(UserError, match=r"^--or cannot be combined with the search space of .*config\.py; remove one"):
        sweep.main([f"--config={file}", f"--workdir={tmp_path / 'sweep'}", *FIRST, "--or", *SECOND])


def test_runs_that_differ_in_their_numbers_alone_are_one_population(tmp_path: Path) -> None:
    made = defaults()
    made.method = methods.make_config("lora")
    numbers = [member(made, tmp_path, seed=seed, optim__name=name) for seed in (0, 1) for name in ("sgd", "adamw")]
    assert sweep.populations(numbers) == [numbers]
    ranks = [member(made, tmp_path, method__rank=rank, method__dropout=rate) for rate in (0.0, 0.1) for rank in (4, 8)]
    assert sweep.populations(ranks) == [ranks]
    targets = [
        member(made, tmp_path, method__targets=name, seed=seed) for seed in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert sweep.populations(targets) == [targets]
    made.method = methods.make_config("ia3")
    activations = [
        member(made, tmp_path, method__targets=name, seed=seed) for seed in (0, 1) for name in ("k_proj", "v_proj")
    ]
    assert sweep.populations(activations) == [activations]
    saved = [
        member(made, tmp_path, method__modules_to_save=(name,), seed=seed)
        for seed in (0, 1)
        for name in ("lm_head", "norm")
    ]
    assert sweep.populations(saved) == [[saved[0], saved[2]], [saved[1], saved[3]]]
    random = [member(made, tmp_path, model__init="random", seed=seed) for seed in (0, 1)]
    assert sweep.populations(random) == [[random[0]], [random[1]]]  # their bases differ


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A training that asks for no answers."""
    return config(tmp_path, eval__exact_match=0, eval__samples=0, train__steps=4, checkpoint__every=2)


@pytest.mark.slow
def test_runs_side_by_side_are_those_that_train_would_do(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, batches = list[Run](), Run.held_out_batches
    monkeypatch.setattr(Run, "held_out_batches", lambda run, log: passes.append(run) or batches(run, log))
    monkeypatch.setattr(answers, "BATCH", 6)  # two prompts of three members at a time
    made.train.eval_every, made.train.accumulate = 4, 2
    made.eval.exact_match, made.eval.samples, made.eval.metrics = 5, 5, ("exact_match", "rouge_l")
    made.model.quantize, made.method = "nf4", methods.make_config("lora", rank=4, dropout=0.1)
    options = {"seed": (0, 0, 1), "optim__learning_rate": (1e-2, 1e-3, 1e-2), "method__alpha": (8.0, 16.0, 4.0)}
    several = [
        member(made, tmp_path / "sweep", **dict(zip(options, values, strict=True)))
        for values in zip(*options.values(), strict=True)
    ]
    found = sweep.sweep(several, tmp_path / "sweep")
    assert "population 1 of 1, 3 side by side" in capsys.readouterr().out
    assert len(passes) == 2  # of all members, before the first step and after the last
    scores = {one["run"]: one["scores"] for one in found}
    for one in several[1:]:
        alone = tmp_path / "alone" / one.name
        train(one.config, alone)
        assert_same_run(one.workdir, alone)
        assert ReportData.load(one.workdir).after == ReportData.load(alone).after  # the answers
        assert scores[one.name]["exact_match"] == runs.metrics(alone)[-1]["exact_match"]
    assert found == json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    losses = [one["scores"]["eval_loss"] for one in found]
    assert losses == sorted(losses)
    assert len(set(losses)) == 3
    assert sweep.sweep(several, tmp_path / "sweep") == found
    assert "3 of 3 runs have already ended" in capsys.readouterr().out


OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"rank": 2, "dropout": 0.0, "init": "gaussian", "alpha": 4.0},
        {"rank": 5, "dropout": 0.2, "rslora": True, "lr_ratio": 2.0},
        {"rank": 3, "dropout": 0.1},
    ),
    "targets": (
        {"rank": 2, "targets": ("q_proj", "embed_tokens"), "rank_pattern": (("q_proj", 4),)},
        {
            "targets": "all-linear",
            "exclude": "o_proj",
            "layers_to_transform": (1,),
            "alpha_pattern": (("v_proj", 2.0),),
        },
        {"rank": 3, "targets": ("down_proj",)},
    ),
    "dora": ({"dora": True, "rank": 3}, {"dora": True, "rank": 4, "init": "orthogonal"}),
    "pissa": ({"init": "pissa", "rank": 2}, {"init": "olora", "rank": 3}),
    "adalora": (
        {"init_rank": 4, "target_rank": 1},
        {"init_rank": 4, "target_rank": 3, "warmup_steps": 1, "alpha": 2.0},
    ),
}


# The optimizers of these members, where there are several.
OPTIM: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "schedule": "linear", "warmup_steps": 1},
        {"name": "lion", "b1": 0.7, "b2": 0.9, "schedule": "constant", "learning_rate": 1e-3},
        {"name": "sgd", "momentum": 0.5, "clip_norm": 0.1, "final_fraction": 0.5},
    ),
    "pissa": ({"name": "adafactor", "schedule": "linear"}, {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "clip_norm": 0.0}),
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("name", OPTIONS)
def test_members_of_different_ranks_and_options_train_as_they_do_alone(
    name: str, made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.train.log_every, made.train.eval_every = 1, 3
    common: dict[str, Any] = {}
    if name not in ("lora", "targets"):
        made.data.eval, common = (), {"targets": ("q_proj", "down_proj")}
    if name == "targets":
        made.eval.samples = 2
    members = []
    for index, options in enumerate(OPTIONS[name]):
        made.method = methods.make_config(
            {"dora": "lora", "pissa": "lora", "targets": "lora"}.get(name, name), **common | options
        )
        one = made.copy_and_resolve_references()
        one.optim.update({"weight_decay": 0.1 * index} | OPTIM.get(name, ({}, {}, {}))[index])
        members.append(member(one, tmp_path / "sweep", seed=index % 2, train__steps=3 + index))
    assert sweep.populations(members) == [members]
    sweep.sweep(members, tmp_path / "sweep")
    assert "separate programs" not in capsys.readouterr().out
    for one in members:
        train(one.config, tmp_path / "alone" / one.name)
        assert_same_run(one.workdir, tmp_path / "alone" / one.name)
        assert ReportData.load(one.workdir).after == ReportData.load(tmp_path / "alone" / one.name).after  # the answers


def test_the_members_of_a_population_have_one_base_in_memory(made: Any, tmp_path: Path) -> None:
    made.model.quantize = "nf4"
    pair = [member(made, tmp_path, seed=seed) for seed in (0, 1)]
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        (united,) = unite_runs(pair, mesh)
        kernels = [united.open(one).run.frozen["blocks.attention.query.kernel"] for one in pair]
        ours, theirs = ([leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kernel)] for kernel in kernels)
    assert ours == theirs
    assert len(ours) == 4  # codes, absmax, their scales and mean


def test_a_run_that_is_extended_is_not_finished_until_it_has_a_new_report(made: Any, tmp_path: Path) -> None:
    one = member(made, tmp_path, seed=0)
    one.workdir.mkdir()
    for name in (MARK, "report.html"):
        (one.workdir / name).touch()
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        unite_runs([one], mesh)[0].open(one)
    assert not (one.workdir / "report.html").exists()


@pytest.mark.slow
def test_successive_halving_continues_the_best_runs(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.train.update({"steps": 8, "eval_every": 2})
    rates, groups = (1e-5, 1e-2, 1e-4, 1e-3), list[United]()
    monkeypatch.setattr(population, "unite_runs", lambda *given: groups.extend(unite_runs(*given)) or groups[-1:])

    def grid() -> list[Member]:
        return [member(made, tmp_path / "sweep", optim__learning_rate=rate) for rate in rates]

    found = sweep.sweep(grid(), tmp_path / "sweep", reduction=2)
    (update,) = groups[0]._updates.values()
    assert (
        cast(Any, update)._cache_size() == 3
    )  # for all learning rates, compiled once for four runs, for two and for one
    ends = {one["values"]["optim__learning_rate"]: one.get("stopped") for one in found}
    assert ends == {1e-2: None, 1e-3: 4, 1e-4: 2, 1e-5: 2}  # rungs after 8 / 4 and 8 / 2 steps
    assert found[0]["values"] == {"optim__learning_rate": 1e-2}
    printed = capsys.readouterr().out
    assert "optim__learning_rate=0.0001 stopped at step 2: not among the best 2 of 4 runs" in printed
    assert "stopped at step 2" in (tmp_path / "sweep" / "sweep.html").read_text()
    train(grid()[1].config, tmp_path / "alone")
    assert_same_run(tmp_path / "sweep" / "optim__learning_rate=0.01", tmp_path / "alone")

    assert sweep.sweep(grid(), tmp_path / "sweep", reduction=2) == found
    assert "4 of 4 runs have already ended" in capsys.readouterr().out
    more = member(
        made, tmp_path / "sweep", optim__learning_rate=1e-6
    )  # alone in its population, compared with the others
    assert sweep.sweep([*grid(), more], tmp_path / "sweep", reduction=2)[-1]["stopped"] == 2
    assert "stopped" not in sweep.sweep(grid()[-1:], tmp_path / "sweep")[0]  # continues where it was stopped
    assert runs.metrics(tmp_path / "sweep" / "optim__learning_rate=0.001")[-1]["step"] == 8


@pytest.mark.slow
def test_runs_take_the_places_of_stopped_ones_in_the_same_program(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made.train.update({"steps": 8, "eval_every": 2})
    made.method, groups = methods.make_config("lora"), list[United]()
    monkeypatch.setattr(population, "unite_runs", lambda *given: groups.extend(unite_runs(*given)) or groups)
    options = {
        "optim__learning_rate": (1e-5, 1e-2, 1e-4, 1e-3),
        "method__rank": (2, 3, 4, 1),
        "method__targets": ("q_proj", "v_proj", "all-linear", "q_proj"),
    }
    several = [
        member(made, tmp_path / "sweep", **dict(zip(options, values, strict=True)))
        for values in zip(*options.values(), strict=True)
    ]
    found = sweep.sweep(several, tmp_path / "sweep", most=2, reduction=2)
    ends = {one["values"]["optim__learning_rate"]: one.get("stopped") for one in found}
    assert ends == {1e-2: None, 1e-3: 2, 1e-4: 4, 1e-5: 2}  # each compared with those that have been there before
    assert "population 1 of 1, 4 runs, 2 at a time" in capsys.readouterr().out
    (united,) = groups
    assert cast(Any, united.gradients)._cache_size() == 1  # compiled once
    _, best, other, _ = several
    for one in (best, other):
        train(one.config, tmp_path / "alone" / one.name)
    assert_same_run(best.workdir, tmp_path / "alone" / best.name)
    stopped, alone = (eval_losses(root / other.name) for root in (tmp_path / "sweep", tmp_path / "alone"))
    assert stopped == pytest.approx(alone[:3], rel=2e-4)  # at steps 0, 2 and 4


def eval_losses(workdir: Path) -> list[float]:
    return [line["eval_loss"] for line in runs.metrics(workdir) if line["kind"] == "eval"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__eval_every": 0}, "set data.eval and train.eval_every"),
        ({"train__eval_every": 4}, "compares runs after 2 of 4 steps, but train.eval_every=4"),
        ({"data__eval": ()}, "set data.eval and train.eval_every"),
    ],
)
def test_successive_halving_needs_evaluations(fields: dict[str, Any], message: str, made: Any, tmp_path: Path) -> None:
    made.train.eval_every = 1
    pair = [member(made, tmp_path / "sweep", seed=seed, **fields) for seed in (0, 1)]
    with pytest.raises(UserError, match=message):
        sweep.sweep(pair, tmp_path / "sweep", reduction=2)
    other = member(made, tmp_path / "sweep", train__steps=8)
    with pytest.raises(UserError, match=r"they need the same train\.steps"):
        sweep.sweep([pair[0], other], tmp_path / "sweep", reduction=2)


def test_all_processes_stop_the_runs_that_the_first_process_finds_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(population.distributed, "on_first", lambda action: ["seed=1", "seed=0"])  # its file system
    stopped: list[str] = []
    pair = [
        SimpleNamespace(member=SimpleNamespace(name=name), stop=lambda why, name=name: stopped.append(name))
        for name in ("seed=0", "seed=1")
    ]
    halving = Halving([], 2, [4])  # this process sees no losses yet
    population.stop_worst(cast(Any, pair), 4, halving)
    assert stopped == ["seed=0"]


@pytest.mark.slow
def test_a_run_that_is_not_finite_any_more_ends_alone(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.data.eval, made.optim.clip_norm = (), 0.0
    rates = [member(made, tmp_path / "sweep", optim__learning_rate=rate) for rate in (1e30, 1e-2)]
    found = sweep.sweep(rates, tmp_path / "sweep")
    assert [one["values"] for one in found] == [{"optim__learning_rate": 1e-2}, {"optim__learning_rate": 1e30}]
    assert "is nan" in found[1]["failed"]
    assert 0 < found[0]["scores"]["loss"] < 10
    assert (rates[1].workdir / "adapter").exists()
    assert sweep_results.best_result(found, tmp_path / "sweep") == rates[1].workdir / "adapter"
    assert not (rates[0].workdir / "adapter").exists()
    assert "failed: step" in capsys.readouterr().out
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert page.count("<a href=") == 1  # the other run has no report
    assert '<a href="../sweep.html">' in (rates[1].workdir / "report.html").read_text()
    with pytest.raises(ValueError, match="every run of the sweep failed; the first: step"):
        sweep.sweep(rates[:1], tmp_path / "sweep")


@pytest.mark.slow
def test_a_run_whose_evaluation_is_not_finite_ends_alone(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.train.eval_every = 2
    pair = [member(made, tmp_path / "sweep", seed=seed) for seed in (0, 1)]

    def evaluate(run: Run, state: TrainState, log: Log, measured: Measured | None) -> dict[str, float]:
        assert (measured is not None) == (state.step < 4)  # together, until one is left
        page = (tmp_path / "sweep" / "sweep.html").read_text()  # reports link to it
        assert all(f"seed={seed}" in page for seed in (0, 1))
        if run.config.seed == 1 and state.step > 0:
            raise NotFiniteError("generate: the logits are NaN")
        return {}

    monkeypatch.setattr(Run, "evaluate", evaluate)
    found = sweep.sweep(pair, tmp_path / "sweep")
    assert [one.get("failed") for one in found] == [None, "generate: the logits are NaN"]
    assert [runs.checkpoints(one.workdir) != set() for one in pair] == [True, False]


def test_another_configuration_in_the_directory_of_a_run_is_refused(made: Any, tmp_path: Path) -> None:
    first = member(made, tmp_path / "sweep", seed=0)
    with Checkpoints(first.workdir / "checkpoints", keep=1, keep_best=False) as checkpoints:
        identity = {"config": json.loads(configs.to_json(first.config)), "base": ""}
        checkpoints.save(4, {"step": jnp.zeros(())}, {}, identity=identity)
    assert not sweep.finished(first)  # the report is not there
    made.train.batch_size = 4
    with pytest.raises(ValueError, match=r"seed=0 holds a run with another configuration: train.batch_size: 4 here"):
        sweep.sweep([member(made, tmp_path / "sweep", seed=0)], tmp_path / "sweep")


def test_a_run_that_has_started_is_trained_together_with_one_that_has_not(made: Any, tmp_path: Path) -> None:
    pair = [member(made, tmp_path, seed=seed) for seed in (0, 1)]
    started = precision.resolve_dtype(pair[0].config, {})
    assert (pair[0].config.model.dtype, started.model.dtype) == ("auto", "float32")
    with Checkpoints(pair[0].workdir / "checkpoints", keep=1, keep_best=False) as checkpoints:
        identity = {"config": json.loads(configs.to_json(started)), "base": ""}
        checkpoints.save(2, {"step": jnp.zeros(())}, {}, identity=identity)
    sweep.resolve_configs(pair)
    assert sweep.populations(pair) == [pair]


def test_a_member_whose_directory_holds_other_files_is_named_before_any_run_starts(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "train_population", lambda *_: pytest.fail("a run started"))
    pair = [member(made, tmp_path / "sweep", seed=seed) for seed in (0, 1)]
    pair[1].workdir.mkdir(parents=True)
    (pair[1].workdir / "notes.txt").write_text("mine")
    (tmp_path / "sweep" / MARK).write_text("")
    with pytest.raises(UserError, match=r"seed=1 holds other files \(notes.txt\) and no run"):
        sweep.sweep(pair, tmp_path / "sweep")
    assert not pair[0].workdir.exists()


def test_amounts_of_data_are_not_scores(made: Any, tmp_path: Path) -> None:
    one = member(made, tmp_path, seed=0)
    amounts = {"eval_tokens": 7, "eval_labels": 3, "prompts": 2}
    with Log(one.workdir, total_steps=1, resume_step=0, tensorboard=False, quiet=True) as log:
        log.step(1, {"loss": 1.0, "grad_norm": 2.0})
        log.evaluation(1, {"eval_loss": 0.5, "accuracy": 0.75} | amounts)
    found = sweep_results.outcome(one)
    assert found["scores"] == {"loss": 1.0, "eval_loss": 0.5, "accuracy": 0.75}
    assert found["amounts"] == amounts


def printed(found: list[dict[str, Any]]) -> list[str]:
    """The lines of the table, in 80 columns."""
    console = make_console(file=io.StringIO())
    with console.capture() as capture:
        console.print(make_table(found), width=80)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip(" ─")]


def test_the_table_has_a_line_for_each_run_and_says_which_failed() -> None:
    values = [
        {"optim.learning_rate": rate, "method.rank": 4, "method.targets": targets}
        for rate, targets in ((1e-3, ("q_proj", "[red]")), (1e-3, "all"), (1.0, "all"))
    ]
    scores = {"loss": 0.25, "eval_loss": 0.5, "perplexity": 1.6, "token_accuracy": 0.75}
    found: list[dict[str, Any]] = [
        {"run": "a", "values": values[0], "scores": scores},
        {"run": "b", "values": values[1], "scores": scores | {"eval_loss": 0.625}},
        {"run": "c", "values": values[2], "scores": {}, "failed": "step 3: loss is nan"},
    ]
    assert printed(found) == [
        "learning_rate targets loss token accuracy",
        "0.001 q_proj+[red] 0.5 0.75",
        "0.001 all 0.625 0.75",
        "1.0 all not finite",
    ]


def test_a_loss_that_is_not_a_number_is_never_the_best(made: Any, tmp_path: Path) -> None:
    several = [member(made, tmp_path, optim__learning_rate=rate) for rate in (0.1, 0.2, 0.3)]
    for one, loss in zip(several, (2.0, float("nan"), 1.0), strict=True):
        with Log(one.workdir, total_steps=1, resume_step=0, tensorboard=False, quiet=True) as log:
            log.evaluation(1, {"eval_loss": loss})
    found = sweep_results.write_results(several, tmp_path)
    assert [entry["values"]["optim__learning_rate"] for entry in found] == [0.3, 0.1, 0.2]
    assert [line.split()[1] for line in printed(found[::-1])[1:]] == ["1", "2", "nan"]


def test_the_best_result_is_that_of_a_run_that_has_one(tmp_path: Path) -> None:
    found = [{"run": "waits in another part"}, {"run": "b"}, {"run": "c"}]
    assert sweep_results.best_result(found, tmp_path) is None
    for name in ("c/adapter", "b/model"):
        (tmp_path / name).mkdir(parents=True)
    assert sweep_results.best_result(found, tmp_path) == tmp_path / "b" / "model"


def test_the_table_shows_where_runs_were_stopped() -> None:
    found = [
        {"values": {"seed": seed, "rank": rank}, "scores": {"eval_loss": loss}} | stopped
        for seed, rank, loss, stopped in ((0, 4, 1.0, {}), (0, 8, 0.5, {"stopped": 10}), (0, 2, 2.0, {"stopped": 5}))
    ]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        make_console().print(make_table(found))
    lines = [line.split() for line in printed.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["rank", "loss", "stopped", "at"]
    assert lines[2:] == [["4", "1"], ["8", "0.5", "10"], ["2", "2", "5"]]


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    found: list[dict[str, Any]] = [
        {"run": f"{rate}{seed}", "values": {"optim.learning_rate": rate, "seed": seed}, "scores": scores}
        for rate, seed, scores in (
            (0.1, 0, {"eval_loss": 0.25, "accuracy": 0.75}),
            (0.2, 0, {"eval_loss": 0.5, "accuracy": 0.5}),
            (0.2, 1, {"eval_loss": 0.5, "accuracy": 0.5}),
            (0.1, 1, {"eval_loss": 1.25, "accuracy": 0.25}),
            (0.3, 0, {"eval_loss": 2.0, "accuracy": 0.25}),
        )
    ]
    found.append({"run": "e", "values": {"optim.learning_rate": 0.3, "seed": 1}, "scores": {}, "failed": "nan"})
    assert printed(found) == [
        "learning_rate seeds loss accuracy",
        "0.2 2 0.5 0.5",
        "0.1 2 0.75 ± 0.71 0.50 ± 0.35",
        "0.3 1 of 2 2 0.25",
        "mean ± standard deviation over the seeds",
    ]


def test_full_fine_tuning_of_a_bfloat16_checkpoint_has_float32_parameters(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.method = methods.make_config("full")
    file = Path(made.model.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        (united,) = unite_runs([member(made, tmp_path, seed=0)], mesh)
    assert (united.model.config.dtype, united.model.config.param_dtype) == ("bfloat16", "float32")


@pytest.mark.slow
@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("name", ["randlora", "full"])
def test_what_a_method_holds_in_its_structure_or_in_the_base_is_not_mixed_up(
    name: str, made: Any, tmp_path: Path
) -> None:
    made.method = methods.make_config(name)
    field, values = ("seed", (0, 1)) if name == "full" else ("method__alpha", (64.0, 640.0))
    pair = [member(made, tmp_path / "sweep", **{field: value}) for value in values]
    sweep.sweep(pair, tmp_path / "sweep", most=0)
    for one in pair:
        train(one.config, tmp_path / "alone" / one.name)
        result = "model/model.safetensors" if name == "full" else "adapter/adapter_model.safetensors"
        assert_same_result(one.workdir, tmp_path / "alone" / one.name, result)


def test_a_rank_that_does_not_fit_is_refused_with_its_run_before_any_run_starts(made: Any, tmp_path: Path) -> None:
    several = [member(made, tmp_path / "sweep", method__rank=rank) for rank in (2, 17)]
    with pytest.raises(UserError, match=r"^method__rank=17: method\.rank=17 exceeds the smaller dimension"):
        sweep.sweep(several, tmp_path / "sweep")
    assert not (tmp_path / "sweep" / "sweep.json").exists()


@pytest.mark.slow
def test_a_population_on_a_mesh_trains_as_on_one_device(made: Any, tmp_path: Path) -> None:
    made.model.quantize = "nf4"
    made.optim.eps = 1e-4  # else Adam takes a full step for a gradient that is only rounding
    for workdir, sizes in ((tmp_path / "one", {}), (tmp_path / "mesh", {"data": 2, "fsdp": 2, "tensor": 2})):
        made.mesh.update(sizes)
        pair = [member(made, workdir, method__targets=targets) for targets in ("q_proj", "all-linear")]
        sweep.sweep(pair, workdir)
    for one in pair:
        assert_same_run(one.workdir, tmp_path / "one" / one.name)


@pytest.mark.slow
def test_a_sweep_is_killed_preempted_and_ended_by_two_processes_and_is_what_it_would_have_been(tmp_path: Path) -> None:
    world = runs.make_world(tmp_path)
    swept = ("--sweep.optim.learning_rate=1e-2,1e-3", "--config.eval.exact_match=0")
    swept += ("--config.train.steps=40", "--config.checkpoint.every=5")
    fork = partial(runs.fork, world, command="sweep")
    first = world / "killed" / "learning_rate=0.01"
    runs.kill_when(fork(world / "killed", *swept), lambda: bool(runs.checkpoints(first)))
    child = fork(world / "killed", *swept, "--together=1")
    runs.wait_until(runs.logged(first, 20), child)  # far from where it was killed
    child.send_signal(signal.SIGTERM)
    ((code, output),) = runs.ended(child)
    assert code == 75, output
    assert "and the position in the data; run the same command to resume" in output
    split = (*swept, "--config.mesh.data=2")  # each process computes one member
    results = runs.ended(*runs.start_together(world, world / "killed", 2, *split, command="sweep"))
    assert [code for code, _ in results] == [0, 0], results
    assert "sweep.json" in results[0][1]
    assert "sweep.json" not in results[1][1]

    said = runs.finish(fork(world / "undisturbed", *swept))
    assert "population 1 of 1, 2 side by side" in said
    parts = runs.ended(*(fork(world / "parts", *swept, f"--part={index}/2") for index in (1, 2)))  # at the same time
    assert [code for code, _ in parts] == [0, 0], parts
    for name in ("learning_rate=0.01", "learning_rate=0.001"):
        assert_same_run(world / "killed" / name, world / "undisturbed" / name)
        assert_same_run(world / "parts" / name, world / "undisturbed" / name)
    whole, found = (json.loads((world / name / "sweep.json").read_text()) for name in ("undisturbed", "parts"))
    for entry, expected in zip(found, whole, strict=True):
        assert entry.pop("scores") == pytest.approx(expected.pop("scores"), rel=2e-4)
        assert entry == expected


@pytest.mark.slow
def test_successive_halving_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    world = runs.make_world(tmp_path)
    swept = ["--sweep.optim.learning_rate=1e-5,1e-2,1e-4,1e-3", "--halving=2", "--config.eval.exact_match=0"]
    swept += ["--config.train.steps=32", "--config.train.eval_every=8", "--config.checkpoint.every=8"]
    fork = partial(runs.fork, world, command="sweep")
    undisturbed = fork(world / "undisturbed", *swept)
    killed = fork(world / "killed", *swept)
    runs.kill_when(killed, runs.logged(world / "killed" / "learning_rate=0.01", 9))
    entries = json.loads((world / "killed" / "sweep.json").read_text())
    assert [entry.get("stopped") for entry in entries] == [None, None, 8, 8]
    said = runs.finish(fork(world / "killed", *swept))
    assert "2 of 4 runs have already ended" in said
    assert "stopped at step 8" not in said
    assert "stopped at step 16: not among the best 1 of 2 runs" in said
    runs.finish(undisturbed)
    found, whole = (json.loads((world / name / "sweep.json").read_text()) for name in ("killed", "undisturbed"))
    for entry, expected in zip(found, whole, strict=True):
        assert entry.pop("scores") == pytest.approx(expected.pop("scores"), rel=2e-4)
        assert entry == expected
    assert_same_run(world / "killed" / "learning_rate=0.01", world / "undisturbed" / "learning_rate=0.01")
