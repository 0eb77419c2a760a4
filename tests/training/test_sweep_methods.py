"""Side by side, runs of every method have the losses and the results that each has alone; so do runs with a new head."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import peftjax
from peftjax import methods, sharding, sweep
from peftjax.core.config import defaults
from peftjax.models import from_hf_config
from peftjax.train import train
from peftjax.training.member import Member
from peftjax.training.setup import base_fingerprint
from peftjax.training.united import unite_runs
from tests import tiny
from tests.tasks.test_tasks import BERT
from tests.test_train import config
from tests.training.test_sweep import assert_same_run, member

pytestmark = pytest.mark.usefixtures("no_charts")

LAYERS = ("q_proj", "v_proj", "down_proj")
# Members with the same options. Of the methods that may differ in options, see DIFFERENT, one is here: without masks and padding,
# its members take another path.
OPTIONS: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction_factor": 8.0},
    "trainable_tokens": {"token_indices": (15, 16, 17)},  # digits
    "p_tuning": {"tokens": 3, "hidden": 6},
    "prefix": {"tokens": 3, "projection": True, "hidden": 6},
    "int8": {"rank": 2, "targets": LAYERS},
    "eva": {"rank": 2, "targets": LAYERS, "init": "eva", "eva_batches": 2},
    "loftq": {"rank": 2, "targets": LAYERS, "init": "loftq"},
}
QUANTIZED = {"int8": "int8", "loftq": "nf4"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A training of three steps, without held-out data, of a base of two layers with biases."""
    root = tmp_path_factory.mktemp("small")
    fields = {"vocab_size": 257, "eos_token_id": 256, "num_hidden_layers": 2, "attention_bias": True}
    write_model(root / "model", tiny.CONFIG | fields | {"architectures": ["LlamaForCausalLM"]})
    made = config(root, data__eval=(), train__steps=3, train__log_every=1, checkpoint__every=3, optim__eps=1e-4)
    made.train.batch_size = 4
    return made


def write_model(path: Path, fields: dict[str, Any]) -> None:
    """A directory with a random model and a tokenizer whose tokens are bytes."""
    peftjax.save_model(tiny.make(from_hf_config(fields)), path)
    tiny.write_tokenizer(path.with_name("tokenizer"))
    for file in path.with_name("tokenizer").iterdir():
        file.rename(path / file.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_runs_of_a_method_side_by_side_are_what_each_is_alone(
    name: str, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = small.copy_and_resolve_references()
    made.method = methods.make_config(name if name in methods.METHODS else "lora", **OPTIONS[name])
    made.model.quantize = QUANTIZED.get(name, "")
    pair = [
        member(made, tmp_path / "sweep", seed=seed, optim__learning_rate=rate) for seed, rate in ((0, 1e-3), (1, 1e-2))
    ]
    assert sweep.populations(pair) == [pair]
    sweep.sweep(pair, tmp_path / "sweep")
    printed = capsys.readouterr().out
    assert "population 1 of 1, 2 side by side" in printed
    assert "separate programs" not in printed
    other = pair[1]  # everything that the two share is the first one's
    train(other.config, tmp_path / "alone")
    (file,) = (other.workdir / "adapter").glob("*.safetensors")
    assert_same_run(other.workdir, tmp_path / "alone", f"adapter/{file.name}")
    first, second = (load_file(one.workdir / "adapter" / file.name) for one in pair)
    assert any(first[key].shape != array.shape or np.any(first[key] != array) for key, array in second.items())


# Options of members with adapters in different layers, and of different ranks where the method allows it.
DIFFERENT: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (
        {"rank": 2, "targets": "q_proj", "dropout": 0.2},
        {"rank": 3, "targets": ("q_proj", "v_proj"), "layers_to_transform": (1,), "dropout": 0.1},
        {"targets": ("down_proj", "embed_tokens")},
    ),
    "biases": (
        {"rank": 2, "targets": "q_proj", "bias": "lora_only"},
        {"rank": 2, "targets": ("q_proj", "o_proj"), "layers_to_transform": (0,), "bias": "lora_only"},
    ),
    "dora": (
        {"dora": True, "rank": 2, "targets": ("q_proj", "embed_tokens"), "dropout": 0.1},
        {"dora": True, "rank": 3, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,), "dropout": 0.1},
    ),
    "loha": (
        {"rank": 2, "targets": "q_proj", "rank_dropout": 0.1},
        {
            "rank": 3,
            "targets": ("q_proj", "down_proj"),
            "layers_to_transform": (1,),
            "rank_dropout": 0.1,
            "alpha": 2.0,
        },
    ),
    "lokr": (
        {"rank": 2, "targets": "q_proj"},
        {"rank": 1, "targets": ("v_proj", "down_proj"), "alpha_pattern": (("v_proj", 2.0),)},
    ),
    "adalora": (
        {"init_rank": 3, "target_rank": 2, "targets": "q_proj"},
        {"init_rank": 4, "target_rank": 1, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,)},
    ),
    "vera": (
        {"rank": 3, "targets": "v_proj"},
        {"rank": 8, "targets": ("q_proj", "down_proj"), "dropout": 0.1, "d_initial": 0.2},
    ),
    "projections": tuple(
        {"targets": ("q_proj", "down_proj"), "bias": "targets"} | each
        for each in ({"rank": 3}, {"rank": 4, "dropout": 0.1})
    ),
    "randlora": (
        {"rank": 4, "targets": "v_proj"},
        {"rank": 4, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,), "alpha": 64.0},
    ),
    "vblora": tuple(
        {"num_vectors": 6, "vector_length": 8} | each
        for each in ({"rank": 3, "targets": "v_proj"}, {"rank": 2, "targets": ("q_proj", "v_proj")})
    ),
    "fourierft": (
        {"n_frequency": 4, "targets": "q_proj", "scaling": 20.0},
        {"n_frequency": 6, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,), "random_loc_seed": 0},
    ),
    "hra": (
        {"rank": 4, "targets": "q_proj"},
        {"rank": 2, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,)},
    ),
    "orthogonal": (
        {"gram_schmidt": True, "rank": 2, "targets": "q_proj"},
        {"gram_schmidt": True, "rank": 3, "targets": "down_proj"},
    ),
    "oft": tuple(
        {"block_size": 8} | each
        for each in ({"targets": "q_proj"}, {"targets": ("q_proj", "down_proj"), "layers_to_transform": (1,)})
    ),
    "constrained": tuple(
        {"block_size": 8, "constrained": True, "neumann": False, "eps": 0.01, "targets": targets}
        for targets in ("q_proj", "down_proj")
    ),
    "boft": (
        {"targets": "q_proj", "dropout": 0.5},
        {"targets": ("q_proj", "down_proj"), "layers_to_transform": (1,), "dropout": 0.5},
    ),
    "miss": (
        {"rank": 4, "targets": "q_proj", "dropout": 0.1},
        {"rank": 4, "targets": ("q_proj", "down_proj"), "layers_to_transform": (1,)},
    ),
    "bat": tuple({"rank": 4, "variant": "bat", "targets": targets} for targets in ("q_proj", "v_proj")),
    "ia3": (
        {"targets": ("k_proj", "down_proj"), "feedforward": ("down_proj",)},
        {"targets": ("k_proj", "v_proj"), "layers_to_transform": (1,)},
    ),
    "bitfit": ({"targets": "q_proj"}, {"exclude": "k_proj", "layers_to_transform": (1,)}),
    "ln_tuning": ({"targets": "input_layernorm"}, {"exclude": ("model.norm",), "layers_to_transform": (1,)}),
    "houlsby": (
        {"reduction_factor": 8.0, "leave_out": (0,), "norm_before": True, "dropout": 0.1},
        {"reduction_factor": 4.0, "attention": False, "norm_before": True, "init": "mam_adapter", "scale": 2.0},
    ),
    "pfeiffer": (
        {"reduction_factor": 8.0, "non_linearity": "sigmoid"},
        {"reduction_factor": 4.0, "non_linearity": "sigmoid", "leave_out": (1,)},
    ),
    "parallel": (
        {"reduction_factor": 8.0},
        {"reduction_factor": 4.0, "leave_out": (1,), "dropout": 0.1},
    ),
    "prompt": ({"tokens": 3}, {"tokens": 3, "init": "vocabulary"}),
}
METHOD = {
    "biases": "lora",
    "dora": "lora",
    "projections": "vera",
    "orthogonal": "hra",
    "constrained": "oft",
    "bat": "miss",
}


def different(name: str, made: Any, workdir: Path) -> list[Member]:
    """Runs with the options of `DIFFERENT`."""
    members = []
    for index, options in enumerate(DIFFERENT[name]):
        made = made.copy_and_resolve_references()
        made.method = methods.make_config(METHOD.get(name, name), **options)
        members.append(member(made, workdir, seed=index))
    return members


def assert_trained_as_alone(members: list[Member], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train the members of a sweep in one program, and compare each with its own separate run."""
    sweep.sweep(members, root / "sweep")
    assert "separate programs" not in capsys.readouterr().out
    for one in members:
        train(one.config, root / "alone" / one.name)
        (file,) = (one.workdir / "adapter").glob("*.safetensors")
        assert_same_run(one.workdir, root / "alone" / one.name, f"adapter/{file.name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_members_with_adapters_in_different_layers_train_as_they_do_alone(
    name: str, small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = different(name, small, tmp_path / "sweep")
    assert sweep.populations(members) == [members]
    assert_trained_as_alone(members, tmp_path, capsys)


@pytest.mark.slow
def test_members_with_adapters_in_experts_of_different_layers_train_as_they_do_alone(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    fields = tiny.CONFIG | mixture | {"vocab_size": 257, "eos_token_id": 256}
    write_model(tmp_path / "model", fields | {"architectures": ["MixtralForCausalLM"]})
    options = (
        {"rank": 2, "targets": ("q_proj", "experts.down_proj")},
        {"rank": 3, "targets": ("experts.gate_up_proj",), "layers_to_transform": (1,)},
    )
    members = []
    for index, each in enumerate(options):
        made = small.copy_and_resolve_references()
        made.model.path, made.method = str(tmp_path / "model"), methods.make_config("lora", **each)
        members.append(member(made, tmp_path / "sweep", seed=index))
    assert_trained_as_alone(members, tmp_path, capsys)


LABELS = ("without", "with")


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    """A training of an encoder with dropout, also of its attention, and a new head, on texts of several lengths."""
    write_model(tmp_path / "model", BERT | {"architectures": ["BertModel"], "max_position_embeddings": 64})
    for name, count in (("train", 30), ("eval", 6)):
        records = [{"text": ("long " if n % 6 else "b " * 19) + "a" * (n % 2), "label": n % 2} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = defaults()
    made.model.path, made.task.kind, made.task.labels = str(tmp_path / "model"), "classification", LABELS
    made.data.train, made.data.eval = (str(tmp_path / "train.jsonl"),), (str(tmp_path / "eval.jsonl"),)
    made.data.prompt_template, made.data.max_length = "{text}", 48
    made.optim.learning_rate, made.optim.eps = 1e-2, 1e-4
    made.train.update({"steps": 6, "batch_size": 4, "log_every": 1, "eval_every": 2})
    made.checkpoint.every = 2
    return made


def seeds(made: Any, workdir: Path) -> list[Member]:
    return [member(made, workdir, seed=seed) for seed in (0, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt", "full"])
def test_runs_whose_new_heads_differ_are_one_population_and_resume_in_another(
    method: str, classifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier.method = methods.make_config(
        method, **{"prompt": {"tokens": 3}, "lora": {"dropout": 0.1}}.get(method, {})
    )
    assert [len(group) for group in sweep.populations(seeds(classifier, tmp_path / "sweep"))] == [3]
    found = sweep.sweep(seeds(classifier, tmp_path / "sweep"), tmp_path / "sweep", most=0, reduction=3)
    assert "population 1 of 1, 3 side by side" in capsys.readouterr().out
    assert sorted(entry.get("stopped", 6) for entry in found) == [2, 2, 6]
    sweep.sweep(seeds(classifier, tmp_path / "sweep"), tmp_path / "sweep", most=0)  # the two that were stopped
    assert "population 1 of 1, 2 side by side" in capsys.readouterr().out
    compared = {entry["run"] for entry in found[:2]}  # the one that was not stopped, and one that was
    for one in (each for each in seeds(classifier, tmp_path / "sweep") if each.name in compared):
        alone = tmp_path / "alone" / one.name
        train(one.config, alone)
        result = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
        assert_same_run(one.workdir, alone, result)


@pytest.mark.slow
def test_members_with_and_without_dropout_over_a_base_with_dropout_train_as_they_do_alone(
    classifier: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier.data.eval = ()
    classifier.train.update({"steps": 3, "eval_every": 0})
    options = (
        {"dropout": 0.3, "targets": "value"},
        {"dropout": 0.1, "targets": ("query", "value")},
        {"targets": "key"},
    )
    members = []
    for index, each in enumerate(options):
        classifier.method = methods.make_config("lora", **each)
        members.append(member(classifier, tmp_path / "sweep", seed=index))
    assert_trained_as_alone(members, tmp_path, capsys)


def test_a_member_has_the_base_of_a_separate_run_bit_by_bit(classifier: Any, tmp_path: Path) -> None:
    classifier.method, mesh = methods.make_config("lora", rank=2), sharding.make_mesh()
    heads = set()
    with jax.set_mesh(mesh):
        (united,) = unite_runs(seeds(classifier, tmp_path / "sweep"), mesh)
        for each in united.members:
            one = united.open(each)
            base = one.run.task.load_model(each.config.model, one.run.task.directory, mesh, each.config.seed)
            expected = tiny.bits(base)
            assert one.run.base == base_fingerprint(base)
            assert {path: tiny.in_bytes(one.run.frozen[path]) for path in expected} == expected
            head = expected["classifier.kernel"]
            assert tiny.in_bytes(one.state.trainable["classifier.adapters.default.kernel"]) == head
            heads.add(head)
    assert len(heads) == 3
    assert {"classifier.bias", "classifier.kernel"} < one.own.keys()
    assert united.shared.keys() | one.own.keys() >= expected.keys()
    assert not united.shared.keys() & one.own.keys()
