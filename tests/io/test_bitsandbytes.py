"""4-bit directories without bitsandbytes: what was written comes back, and what does not fit is told.

That they are its own is shown in tests/interop/test_bitsandbytes.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.core.fingerprint import fingerprint
from peftjax.io import bitsandbytes, safetensors_files
from peftjax.io.load import load_model
from peftjax.io.random_model import make_random
from peftjax.io.save import save_model
from peftjax.quant.nf4 import Nf4

QUERY = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{QUERY}.quant_state.bitsandbytes__nf4"

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    """config.json and the tensors of a small model in NF4; its rows are no multiples of 64."""
    directory = tmp_path_factory.mktemp("nf4") / "model"
    save_model(tiny.quantized(tiny.model()), directory)
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")


@pytest.fixture
def rewritten(written: tuple[dict[str, Any], Tensors], tmp_path: Path) -> Callable[..., Path]:
    """The directory again, with other fields of its quantization_config, of a quant_state, or other tensors."""

    def write(config: Any = (), state: Any = (), **tensors: np.ndarray | None) -> Path:
        fields, stored = written
        fields = fields | {"quantization_config": fields["quantization_config"] | dict(config)}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        changed = json.loads(stored[STATE].tobytes()) | dict(state)
        stored = stored | {STATE: np.frombuffer(json.dumps(changed).encode(), np.uint8)}
        stored |= {QUERY + ending: array for ending, array in tensors.items() if array is not None}
        gone = [QUERY + ending for ending, array in tensors.items() if array is None]
        save_file({key: array for key, array in stored.items() if key not in gone}, tmp_path / "model.safetensors")
        return tmp_path

    return write


def values(model: Any) -> dict[str, Any]:
    return {path: variable.get_value() for path, variable in variables.flat(model)[1].items()}


@pytest.mark.parametrize("format_", ["nf4", pytest.param("nf4_single", marks=pytest.mark.slow)])
def test_a_written_model_comes_back_with_every_bit_in_shards_too(format_: str, tmp_path: Path) -> None:
    model = tiny.quantized(tiny.model(hidden_size=64, intermediate_size=80, num_hidden_layers=2), format_)
    save_model(model, tmp_path / "model", max_shard_bytes=25_000)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert all(sum(array.nbytes for array in load_file(file).values()) <= 25_000 for file in files)
    back = load_model(tmp_path / "model")
    assert fingerprint(values(back)) == fingerprint(values(model))
    np.testing.assert_array_equal(back(tiny.tokens()), model(tiny.tokens()))
    save_model(back, tmp_path / "again", max_shard_bytes=25_000)
    for file in files:
        one, other = load_file(file), load_file(tmp_path / "again" / file.name)
        assert {key: array.tobytes() for key, array in one.items()} == {
            key: array.tobytes() for key, array in other.items()
        }


def test_no_kernel_is_read_as_anything_but_its_codes(
    rewritten: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = safetensors_files.StoredTensor.open
    monkeypatch.setattr(
        safetensors_files.StoredTensor, "open", lambda tensor: (opened.append(tensor.name), open_file(tensor))[1]
    )
    model = load_model(rewritten(), "bfloat16", quantize="nf4")
    assert sum(isinstance(value, Nf4) for value in values(model).values()) == 7
    assert not [name for name in opened if "_proj" in name]


def test_a_merged_layer_is_written_as_the_array_it_is_and_named_among_the_skipped(tmp_path: Path) -> None:
    model = adapters.attach(tiny.quantized(tiny.model()), methods.Lora(targets=("q_proj",)), rngs=nnx.Rngs(0))
    adapters.merge(tiny.randomize(model))
    save_model(model, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["lm_head", *(f"model.layers.{i}.self_attn.q_proj" for i in range(3))]
    back = load_model(tmp_path / "merged")
    assert isinstance(back.blocks.attention.query.kernel.get_value(), jax.Array)
    np.testing.assert_array_equal(back(tiny.tokens()), model(tiny.tokens()))


def test_a_model_whose_kernels_are_all_arrays_again_is_no_quantized_one_any_more(
    rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_model(rewritten())
    decoded = {path: value.astype(np.float32) for path, value in values(model).items() if isinstance(value, Nf4)}
    variables.update(model, decoded)
    save_model(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_int8_kernels_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kernel is in int8, which Hugging Face directories cannot hold"):
        save_model(tiny.quantized(tiny.model(), "int8"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_text_model_of_a_multimodal_directory_may_be_in_nf4(
    written: tuple[dict[str, Any], Tensors], rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    expected = load_model(rewritten())(tiny.tokens())
    config, stored = written
    text = {key: value for key, value in config.items() if key != "saved_by"}
    whole = {"model_type": "llava", "text_config": text, "quantization_config": config["quantization_config"]}
    tensors = {f"language_model.{key}": value for key, value in stored.items()}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(tensors | {"vision_tower.norm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"without vision_tower \(1 tensor\)"):
        model = load_model(tmp_path)
    np.testing.assert_array_equal(model(tiny.tokens()), expected)
    assert sum(isinstance(value, Nf4) for value in values(model).values()) == 7
    with pytest.raises(ValueError, match="kernels of this text model are quantized"):
        save_model(model, tmp_path / "saved", source=tmp_path)


# --- What does not fit ---


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, load_in_8bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "bitsandbytes, fp4"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_tensors_in_nf4_are_loaded_whatever_config_json_says_and_other_formats_are_refused(
    config: Any, said: str, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    expected = load_model(rewritten())(tiny.tokens())
    with pytest.warns(UserWarning, match=f"says {said}, but the tensors are in nf4") as warned:
        model = load_model(rewritten(config))
    assert len(warned) == 1
    np.testing.assert_array_equal(model(tiny.tokens()), expected)
    eight = {QUERY: np.zeros((32, 32), np.int8), QUERY.replace("weight", "SCB"): np.zeros(32, np.float32)}
    save_file(eight, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"is quantized \({said}\); the only supported format"):
        load_model(tmp_path)


def test_tensors_in_nf4_need_no_quantization_config(rewritten: Callable[..., Path]) -> None:
    directory = rewritten()
    file = directory / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "quantization_config"}
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="it has no quantization_config, but the tensors are in nf4"):
        model = load_model(directory, quantize="nf4")
    assert sum(isinstance(value, Nf4) for value in values(model).values()) == 7


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"blocksize": 128}, r"q_proj\.weight is stored with blocksize=128; only 64 is supported"),
        ({"nested_blocksize": 64}, r"q_proj\.weight is stored with nested_blocksize=64; only 256 is supported"),
        ({"dtype": "float64"}, r"q_proj\.weight decodes to float64; only float32, bfloat16, float16"),
        (
            {"dtype": "bfloat16"},
            r"layers\.1\.self_attn\.q_proj\.weight is nf4 of bfloat16: the layers of a stack must have one",
        ),
        ({"shape": 32}, r"q_proj\.weight is stored in nf4 with the shape 32; a kernel has two dimensions"),
        ({"shape": [32, 64]}, r"q_proj\.weight is stored as \[32, 64\], but config.json asks for \[32, 32\]"),
    ],
)
def test_other_quant_states_are_refused_by_name(state: Any, message: str, rewritten: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(rewritten(state=state))


@pytest.mark.parametrize("map_", [".quant_map", ".nested_quant_map"])
def test_other_tables_of_values_are_refused_by_name(
    map_: str, written: tuple[dict[str, Any], Tensors], rewritten: Callable[..., Path]
) -> None:
    table = written[1][QUERY + map_].copy()
    table[3] += np.float32(0.01)
    with pytest.raises(ValueError, match=rf"q_proj\.weight{map_} is not the table of values"):
        load_model(rewritten(**{map_: table}))


def test_parts_that_are_missing_or_of_a_wrong_size_are_in_the_one_error(rewritten: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="do not match its config") as error:
        load_model(rewritten(**{".absmax": None, ".nested_absmax": np.zeros(3, np.float32), ".scale": np.zeros(2)}))
    assert f"1 missing: {QUERY}.absmax\n" in str(error.value)
    assert f"1 unexpected: {QUERY}.scale" in str(error.value)
    assert f"{QUERY}.nested_absmax is stored as F32 [3]; a kernel [32, 32] needs 4 bytes of F32" in str(error.value)


def test_a_stack_of_which_some_layers_are_quantized_is_an_error(rewritten: Callable[..., Path]) -> None:
    parts = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    directory = rewritten(**{"": np.zeros((32, 32), np.float32)}, **dict.fromkeys(parts))
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight is not quantized: the layers of a stack"
    ):
        load_model(directory)


@pytest.mark.parametrize("buffer", ["embeddings.position_ids", "h.0.attn.bias", "h.0.attn.masked_bias", "position_ids"])
def test_integer_buffers_do_not_make_a_dense_checkpoint_quantized(buffer: str, tmp_path: Path) -> None:
    arrays = {"h.0.mlp.weight": np.zeros((2, 2), np.float32), buffer: np.zeros(4, np.uint8)}
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"ignoring quantization_config \(gptq\), because no tensor is quantized"):
        assert not bitsandbytes.is_packed(safetensors_files.read_tensors(tmp_path), {"quant_method": "gptq"}, tmp_path)
    save_file(arrays | {"h.0.mlp.qweight": np.zeros(4, np.int32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is quantized \(gptq\)"):
        bitsandbytes.is_packed(safetensors_files.read_tensors(tmp_path), {"quant_method": "gptq"}, tmp_path)


def test_what_is_asked_for_must_be_what_is_stored(rewritten: Callable[..., Path]) -> None:
    directory = rewritten()
    with pytest.raises(ValueError, match=r"is stored in nf4, but quantize='int8' asks for another format"):
        load_model(directory, quantize="int8")
    assert isinstance(load_model(directory, quantize="").blocks.attention.query.kernel.get_value(), Nf4)
    with pytest.raises(ValueError, match=r"skip=\('v_proj',\) \(model.skip_quantize\): .* is already quantized"):
        load_model(directory, quantize="nf4", skip=("v_proj",))
    with pytest.raises(ValueError, match=r'to make random weights pass quantize="nf4"'):
        make_random(directory)
    assert isinstance(make_random(directory, quantize="nf4").blocks.attention.query.kernel.get_value(), Nf4)
