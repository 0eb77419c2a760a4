"""Adapter directories of Hugging Face PEFT, read and written; the safetensors package is the judge of the files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.adapters import provenance
from peftjax.adapters.registry import active
from peftjax.core import host_arrays, variables
from peftjax.core.fingerprint import fingerprint
from peftjax.io import adapter_save
from peftjax.io.adapter_copies import copies_in
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.io.model_card import CARD, without_mark

E, F, V, KV, L = 32, 40, 48, 16, 3  # embed, mlp, vocab, kv heads * head dim, layers
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYER = PREFIX + "model.layers.{}."

Tensors = dict[str, np.ndarray]


def attached(name: str = "default", model: Any = None, **options: Any) -> Any:
    model = tiny.model(attention_bias=True) if model is None else model
    return tiny.randomize(adapters.attach(model, methods.Lora(**options), name, rngs=nnx.Rngs(1)))


def random_tensors(*, layers: int = L, embed: int = E) -> Tensors:
    """The tensors of a LoRA of rank 8 on queries and values, named and shaped by hand."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        for target, out in (("q_proj", E), ("v_proj", KV)):
            module = f"{LAYER.format(layer)}self_attn.{target}"
            shapes[f"{module}.lora_A.weight"] = (8, embed)
            shapes[f"{module}.lora_B.weight"] = (out, 8)
    rng = np.random.default_rng(0)
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]} | config
    (directory / CONFIG).write_text(json.dumps(fields))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def values(model: Any) -> Tensors:
    return {path: np.asarray(leaf.get_value()) for path, leaf in variables.flat(model)[1].items()}


# --- What is written ---


def test_the_file_holds_the_keys_shapes_and_metadata_of_the_format(tmp_path: Path) -> None:
    model = attached(
        rank=4,
        targets=("q_proj", "embed_tokens"),
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        layers_to_transform=(),
        bias="lora_only",
        modules_to_save=("lm_head",),
    )
    assert save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    expected = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, V),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": (E, 4),
        f"{PREFIX}lm_head.weight": (V, E),
    }
    for layer, rank in enumerate((4, 2, 4)):
        query = f"{LAYER.format(layer)}self_attn.q_proj"
        expected[f"{query}.lora_A.weight"] = (rank, E)
        expected[f"{query}.lora_B.weight"] = (E, rank)
        expected[f"{query}.base_layer.bias"] = (E,)
    with safe_open(tmp_path / "adapter" / WEIGHTS, framework="numpy") as file:
        metadata = file.metadata()
        assert metadata.keys() == {"format", "peftjax.base", "peftjax.formats"}
        assert metadata["format"] == "pt"
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == expected  # noqa: SIM118
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {CONFIG, WEIGHTS, CARD}
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_each_tensor_is_its_parameter_transposed(tmp_path: Path) -> None:
    model = attached(rank=4, targets=("q_proj", "embed_tokens"), rank_pattern={"layers.1.self_attn.q_proj": 2})
    file = load_file(save_adapter(model, tmp_path / "adapter") / WEIGHTS)
    held = values(model)
    query, table = "blocks.attention.query.adapters.default", "embed.adapters.default"
    key = f"{LAYER.format(1)}self_attn.q_proj"
    np.testing.assert_array_equal(file[f"{key}.lora_A.weight"], held[f"{query}.a"][1, :, :2].T)
    np.testing.assert_array_equal(file[f"{key}.lora_B.weight"], held[f"{query}.b"][1, :2].T)
    np.testing.assert_array_equal(file[f"{PREFIX}model.embed_tokens.lora_embedding_A"], held[f"{table}.a"].T)
    np.testing.assert_array_equal(file[f"{PREFIX}model.embed_tokens.lora_embedding_B"], held[f"{table}.b"].T)


def test_layers_without_a_lora_are_not_in_the_file_but_their_trained_biases_are(tmp_path: Path) -> None:
    model = attached(rank=4, targets=("q_proj",), layers_to_transform=(1,), bias="all")
    keys = load_file(save_adapter(model, tmp_path / "adapter") / WEIGHTS).keys()
    assert {key for key in keys if "lora" in key} == {
        f"{LAYER.format(1)}self_attn.q_proj.lora_{side}.weight" for side in "AB"
    }
    assert {key for key in keys if key.endswith("q_proj.base_layer.bias")} == {
        f"{LAYER.format(1)}self_attn.q_proj.base_layer.bias"
    }
    assert {key for key in keys if key.endswith("proj.bias")} == {
        f"{LAYER.format(layer)}self_attn.{module}.bias"
        for layer in range(L)
        for module in ("q_proj", "k_proj", "v_proj", "o_proj")
        if (layer, module) != (1, "q_proj")
    }


def test_the_config_says_how_the_adapter_was_made(tmp_path: Path) -> None:
    model = attached(
        rank=4,
        alpha=6,
        dropout=0.25,
        targets=("q_proj", "v_proj"),
        exclude=r".*\.2\..*",
        rslora=True,
        rank_pattern=(("v_proj", 2), ("layers.1.self_attn.v_proj", 3)),
        alpha_pattern={"q_proj": 3},
        layers_to_transform=(1, 2),
        bias="all",
        modules_to_save=("lm_head",),
    )
    path = save_adapter(model, tmp_path / "adapter", base="owner/base")
    config = json.loads((path / CONFIG).read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "owner/base",
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": 4,
        "lora_alpha": 6,
        "lora_dropout": 0.25,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*\.2\..*",
        "bias": "all",
        "fan_in_fan_out": False,
        "use_dora": False,
        "ensure_weight_tying": False,
        "lora_bias": False,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2, "layers.1.self_attn.v_proj": 3},
        "alpha_pattern": {"q_proj": 3},
        "layers_to_transform": [1, 2],
        "modules_to_save": ["lm_head"],
        "init_lora_weights": True,
        "trainable_token_indices": None,
    }
    assert config == expected
    assert list(config["rank_pattern"]) == ["v_proj", "layers.1.self_attn.v_proj"]  # of two, the first counts
    assert (
        adapters.attached(load_adapter(tiny.model(attention_bias=True), path))["default"]
        == adapters.attached(model)["default"]
    )


def test_all_linear_is_written_as_names_because_layers_go_with_names_only(tmp_path: Path) -> None:
    path = save_adapter(attached(rank=2, exclude=("down_proj",)), tmp_path / "adapter")
    config = json.loads((path / CONFIG).read_text())
    assert config["target_modules"] == ["gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_saving_again_replaces_both_files_and_leaves_others(tmp_path: Path) -> None:
    path = save_adapter(attached(rank=2), tmp_path / "adapter")
    (path / "README.md").write_text("mine")
    save_adapter(attached(rank=4, targets=("q_proj",)), path)
    assert (path / "README.md").read_text() == "mine"
    assert json.loads((path / CONFIG).read_text())["r"] == 4
    assert len(load_file(path / WEIGHTS)) == 2 * L
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_a_save_that_fails_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(adapter_save, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(attached(rank=2), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_an_adapter_may_be_saved_into_the_working_directory_and_through_a_link_but_not_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapters.attach(tiny.model(), methods.Lora(rank=2), rngs=nnx.Rngs(0))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", tmp_path / "link", "~/home"):
        (Path(path).expanduser() / WEIGHTS).unlink(missing_ok=True)
        save_adapter(model, path)
        load_adapter(model, path, name="again")
        adapters.detach(model, "again")
    assert {file.name for file in tmp_path.iterdir()} == {"here", "link", "home"}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file; give a directory"):
        save_adapter(model, tmp_path / "file")


def test_what_is_not_attached_or_has_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'mien' is attached. Did you mean 'mine'\? Attached: \['mine'\]"):
        save_adapter(attached("mine", rank=2), tmp_path / "adapter", "mien")
    full = adapters.attach(tiny.model(), methods.Full(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="full has no adapter file; save the whole model with save_model"):
        save_adapter(full, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# --- What is read ---


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4},
        {"rank": 4, "targets": ("q_proj", "embed_tokens", "lm_head"), "rank_pattern": {"lm_head": 2}},
        {"rank": 4, "targets": r".*\.[01]\.mlp\..*", "bias": "all", "modules_to_save": ("embed_tokens", "k_proj")},
        {"rank": 4, "targets": ("v_proj", "k_proj"), "bias": "lora_only", "layers_to_transform": (0, 2)},
        {"rank": 4, "targets": ("q_proj", "embed_tokens"), "ensure_weight_tying": True},
        {"rank": 4, "modules_to_save": ("embed_tokens",), "ensure_weight_tying": True},
        {"rank": 4, "token_indices": {"embed_tokens": (3,), "lm_head": (5, 3)}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_load_of_save_is_the_same_bit_for_bit(options: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    fields = {"attention_bias": True, "tie_word_embeddings": tied}
    model = attached(model=tiny.model(**fields), **options)
    save_adapter(model, tmp_path / "one")
    back = load_adapter(tiny.model(**fields), tmp_path / "one", "back")
    assert active(back) == ("back",)
    save_adapter(back, tmp_path / "two", "back")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    np.testing.assert_array_equal(back(tiny.tokens()), model(tiny.tokens()))


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", [methods.Lora(rank=4), methods.Houlsby(reduction_factor=4)])
def test_names_may_have_dashes_and_dots(method: methods.Method, tmp_path: Path) -> None:
    model = adapters.attach(tiny.model(), method, "my-adapter", rngs=nnx.Rngs(0))
    model = tiny.randomize(adapters.attach(model, method, "my-adapter.v2", rngs=nnx.Rngs(1)))
    adapters.use(model, "my-adapter.v2")
    expected = model(tiny.tokens())
    load_adapter(model, save_adapter(model, tmp_path / "a", "my-adapter.v2"), "v-2.x")
    adapters.detach(model, "my-adapter.v2")
    assert adapters.attached(model).keys() == {"my-adapter", "v-2.x"}
    np.testing.assert_array_equal(model(tiny.tokens()), expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_any_stored_float_is_read(dtype: Any, tmp_path: Path) -> None:
    stored = {key: value.astype(dtype) for key, value in random_tensors().items()}
    held = values(load_adapter(tiny.model(), write(tmp_path / "a", stored)))
    query = f"{LAYER.format(2)}self_attn.q_proj"
    for leaf, name in (("a", "lora_A"), ("b", "lora_B")):
        value = held[f"blocks.attention.query.adapters.default.{leaf}"]
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value[2], stored[f"{query}.{name}.weight"].astype(np.float32).T)


def test_an_adapter_of_bfloat16_is_stored_so(tmp_path: Path) -> None:
    path = save_adapter(attached(rank=2, dtype="bfloat16"), tmp_path / "adapter")
    assert {value.dtype for value in load_file(path / WEIGHTS).values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_entries_that_match_nothing_are_one_warning_in_a_file_and_an_error_in_ones_own_config(tmp_path: Path) -> None:
    targets = ["q_proj", "v_proj", "v_porj"]
    path = write(tmp_path / "a", random_tensors(), target_modules=targets, rank_pattern={"k_proj": 2}, bias="all")
    with pytest.warns(
        UserWarning, match=r"in this model: target_modules 'v_porj'; rank_pattern 'k_proj'; bias='all'"
    ) as caught:
        model = load_adapter(tiny.model(), path)
    assert len(caught) == 1
    assert adapters.attached(model)["default"] == methods.Lora(rank=8, alpha=8, targets=("q_proj", "v_proj"))
    path = write(tmp_path / "b", random_tensors(), target_modules=r"language_model\.(q|v)_proj")
    with pytest.warns(
        UserWarning, match=r"in this model: target_modules 'language_model.*'"
    ):  # the tensors name the targets
        model = load_adapter(tiny.model(), path)
    assert model.blocks.attention.query.adapters.default.ranks == (8, 8, 8)
    for options in ({"targets": targets}, {"rank_pattern": {"k_proj": 2}}, {"bias": "all"}):
        with pytest.raises(
            ValueError, match=r"'v_porj' matches no layer|'k_proj' matches no target|no layer .* has a bias"
        ):
            adapters.attach(tiny.model(), methods.Lora(**{"targets": targets[:2], **options}), rngs=nnx.Rngs(0))


def test_a_field_that_peft_does_not_have_is_ignored_unless_a_newer_peft_wrote_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors(), peft_version="0.21.2", something_new=3, other=None)
    with pytest.warns(UserWarning, match="something_new=3 is ignored, since peft has no such field"):
        load_adapter(tiny.model(), path)
    newer = write(tmp_path / "b", random_tensors(), peft_version="0.22.0.dev0", something_new=3)
    assert_refused(newer, "something_new=3 is not supported for LORA")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_tensor_with_values_that_are_not_finite_is_named(wrong: float, tmp_path: Path) -> None:
    tensors = random_tensors()
    key = f"{LAYER.format(1)}self_attn.v_proj.lora_B.weight"
    tensors[key][2, 3] = wrong
    assert_refused(write(tmp_path / "a", tensors), rf"{key}: 1 of {8 * KV} values are NaN or infinite")


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors())
    (path / CONFIG).write_text((path / CONFIG).read_text(), encoding="utf-8-sig")
    assert active(load_adapter(tiny.model(), path)) == ("default",)


def test_a_prefix_of_the_keys_is_named_and_two_readings_of_a_key_are_refused(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = write(tmp_path / "a", {f"module.{key}": value for key, value in tensors.items()})
    with pytest.warns(UserWarning, match=rf"12 keys differ .* \(module\.{PREFIX}.* is read as {PREFIX}"):
        load_adapter(tiny.model(), path)
    twice = {f"{before}.{key}": value for key, value in tensors.items() for before in ("module", "_orig_mod")}
    assert_refused(write(tmp_path / "b", twice), "does not match its config and this model: missing .* unexpected")


def test_the_least_config_means_rank_8_and_alpha_8(tmp_path: Path) -> None:
    model = load_adapter(tiny.model(), write(tmp_path / "a", random_tensors()))
    assert adapters.attached(model)["default"] == methods.Lora(rank=8, alpha=8, targets=("q_proj", "v_proj"))
    np.testing.assert_array_equal(values(model)["blocks.attention.query.adapters.default.scale"], np.ones((L, 8)))


def test_a_string_of_targets_is_a_regular_expression(tmp_path: Path) -> None:
    stored = {key: value for key, value in random_tensors().items() if ".layers.1." not in key}
    model = load_adapter(tiny.model(), write(tmp_path / "a", stored, target_modules=r".*\.(0|2)\.self_attn\.[qv]_proj"))
    assert model.blocks.attention.query.adapters.default.ranks == (8, 0, 8)


# As peft 0.21.2 writes it, whatever is not asked for in its empty form.
PEFT_FIELDS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "somewhere", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8,
    "rank_pattern": {}, "revision": None, "target_parameters": None, "task_type": "CAUSAL_LM",
    "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    "velora_config": None,
}  # fmt: skip


@pytest.mark.parametrize("init", [True, None])
def test_the_full_config_of_peft_is_read(init: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors(), **PEFT_FIELDS | {"init_lora_weights": init})
    model = load_adapter(tiny.model(), path)
    assert adapters.attached(model)["default"] == methods.Lora(rank=8, alpha=8, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian' describes how the adapter was trained"),
        (
            {"init_lora_weights": False, "loftq_config": {"bits": 4}},
            r"init_lora_weights=False, loftq_config={'bits': 4}",
        ),
    ],
)
def test_what_only_says_how_it_was_trained_is_read_with_a_note(
    fields: dict[str, Any], note: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=note):
        model = load_adapter(tiny.model(), write(tmp_path / "a", random_tensors(), **PEFT_FIELDS | fields))
    assert adapters.attached(model)["default"] == methods.Lora(rank=8, alpha=8, targets=("q_proj", "v_proj"))


@pytest.mark.parametrize("version", [None, "0.17.1"])
def test_the_series_of_an_older_peft_is_warned_of(version: str | None, tmp_path: Path) -> None:
    oft = methods.Oft(block_size=8, targets=("q_proj",))
    path = save_adapter(adapters.attach(tiny.model(), oft, rngs=nnx.Rngs(0)), tmp_path / "a")
    load_adapter(tiny.model(), path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": version}))
    with pytest.warns(UserWarning, match=r"another series for use_cayley_neumann before 0\.18"):
        load_adapter(tiny.model(), path)


@pytest.mark.parametrize("layers", [1, [1]])
def test_one_layer_may_be_a_number_or_a_list(layers: Any, tmp_path: Path) -> None:
    stored = {key: value for key, value in random_tensors().items() if ".layers.1." in key}
    model = load_adapter(tiny.model(), write(tmp_path / "a", stored, layers_to_transform=layers))
    assert model.blocks.attention.query.adapters.default.ranks == (0, 8, 0)


@pytest.mark.slow
def test_parameters_of_the_base_are_gathered_in_the_same_order_by_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, gathered = tiny.quantized(tiny.model(tie_word_embeddings=True)), list[str]()

    def whole(array: jax.Array) -> np.ndarray:
        gathered.append(fingerprint({"array": array}))
        return np.asarray(array)

    monkeypatch.setattr(host_arrays, "whole", whole)
    table = np.asarray(model.embed.embedding.get_value())
    query = np.asarray(model.blocks.attention.query.kernel.get_value().astype(jnp.float32)[1]).T
    copies = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    copies["model.layers.1.self_attn.q_proj.base_layer.weight"] = query
    assert copies_in(model, "default", copies, list(copies)) == set(copies)
    assert copies_in(model, "default", copies, list(copies)[::-1]) == set(copies)
    assert len(gathered) == 6
    assert gathered[:3] == gathered[3:]


def test_copies_of_the_base_in_the_file_are_recognised(tmp_path: Path) -> None:
    model = tiny.model()
    held = values(model)
    copies = {
        f"{PREFIX}model.embed_tokens.base_layer.weight": held["embed.embedding"],
        f"{PREFIX}_orig_mod.lm_head.base_layer.weight": held["head.kernel"].T.copy(),
        f"{PREFIX}model.norm.weight": held["norm.scale"].astype(ml_dtypes.bfloat16),
        f"{LAYER.format(2)}mlp.up_proj.weight": held["blocks.feedforward.up.kernel"][2].T.copy(),
    }
    load_adapter(model, write(tmp_path / "a", random_tensors() | copies))
    for key, value in copies.items():
        other = random_tensors() | {key: value + value.dtype.type(1)}
        with pytest.raises(ValueError, match=f"{key} differs from this model's parameter: .* trained on another base"):
            load_adapter(tiny.model(), write(tmp_path / "b", other))


def test_a_float16_copy_is_that_of_a_base_in_bfloat16(tmp_path: Path) -> None:
    table = values(tiny.model())["embed.embedding"].astype(np.float16)
    base = tiny.model(dtype="bfloat16")
    base.embed.embedding.set_value(jnp.asarray(table).astype(jnp.bfloat16))
    load_adapter(base, write(tmp_path, random_tensors() | {f"{PREFIX}model.embed_tokens.weight": table}))


def test_a_table_with_new_rows_is_used_but_not_that_of_a_target(tmp_path: Path) -> None:
    table = values(tiny.model())["embed.embedding"].copy()
    table[[3, 7]] += 1
    key = f"{PREFIX}model.embed_tokens.weight"
    with pytest.warns(UserWarning, match=r"the rows 3, 7 of model.embed_tokens differ from this model's"):
        model = load_adapter(tiny.model(), write(tmp_path / "a", random_tensors() | {key: table}))
    np.testing.assert_array_equal(model.embed.adapters.default.embedding.get_value(), table)
    assert adapters.attached(model)["default"].modules_to_save == ("model.embed_tokens",)  # type: ignore[attr-defined]
    wrapped = f"{PREFIX}model.embed_tokens.base_layer.weight"
    message = rf"{wrapped} differs from this model's parameter in 2 of {V} rows \(3, 7\), as happens when tokens"
    assert_refused(write(tmp_path / "c", random_tensors() | {wrapped: table}), message)
    longer = np.concatenate([table, table[:2]])
    message = rf"{key} differs from this model's parameter in shape: \({V + 2}, {E}\) instead of \({V}, {E}\)"
    assert_refused(write(tmp_path / "b", random_tensors() | {key: longer}), message)


def test_a_tied_heads_copy_of_the_base_is_recognised(tmp_path: Path) -> None:
    model = tiny.model(tie_word_embeddings=True)
    copy = {f"{PREFIX}lm_head.base_layer.weight": values(model)["embed.embedding"]}
    load_adapter(model, write(tmp_path / "a", random_tensors() | copy))


# --- What is refused ---


def assert_refused(path: Path, message: str) -> None:
    """The error, and a model that is what it was, with the adapter active that was."""
    model = attached("before", tiny.model(), rank=2, targets=("q_proj",))
    graph, before = nnx.split(model)[0], variables.flat(model)[1]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, path)
    assert nnx.split(model)[0] == graph
    after = variables.flat(model)[1]
    assert {name: leaf.get_value() is before[name].get_value() for name, leaf in after.items()} == dict.fromkeys(
        before, True
    )


def test_a_task_head_of_a_language_model_is_refused_by_name(tmp_path: Path) -> None:
    message = "task_type 'SEQ_CLS' needs a model with that task head, .* language models have none in peftjax"
    assert_refused(write(tmp_path / "a", random_tensors(), task_type="SEQ_CLS"), message)


def test_missing_and_unexpected_tensors_are_one_error_that_lists_both(tmp_path: Path) -> None:
    tensors = random_tensors()
    missing = f"{LAYER.format(1)}self_attn.v_proj.lora_B.weight"
    tensors["extra.weight"] = tensors.pop(missing)
    message = f"does not match its config and this model: missing {missing}; unexpected extra.weight"
    assert_refused(write(tmp_path / "a", tensors), message)


@pytest.mark.parametrize(
    "key", ["lora_A.default.weight", "lora_magnitude_vector", "lora_B.bias", "base_layer.bias", "base_layer.weight"]
)
def test_a_tensor_that_nothing_reads_is_named(key: str, tmp_path: Path) -> None:
    name = f"{LAYER.format(0)}self_attn.q_proj.{key}"
    message = "differs from this model's parameter" if key == "base_layer.weight" else f"unexpected {name}"
    assert_refused(write(tmp_path / "a", random_tensors() | {name: np.zeros(E, np.float32)}), message)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = random_tensors()
    key = f"{LAYER.format(1)}self_attn.q_proj.lora_A.weight"
    tensors[key] = tensors[key][:4]
    message = rf"{key} has shape \(4, 32\), but this model needs \(8, 32\); adapter_config.json gives a different rank$"
    assert_refused(write(tmp_path / "a", tensors), message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"embed": 64}, r"q_proj.lora_A.weight has shape \(8, 64\), but this model needs \(8, 32\); .* another base"),
        ({"layers": 2}, r"missing base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"),
        ({"layers": 4}, r"unexpected base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"),
    ],
)
def test_an_adapter_for_another_base_is_refused(sizes: dict[str, int], message: str, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a", random_tensors(**sizes)), message)


def test_an_adapter_trained_on_other_weights_of_the_same_shapes_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    path = save_adapter(attached(rank=2, targets=("q_proj",)), tmp_path / "a")
    bfloat16 = load_adapter(tiny.model(dtype="bfloat16"), path)
    assert active(bfloat16) == ("default",)
    other = tiny.model()
    up = other.blocks.feedforward.up.kernel
    up.set_value(up.get_value() + 1e-3)
    with pytest.raises(ValueError, match=r"trained on another base: .* in blocks.feedforward.up.kernel. Load the base"):
        load_adapter(other, path)
    assert active(other) == ()
    assert active(load_adapter(other, path, any_base=True)) == ("default",)


def test_an_adapter_saved_while_it_is_merged_is_still_one_for_the_base_beneath(tmp_path: Path) -> None:
    model = tiny.randomize(attached(rank=2, targets=("q_proj", "lm_head")))
    adapters.attach(model, methods.Lora(rank=2, targets=("v_proj",)), "later", rngs=nnx.Rngs(0))
    path = save_adapter(adapters.merge(adapters.merge(model), "later"), tmp_path / "a")
    assert active(load_adapter(tiny.model(), path)) == ("default",)
    with pytest.raises(ValueError, match=r"trained on another base: .* blocks.attention.query.kernel, head.kernel"):
        load_adapter(tiny.model(), save_adapter(model, tmp_path / "later", "later"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("arrow_config", {"top_k": 2}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_a_field_that_is_not_supported_is_named_with_its_value(field: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors(), **{field: value})
    with pytest.raises(ValueError, match=rf"adapter_config.json: {field}=.* not supported"):
        load_adapter(tiny.model(), path)


def of_kasa(tensors: Tensors) -> Tensors:
    diagonals = {
        key.replace("lora_A.weight", "lora_diag"): np.ones(8, np.float32) for key in tensors if "lora_A" in key
    }
    return tensors | diagonals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"kasa_config=.* is not supported for LORA"),
        ({"init_lora_weights": "pissa"}, r"kasa_config=.* is not supported for LORA"),
        ({"r": 8.5}, r"r must be a number of ranks or blocks, got 8.5"),
        ({"lora_alpha": 0}, r"with rank 8 and scale 0 is not supported for model.layers.0.self_attn.q_proj"),
        (
            {"target_modules": ["q_proj", "v_proj", "k_proj"]},
            r"kasa_config needs .*k_proj.lora_A.weight, which is missing",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(singular values|subtracts the initial update)")
def test_a_kasa_that_cannot_be_recomputed_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """tests/interop/test_adapter_files.py compares those that are read with peft."""
    path = write(tmp_path / "a", of_kasa(random_tensors()), **{"kasa_config": {"beta": 1.0}} | fields)
    assert_refused(path, message)


@pytest.mark.filterwarnings("ignore:.*singular values")
def test_a_kasa_needs_the_kernels_that_it_was_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a", of_kasa(random_tensors()), kasa_config={})
    load_adapter(tiny.model(), path)
    with pytest.raises(ValueError, match="cannot be recomputed from nf4 kernels; load the base without quantize="):
        load_adapter(tiny.quantized(tiny.model()), path)


@pytest.mark.filterwarnings("ignore:.*singular values")
def test_a_kasa_of_a_tied_head_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}lm_head.lora_{factor}.weight": np.ones(shape, np.float32)
        for factor, shape in (("A", (8, E)), ("B", (V, 8)))
    }
    path = write(tmp_path / "a", of_kasa(tensors), kasa_config={}, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="not supported for lm_head, whose kernel is tied to the embedding"):
        load_adapter(tiny.model(tie_word_embeddings=True), path)


@pytest.mark.parametrize(
    ("kind", "tensors", "fields", "message"),
    [
        ("GRALORA", {"gralora_A": (2, 16, 5), "gralora_B": (2, 5, 16)}, {}, r"do not match GRALORA"),
        ("GRALORA", {"gralora_A": (2, 16, 4)}, {}, r"the tensors of .*q_proj, .*, do not match GRALORA"),
        (
            "GRALORA",
            {"gralora_A": (2, 16, 4), "gralora_B": (2, 4, 16)},
            {"gralora_k": "2"},
            r"gralora_k must be a number of ranks or blocks, got '2'",
        ),
        (
            "GRALORA",
            {"gralora_A": (2, 16, 4), "gralora_B": (2, 4, 16)},
            {"use_dora": True},
            r"use_dora=True is not supported",
        ),
        (
            "GRALORA",
            {"gralora_A": (2, 16, 4), "gralora_B": (2, 4, 16)},
            {"r": 6},
            r"needs \(12, 32\); .* a different rank",
        ),
        ("DELORA", {"delora_A": (8, 32), "delora_B": (32, 8), "delora_lambda": (1,)}, {}, r"do not match DELORA"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is read as a LoRA")
def test_tensors_that_are_no_lora_are_refused(
    kind: str, tensors: dict[str, tuple[int, ...]], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    module = f"{LAYER.format(0)}self_attn.q_proj"
    arrays = {f"{module}.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()}
    options = {"peft_type": kind, "r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    assert_refused(write(tmp_path / "a", arrays, **options | fields), message)


def test_target_parameters_that_match_nothing_are_ignored_with_a_warning(tmp_path: Path) -> None:
    """As target_modules are; tests/interop/test_moe.py has models with experts."""
    path = write(tmp_path / "a", random_tensors(), target_parameters=["mlp.experts"])
    with pytest.warns(UserWarning, match="ignoring entries that match nothing in this model: .*'mlp.experts'"):
        load_adapter(tiny.model(), path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "BONE"}, r"adapter_config.json: peft_type 'BONE' is not supported; supported: .*LORA"),
        ({"peft_type": None}, r"peft_type None is not supported"),
        ({"target_modules": None}, r"adapter_config.json: target_modules is missing; LORA needs it"),
        (
            {"trainable_token_indices": {"lm_haed": [1]}},
            r"'lm_haed' matches neither an embedding nor a head. Did you mean 'lm_head'",
        ),
        ({"r": 8.5}, r"rank must be a positive integer, got 8.5"),
        ({"target_parameters": "mlp.experts"}, r"adapter_config.json: target_parameters must be a list of strings"),
        ({"bias": "some"}, r"method.bias must be one of none, all, lora_only, got 'some'"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a", random_tensors(), **fields), message)


def test_a_directory_without_its_files_says_what_is_missing_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such directory; give the one that holds"):
        load_adapter(tiny.model(), tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"adapter on the hub, give huggingface_hub\.snapshot_download\('some/adapter'\)"
    ):
        load_adapter(tiny.model(), "some/adapter")
    path = write(tmp_path / "a", random_tensors())
    (path / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"not an adapter directory: {CONFIG} is missing; it holds {WEIGHTS}"):
        load_adapter(tiny.model(), path)
    write(path, random_tensors())
    with pytest.raises(
        ValueError, match=f"not an adapter directory: {CONFIG} is missing; give {tmp_path / 'adapter'}$"
    ):
        load_adapter(tiny.model(), write(tmp_path / "adapter", random_tensors()).parent)
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "b", random_tensors())
    write(tmp_path / "two" / "a", random_tensors())
    with pytest.raises(
        ValueError, match=f"{CONFIG} is missing; give {tmp_path / 'two' / 'a'} or {tmp_path / 'two' / 'b'}$"
    ):
        load_adapter(tiny.model(), tmp_path / "two")
    with pytest.raises(ValueError, match=f"{WEIGHTS} is a file; give the directory that holds {CONFIG} and {WEIGHTS}"):
        load_adapter(tiny.model(), tmp_path / "adapter" / WEIGHTS)
    (path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"not an adapter directory: {WEIGHTS} is missing; it holds {CONFIG}"):
        load_adapter(tiny.model(), path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors())
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.raises(ValueError, match=r"only adapter_model.bin, a pickle\. .* convert it to safetensors"):
        load_adapter(tiny.model(), path)
    save_file(random_tensors(), path / WEIGHTS)
    load_adapter(tiny.model(), path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", random_tensors())
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a safetensors file, or it is damaged or truncated"):
        load_adapter(tiny.model(), path)
    (path / WEIGHTS).write_bytes(whole)
    (path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=f"{CONFIG} is not valid JSON"):
        load_adapter(tiny.model(), path)


def test_a_name_that_is_taken_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model = attached("default", rank=2, targets=("q_proj",))
    held = values(model)
    with pytest.raises(ValueError, match="adapter 'default' is already attached"):
        load_adapter(model, write(tmp_path / "a", random_tensors()))
    assert active(model) == ("default",)
    assert all(np.array_equal(value, held[path]) for path, value in values(model).items())


# --- The name of the base, and the model card ---


def test_a_loaded_adapter_keeps_the_name_of_its_base_until_another_is_given(tmp_path: Path) -> None:
    def named(path: Path) -> tuple[Any, Any]:
        config = json.loads((path / CONFIG).read_text())
        return config["base_model_name_or_path"], config["revision"]

    path = save_adapter(attached(rank=2, targets=("q_proj",)), tmp_path / "a", base="owner/base")
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(config | {"revision": "v1"}))
    model = load_adapter(load_adapter(tiny.model(attention_bias=True), path), path, "other")
    adapters.detach(model, "default")
    for name in ("other", "again"):  # also after a detour through a second file
        path = save_adapter(model, tmp_path / name, name)
        assert named(path) == ("owner/base", "v1")
        assert "base_model: owner/base\n" in (path / CARD).read_text()
        model = load_adapter(tiny.model(attention_bias=True), path, "again")
    assert named(save_adapter(model, tmp_path / "mine", "again", base="my/base")) == ("my/base", None)
    unnamed = save_adapter(attached(rank=2, targets=("q_proj",)), tmp_path / "unnamed")
    assert named(unnamed) == (None, None)
    assert provenance.base_name(load_adapter(tiny.model(attention_bias=True), unnamed), "default") is None


def test_a_card_is_replaced_unless_somebody_wrote_or_edited_it(tmp_path: Path) -> None:
    path = save_adapter(attached(rank=2, targets=("q_proj",)), tmp_path / "a")
    first = (path / CARD).read_text()
    save_adapter(attached(rank=2, targets=("q_proj",)), path, base="owner/base")
    second = (path / CARD).read_text()
    assert "an unknown base model" in first
    assert "adapter for owner/base" in second
    for mine in ("# Mine\n", second.replace("Lora adapter", "My adapter"), without_mark(second), second + "More.\n"):
        assert mine != second
        (path / CARD).write_text(mine)
        save_adapter(attached(rank=2, targets=("q_proj",)), path)
        assert (path / CARD).read_text() == mine
