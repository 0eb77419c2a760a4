"""Hugging Face directories read and written; the safetensors package itself is the judge of the files."""

import fnmatch
import functools
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.io import hf_files, place, safetensors_files, shards
from peftjax.io.hf_files import find_model
from peftjax.io.load import load_model
from peftjax.io.random_model import make_random
from peftjax.io.save import save_model
from peftjax.models import from_hf_config
from peftjax.nn.slot import Adapter
from peftjax.quant.nf4 import Nf4
from peftjax.report.data import tree_bytes
from peftjax.tasks.prompt_format import PromptFormat
from peftjax.training import config as configs
from tests import tiny
from tests.runs import free_port

LAYERS, EMBED, MLP, VOCAB = 2, 16, 24, 32
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
GATE = "model.layers.1.mlp.gate_proj.weight"

Tensors = dict[str, np.ndarray]


def random_tensors() -> Tensors:
    """A checkpoint's tensors, named and shaped by hand: torch's [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, EMBED),
        "model.norm.weight": (EMBED,),
        "lm_head.weight": (VOCAB, EMBED),
    }
    for i in range(LAYERS):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (EMBED,),
            f"model.layers.{i}.post_attention_layernorm.weight": (EMBED,),
            f"model.layers.{i}.self_attn.q_proj.weight": (16, EMBED),
            f"model.layers.{i}.self_attn.k_proj.weight": (8, EMBED),
            f"model.layers.{i}.self_attn.v_proj.weight": (8, EMBED),
            f"model.layers.{i}.self_attn.o_proj.weight": (EMBED, 16),
            f"model.layers.{i}.mlp.gate_proj.weight": (MLP, EMBED),
            f"model.layers.{i}.mlp.up_proj.weight": (MLP, EMBED),
            f"model.layers.{i}.mlp.down_proj.weight": (EMBED, MLP),
        }
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write(directory: Path, tensors: Tensors, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_sharded(directory: Path, tensors: Tensors) -> dict[str, str]:
    """Two files and their index; returns the weight_map."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    where = {}
    for part in range(2):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        half = dict(list(tensors.items())[part::2])
        save_file(half, directory / name)
        where |= dict.fromkeys(half, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def values(model: Any) -> Tensors:
    return {path: np.asarray(variable.get_value()) for path, variable in variables.flat(model)[1].items()}


def assert_equal_bits(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for path in one:
        assert one[path].dtype == other[path].dtype, path
        assert one[path].tobytes() == other[path].tobytes(), path


# --- Loading ---


def test_each_parameter_is_its_stored_tensor_kernels_transposed_and_layers_stacked(tmp_path: Path) -> None:
    stored = random_tensors()
    loaded = values(load_model(write(tmp_path / "m", stored)))
    np.testing.assert_array_equal(loaded["embed.embedding"], stored["model.embed_tokens.weight"])
    np.testing.assert_array_equal(loaded["head.kernel"], stored["lm_head.weight"].T)
    np.testing.assert_array_equal(loaded["norm.scale"], stored["model.norm.weight"])
    for i in range(LAYERS):
        for ours, theirs in {"attention.key": "self_attn.k_proj", "feedforward.down": "mlp.down_proj"}.items():
            np.testing.assert_array_equal(
                loaded[f"blocks.{ours}.kernel"][i], stored[f"model.layers.{i}.{theirs}.weight"].T
            )
        np.testing.assert_array_equal(
            loaded["blocks.attention_norm.scale"][i], stored[f"model.layers.{i}.input_layernorm.weight"]
        )
    assert sum(array.size for array in loaded.values()) == sum(array.size for array in stored.values())


@pytest.mark.parametrize("stored_dtype", safetensors_files.FLOATS.values())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_stored_float_is_converted(tmp_path: Path, stored_dtype: Any, dtype: str) -> None:
    sign = (
        np.abs if stored_dtype is safetensors_files.FLOATS["F8_E8M0"] else np.positive
    )  # which holds powers of two only
    stored = {name: sign(array).astype(stored_dtype) for name, array in random_tensors().items()}
    loaded = values(load_model(write(tmp_path / "m", stored), dtype))
    assert {array.dtype for array in loaded.values()} == {np.dtype(dtype)}
    expected = stored[GATE].T.astype(dtype)
    assert loaded["blocks.feedforward.gate.kernel"][1].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.dtype("bfloat16")])
def test_a_dtype_may_be_one_of_jax(dtype: Any) -> None:
    model = load_model("embedded", dtype=dtype, param_dtype=np.float32)
    assert (model.config.dtype, model.config.param_dtype) == ("bfloat16", "float32")
    assert model.origin is not None
    assert (model.origin.options["dtype"], model.origin.options["param_dtype"]) == ("bfloat16", "float32")
    with pytest.raises(UserError, match="dtype=5 is not a dtype"):
        load_model("embedded", dtype=5)  # type: ignore[arg-type]


def test_a_network_of_a_user_has_no_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_model: a Linear is not a model from load_model"):
        save_model(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path / "model")  # type: ignore[arg-type]


def test_param_dtype_is_that_of_the_parameters_and_dtype_that_of_the_computation(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()), "bfloat16", param_dtype="float32")
    assert {array.dtype for array in values(model).values()} == {np.dtype("float32")}
    assert model(np.ones((1, 3), np.int32)).dtype == "bfloat16"


def test_a_loaded_model_is_placed_on_the_default_device_when_no_mesh_is_given(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    for path, variable in variables.flat(model)[1].items():
        assert variable.get_value().devices() == {jax.devices()[0]}, path


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4}, {"data": 8}])
def test_sharded_over_8_devices_equals_one_device_bit_for_bit(tmp_path: Path, sizes: dict[str, int]) -> None:
    directory = write(tmp_path / "m", random_tensors())
    mesh = sharding.make_mesh(sizes)
    model = load_model(directory, mesh=mesh)
    assert_equal_bits(values(model), values(load_model(directory)))
    for path, variable in variables.flat(model)[1].items():
        expected = sharding.as_jit_returns(sharding.spec(variable.axes, variable.shape, mesh))
        assert variable.get_value().sharding == expected, path
    gate = model.blocks.feedforward.gate.kernel.get_value()  # [L, D, F]
    split = (LAYERS, EMBED // sizes.get("fsdp", 1), MLP // sizes.get("tensor", 1))
    assert gate.addressable_shards[0].data.shape == split


def test_each_device_reads_only_its_slice_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Recorder:
        def __init__(self, view: np.ndarray) -> None:
            self.view = view

        def __getitem__(self, index: Any) -> np.ndarray:
            read.append(self.view[index].size)
            return self.view[index]

    open_file = safetensors_files.StoredTensor.open
    monkeypatch.setattr(safetensors_files.StoredTensor, "open", lambda tensor: Recorder(open_file(tensor)))
    load_model(write(tmp_path / "m", random_tensors()), mesh=sharding.make_mesh({"fsdp": 2, "tensor": 4}))
    assert max(read) == VOCAB * EMBED // 8  # the embedding, an eighth on each device


def test_sharded_files_load_like_one_file(tmp_path: Path) -> None:
    stored = random_tensors()
    write_sharded(tmp_path / "many", stored)
    assert_equal_bits(values(load_model(tmp_path / "many")), values(load_model(write(tmp_path / "one", stored))))


def test_make_random_needs_only_config_json_and_shards_do_not_change_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    one = values(make_random(tmp_path, "bfloat16", param_dtype="float32", seed=3))
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    model = make_random(tmp_path, "bfloat16", param_dtype="float32", seed=3, mesh=mesh)
    assert_equal_bits(one, values(model))
    kernel = model.blocks.attention.query.kernel
    expected = sharding.as_jit_returns(sharding.spec(kernel.axes, kernel.shape, mesh))
    assert kernel.get_value().sharding == expected
    assert 0.015 < one["blocks.attention.query.kernel"].std() < 0.025  # the config's default initializer_range is 0.02
    assert not np.array_equal(one["embed.embedding"], values(make_random(tmp_path, seed=4))["embed.embedding"])


@pytest.mark.parametrize("name", ["tinystories656k", "stories260k", "babyllama105"])
def test_real_checkpoints_load(assets: Path, name: str) -> None:
    stored = load_file(assets / name / "model.safetensors")
    model = load_model(assets / name)
    loaded = values(model)
    (embedding,) = stored.keys() & {"lm_head.weight", "model.embed_tokens.weight"}  # one of the tied pair
    np.testing.assert_array_equal(loaded["embed.embedding"], stored[embedding])
    assert "head.kernel" not in loaded
    assert sum(array.size for array in loaded.values()) == sum(array.size for array in stored.values())
    assert np.isfinite(model(np.arange(8, dtype=np.int32)[None])).all()


# --- What does not fit ---


def test_missing_and_unexpected_tensors_and_wrong_shapes_are_one_error_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = random_tensors()
    stored["model.layers.0.self_attn.query_proj.weight"] = stored.pop("model.layers.0.self_attn.q_proj.weight")
    del stored["model.norm.weight"]
    stored["score.weight"] = np.zeros((2, EMBED), np.float32)
    stored[GATE] = np.zeros((EMBED, MLP), np.float32)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)
    monkeypatch.setattr(safetensors_files.StoredTensor, "open", lambda tensor: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="do not match its config") as error:
        load_model(write(tmp_path / "m", stored))
    told = str(error.value)
    assert "2 missing: model.layers.0.self_attn.q_proj.weight, model.norm.weight\n" in told
    assert "2 unexpected: model.layers.0.self_attn.query_proj.weight Did you mean" in told
    assert ", score.weight" in told
    assert f"1 of a wrong shape: {GATE} is stored as [16, 24], but config.json asks for [24, 16]\n" in told
    assert "1 of a wrong dtype: lm_head.weight is stored as I8, but must be a float of 8 to 64 bits\n" in told


def test_long_lists_of_tensors_end_in_a_count(tmp_path: Path) -> None:
    stored = {f"transformer.{name}": array for name, array in random_tensors().items()}
    with pytest.raises(ValueError, match=r"21 missing: .* and 1 more\n  21 unexpected: .* and 1 more\n"):
        load_model(write(tmp_path / "m", stored))


def test_buffers_that_carry_nothing_are_accepted_in_silence_and_only_those(tmp_path: Path) -> None:
    stored = random_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    load_model(write(tmp_path / "m", stored))
    stored["model.layers.0.self_attn.rotary_emb.inv_freq.scale"] = np.ones(2, np.float32)
    stored["v_head.summary.weight"] = np.ones((1, EMBED), np.float32)
    named = r"ignoring tensors that its model_type does not have, .*: model\.layers\.0\..*\.inv_freq\.scale, v_head\.summary"
    with pytest.warns(UserWarning, match=named) as warned:
        model = load_model(write(tmp_path / "m", stored))
    assert len(warned) == 1
    assert_equal_bits(values(model), values(load_model(write(tmp_path / "plain", random_tensors()))))


def test_unexpected_tensors_beside_8_bit_ones_may_be_their_scales_and_are_refused(tmp_path: Path) -> None:
    stored = random_tensors() | {GATE: np.ones((MLP, EMBED), safetensors_files.FLOATS["F8_E4M3"])}
    with pytest.raises(ValueError, match=r"1 unexpected: .*gate_proj\.weight_scale_inv"):
        load_model(write(tmp_path / "m", stored | {f"{GATE}_scale_inv": np.ones((1, 1), np.float32)}))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_of_a_tied_pair_either_tensor_may_be_stored(tmp_path: Path, kept: str) -> None:
    stored = random_tensors()
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if kept not in (name, "both"):
            del stored[name]
    loaded = values(load_model(write(tmp_path / "m", stored, tie_word_embeddings=True)))
    np.testing.assert_array_equal(loaded["embed.embedding"], random_tensors()["model.embed_tokens.weight"])
    assert "head.kernel" not in loaded


def test_a_tied_pair_stored_as_two_different_tensors_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both are stored and differ; to keep both, set tie_word_embeddings to false"):
        load_model(write(tmp_path / "m", random_tensors(), tie_word_embeddings=True))


def test_a_tied_pair_of_which_none_is_stored_is_a_missing_embedding(tmp_path: Path) -> None:
    stored = random_tensors()
    del stored["lm_head.weight"], stored["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match=r"1 missing: model\.embed_tokens\.weight\n"):
        load_model(write(tmp_path / "m", stored, tie_word_embeddings=True))


def test_a_classifier_is_no_language_model(tmp_path: Path) -> None:
    stored = random_tensors()
    stored["score.weight"] = stored.pop("lm_head.weight")[:3]
    with pytest.raises(
        ValueError, match=r"1 missing: lm_head\.weight\n.*\nA classifier, .* cannot be loaded; use the model"
    ):
        load_model(write(tmp_path / "m", stored))


def test_other_quantized_formats_and_options_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", random_tensors())
    with pytest.raises(ValueError, match=r"quantize='nf' is not a format\. Did you mean 'nf4'"):
        load_model(directory, quantize="nf")
    with pytest.raises(ValueError, match="dtype='int32' is not one of float32, bfloat16, float16"):
        load_model(directory, "int32")
    with pytest.raises(ValueError, match="remat='blocks' is not one of none, dots, block, offload"):
        load_model(directory, remat="blocks")
    with pytest.raises(ValueError, match=r"skip='q_proj' .* is one string; give a tuple of names"):
        load_model(directory, quantize="nf4", skip="q_proj")
    packed = {GATE.replace("weight", "qweight"): np.zeros((2, MLP), np.int32)}
    write(tmp_path / "m", random_tensors() | packed, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"is quantized \(gptq\)"):
        load_model(directory)


def test_a_quantization_config_without_quantized_tensors_is_ignored_with_a_warning(tmp_path: Path) -> None:
    dense = load_model(write(tmp_path / "m", random_tensors()), quantize="nf4")
    for said, config in (
        ("bitsandbytes, nf4", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("gptq", {"quant_method": "gptq", "bits": 4}),
    ):
        directory = write(tmp_path / "m", random_tensors(), quantization_config=config)
        with pytest.warns(UserWarning, match=rf"ignoring quantization_config \({said}\), because no tensor") as warned:
            model = load_model(directory, quantize="nf4")
        assert len(warned) == 1
        np.testing.assert_array_equal(model(tiny.tokens() % VOCAB), dense(tiny.tokens() % VOCAB))
        assert isinstance(model.blocks.attention.query.kernel.get_value(), Nf4)
        with pytest.warns(UserWarning, match="ignoring quantization_config"):
            assert isinstance(make_random(directory).blocks.attention.query.kernel.get_value(), jax.Array)


def test_an_index_that_lists_an_absent_file_is_an_error(tmp_path: Path) -> None:
    write_sharded(tmp_path / "m", random_tensors())
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lists files that do not exist: model-00002-of-00002\.safetensors"):
        load_model(tmp_path / "m")


def test_an_index_that_lists_a_tensor_its_file_does_not_hold_is_an_error(tmp_path: Path) -> None:
    where = write_sharded(tmp_path / "m", random_tensors())
    (where[GATE],) = set(where.values()) - {where[GATE]}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=rf"lists tensors that are not in their files: {GATE} \(in {where[GATE]}\)"):
        load_model(tmp_path / "m")


def test_an_index_without_a_weight_map_is_an_error(tmp_path: Path) -> None:
    write_sharded(tmp_path / "m", random_tensors())
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_model(tmp_path / "m")


def test_an_unknown_home_directory_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^~nosuchuser/model: no such directory"):
        load_model("~nosuchuser/model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-5], r"damaged or truncated \(.*\); download or save it again"),
        (lambda data: data[:40], "not a safetensors file, or it is damaged or truncated"),
        (lambda data: b"", "not a safetensors file, or it is damaged or truncated"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer"),
        (lambda data: data[:8] + b"#" + data[9:], "invalid JSON in header"),
        (lambda data: data.replace(b'"F32"', b'"F99"', 1), "unknown variant `F99`"),
        (lambda data: data.replace(b'"F32"', b'"F16"', 1), "invalid shape, data type, or offset for tensor"),
        (lambda data: data.replace(b'"shape"', b'"shame"', 1), "missing field `shape`"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    file = write(tmp_path / "m", random_tensors()) / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path / "m")
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stored", "value"), [("float32", np.nan), ("bfloat16", np.inf), ("float16", -np.inf), ("float64", np.nan)]
)
def test_a_tensor_with_nan_or_inf_is_named(tmp_path: Path, stored: str, value: float) -> None:
    tensors = {name: array.astype(stored) for name, array in random_tensors().items()}
    tensors[GATE][3, 5] = value
    with pytest.raises(ValueError, match=rf"model\.safetensors: {GATE} holds NaN or Inf: its training diverged"):
        load_model(write(tmp_path / "m", tensors), "bfloat16")


def test_a_value_that_the_dtype_cannot_hold_is_named(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[GATE][3, 5] = -7e4
    message = rf"{GATE} holds values up to 7e\+04, which float16 cannot hold \(at most 6\.55e\+04\); load it with dtype"
    with pytest.raises(ValueError, match=message):
        load_model(write(tmp_path / "m", tensors), "float16")
    assert np.isfinite(load_model(tmp_path / "m", "bfloat16").blocks.feedforward.gate.kernel.get_value()).all()


def test_a_byte_order_mark_before_json_is_accepted(tmp_path: Path) -> None:
    file = write(tmp_path / "m", random_tensors()) / "config.json"
    expected = load_model(tmp_path / "m").config
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_model(tmp_path / "m").config == expected


def test_a_config_that_is_not_json_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m", random_tensors())
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, not a list"):
        load_model(tmp_path / "m")


# --- Where a model is ---


def test_a_directory_resolves_to_itself_and_embedded_to_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(tmp_path) == find_model(str(tmp_path)) == tmp_path
    package = Path(hf_files.__file__).parents[1]
    assert hf_files.EMBEDDED.relative_to(package).as_posix() == "assets/base"
    monkeypatch.setattr(hf_files, "EMBEDDED", tmp_path)
    assert find_model("embedded") == tmp_path


def test_a_local_path_that_does_not_exist_names_what_is_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama-small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("models/lama-small", "./models/lama-small", tmp_path / "models" / "lama-small"):
        with pytest.raises(ValueError, match=r"lama-small: no such directory\. Did you mean 'llama-small'\?"):
            find_model(path)
    with pytest.raises(ValueError, match=r"no such directory\. In .*models there are: llama-small"):
        find_model("./models/x")
    with pytest.raises(ValueError, match=r"Its parent .*nowhere does not exist either"):
        find_model(tmp_path / "nowhere" / "x")


def test_the_workdir_of_a_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(configs.to_json(configs.Config()))
    with pytest.raises(
        UserError, match=r"is the workdir of a training run, .*; give its base model, and .*adapter as the adapter"
    ):
        find_model(tmp_path)
    (tmp_path / "model").mkdir()  # of full fine-tuning
    with pytest.raises(UserError, match=f"; give {tmp_path / 'model'}$"):
        find_model(tmp_path)
    with pytest.raises(UserError, match=r"config\.json has no model_type"):
        from_hf_config({"architectures": ["UNet"]})


def test_a_file_a_revision_of_a_directory_and_an_adapter_are_refused(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", random_tensors())
    with pytest.raises(ValueError, match="is a file; give the directory"):
        find_model(directory / "model.safetensors")
    with pytest.raises(ValueError, match="is a directory and has no revision 'v2'"):
        find_model(directory, "v2")
    (directory / "config.json").rename(directory / "adapter_config.json")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        find_model(directory)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"not a model directory: config\.json is missing; it holds model\.safetensors"
    ):
        find_model(directory)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(
        ValueError, match=r"has neither model\.safetensors nor .*; it holds config\.json\. .*save_pretrained"
    ):
        load_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(
        ValueError, match=r"only pytorch_model\.bin, a pickle.* convert it to safetensors: .*save_pretrained"
    ):
        load_model(tmp_path)


def test_a_hub_id_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_model("some-owner/some.model", "v2") == tmp_path
    assert (asked["name"], asked["revision"]) == ("some-owner/some.model", "v2")

    def wanted(file: str) -> bool:
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    taken = ["config.json", "tokenizer.json", "model.safetensors", "model-00001-of-00002.safetensors", "chat.jinja"]
    left = ["pytorch_model.bin", "tokenizer.pkl", "model.pt", "consolidated.safetensors", "onnx/model.onnx"]
    assert all(map(wanted, [*taken, "model.safetensors.index.json"]))
    assert not any(map(wanted, left))


def test_offline_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match=r"Download it on a machine with network access .* or set HF_HOME") as error:
        find_model("owner/model")
    assert "owner/model is not a local directory" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_gated_model_needs_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise GatedRepoError("", response=Mock())

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"^owner/model is gated: .* log in with `hf auth login`$"):
        find_model("owner/model")


# --- Saving ---


@pytest.mark.slow_cases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 4}])
def test_load_of_save_is_the_same_bit_for_bit(tmp_path: Path, dtype: str, tied: bool, sizes: dict | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    model = make_random(tmp_path, dtype, mesh=sharding.make_mesh(sizes))
    save_model(model, tmp_path / "saved")
    assert_equal_bits(values(load_model(tmp_path / "saved", dtype)), values(model))
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}  # with a second entry, two saves of the same would differ
        assert set(file.keys()) == random_tensors().keys() - ({"lm_head.weight"} if tied else set())
        assert file.get_slice(GATE).get_dtype() == {"float32": "F32", "bfloat16": "BF16"}[dtype]
        gate = np.asarray(model.blocks.feedforward.gate.kernel.get_value()[1]).T
        np.testing.assert_array_equal(file.get_tensor(GATE), gate)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == (dtype, tied)
    assert not list(tmp_path.glob(".*"))


def test_shards_are_no_larger_than_asked_and_load_again(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    save_model(model, tmp_path / "saved", max_shard_bytes=5000)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 2
    sizes = []
    for name in files:
        held = load_file(tmp_path / "saved" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == held.keys()
        sizes.append(sum(array.nbytes for array in held.values()))
    assert max(sizes) <= 5000
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_equal_bits(values(load_model(tmp_path / "saved")), values(model))


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    save_model(model, tmp_path / "saved", max_shard_bytes=1)
    assert len(list((tmp_path / "saved").glob("model-*.safetensors"))) == len(random_tensors())
    assert_equal_bits(values(load_model(tmp_path / "saved")), values(model))


def test_the_tokenizer_processor_and_generation_files_of_the_source_are_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "m", random_tensors())
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    names |= {f"{kind}_config.json" for kind in ("preprocessor", "processor", "video_preprocessor")}
    for name in names | {"README.md", "pytorch_model.bin"}:
        (source / name).write_text(name)
    save_model(load_model(source), tmp_path / "saved", source=source)
    found = {file.name for file in (tmp_path / "saved").iterdir()}
    assert found == names | {"config.json", "model.safetensors"}
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "tokenizer.json"


def test_named_chat_templates_of_the_source_are_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "m", random_tensors())
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    for _ in "12":  # the second time it replaces the directory
        save_model(load_model(source), tmp_path / "saved", source=source)
        assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").read_text() == "for tools"


def test_the_model_of_a_run_is_replaced_with_its_prompt_format(tmp_path: Path) -> None:
    model, written = tiny.model(), PromptFormat("causal_lm", "completion", "{prompt}", "prompt")
    save_model(model, tmp_path / "model")
    written.save(tmp_path / "model")
    save_model(model, tmp_path / "model")  # as at the end of a run that was extended
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_a_full_disk_does_not_take_are_an_error_of_the_file_system(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors could not be written: .*File too large"):
            save_model(tiny.model(), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_saving_again_replaces_what_was_saved_and_nothing_of_it_stays(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    save_model(model, tmp_path / "saved", max_shard_bytes=5000)
    save_model(model, tmp_path / "saved", source=tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"config.json", "model.safetensors"}
    assert {entry.name for entry in tmp_path.iterdir()} == {"m", "saved"}


def test_a_directory_that_save_model_did_not_write_is_refused_and_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "m", random_tensors())
    model = load_model(source)
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match="is not a model directory written by save_model; choose another, or delete it"
    ):
        save_model(model, source)
    assert (source / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"config\.json is a file; give a directory"):
        save_model(model, source / "config.json")
    save_model(model, tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds more than a model and would be replaced: notes\.txt"):
        save_model(model, tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    save_model(model, tmp_path / "empty")


def test_a_model_is_saved_through_a_link_but_not_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for _ in range(2):
        save_model(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {file.name for file in (tmp_path / "here").iterdir()} == {"config.json", "model.safetensors"}
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="here is the working directory and cannot be replaced; give a new directory"):
        save_model(model, ".")


def test_a_save_that_fails_leaves_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    save_model(model, tmp_path / "saved")

    def fail(*_: Any) -> np.ndarray:
        raise OSError("disk full")

    monkeypatch.setattr(shards, "_fetch", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(model, tmp_path / "saved")
    assert {entry.name for entry in tmp_path.iterdir()} == {"m", "saved"}
    assert_equal_bits(values(load_model(tmp_path / "saved")), values(model))


def test_a_model_with_active_adapters_is_refused(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    slot = model.blocks.attention.query.adapters
    slot.add("mine", Adapter())
    slot.active = ("mine",)
    with pytest.raises(ValueError, match=r"adapters are active in the model: mine; .* merge or detach them first"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_may_be_read_by_whoever_may_read_the_config(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "m", random_tensors()))
    save_model(model, tmp_path / "saved", max_shard_bytes=5000)
    assert len({file.stat().st_mode for file in (tmp_path / "saved").iterdir()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_no_device_holds_more_than_its_part_while_a_model_is_loaded_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024}
    save_model(tiny.model(**sizes), tmp_path / "m")
    mesh, seen = sharding.make_mesh({"fsdp": 4, "tensor": 2}), []

    def watched(original: Callable, *arguments: Any) -> Any:
        result = original(*arguments)
        seen.append(tiny.on_a_device())
        return result

    for module, name in ((place, "_read"), (shards, "_fetch")):
        monkeypatch.setattr(module, name, functools.partial(watched, getattr(module, name)))
    gc.collect()
    before = tiny.on_a_device()
    model = load_model(tmp_path / "m", quantize=quantize, mesh=mesh)
    part = tree_bytes(nnx.state(model)) / 8
    largest = 1024 * 512 * 4  # the embedding and each kernel of the feedforward
    assert tiny.on_a_device() - before < 1.05 * part
    assert max(seen) - before < 1.05 * part + largest / 8 + 1
    seen.clear()
    save_model(model, tmp_path / "saved")
    assert max(seen) - before < 1.05 * part + 1.01 * largest  # one tensor at a time is gathered
    gc.collect()
    assert tiny.on_a_device() - before < 1.05 * part


PROCESS = """
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from flax import nnx
from peftjax import adapters, methods, sharding
from peftjax.io.load import load_model
from peftjax.io.save import save_model
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 8})
model = load_model(sys.argv[3], mesh=mesh)
assert len(jax.local_devices()) == 8
assert not model.embed.embedding.get_value().is_fully_addressable
adapters.attach(model, methods.Lora(rank=4, init="orthogonal"), rngs=nnx.Rngs(0))
sharding.place(model, mesh)
save_model(adapters.merge(model), sys.argv[4] + "-merged")
save_model(adapters.detach(model), sys.argv[4])
assert load_model(sys.argv[4]) is not None
"""


@pytest.mark.slow
def test_two_processes_load_their_parts_merge_and_save_the_whole(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    source = write(tmp_path / "m", random_tensors())
    arguments = [str(source), str(tmp_path / "saved")]
    commands = [[sys.executable, "-c", PROCESS, address, str(i), *arguments] for i in range(2)]
    root = Path(hf_files.__file__).parents[2]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) for command in commands]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert_equal_bits(load_file(tmp_path / "saved" / "model.safetensors"), random_tensors())
    alone = adapters.attach(load_model(source), methods.Lora(rank=4, init="orthogonal"), rngs=nnx.Rngs(0))
    save_model(adapters.merge(alone), tmp_path / "alone")
    together = load_file(tmp_path / "saved-merged" / "model.safetensors")
    for key, value in load_file(tmp_path / "alone" / "model.safetensors").items():
        np.testing.assert_allclose(together[key], value, atol=1e-6, err_msg=key)
