"""NF4 beside bitsandbytes: every bit of what it makes of a tensor, its model directories both ways, and QLoRA's steps."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import sharding
from peftjax.core import variables
from peftjax.core.fingerprint import fingerprint
from peftjax.io.save import save_model
from peftjax.models.encoder_decoder import EncoderDecoder
from peftjax.quant import nf4
from peftjax.quant.nf4 import BLOCK, CODEBOOK, DYNAMIC_MAP, Nf4
from tests.interop.peers import (
    THEIRS,
    assert_close,
    assert_far,
    logits,
    shake,
    tokens,
    train_by_the_step,
    train_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]


# --- The format ---


def cases() -> dict[str, np.ndarray]:
    """Weights in torch's [out, in]."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(96, 192)).astype(np.float32)
    odd_ones = plain.copy()
    odd_ones[0, :64], odd_ones[3], odd_ones[5, 7] = 0, 0, 1e4
    middle = (CODEBOOK[1:] + CODEBOOK[:-1]) / np.float32(2)
    return {
        "plain": plain,
        "zero blocks and an outlier": odd_ones,
        "ties": np.resize(np.concatenate([[np.float32(1)], middle, [np.float32(-1)]]), (32, 64)),
        "rows of no multiple of 64": rng.normal(size=(64, 40)).astype(np.float32),
        "an odd number": rng.normal(size=(33, 37)).astype(np.float32),
        "many groups": (rng.normal(size=(512, 1024)) * rng.uniform(0.1, 3, (512, 1))).astype(np.float32),
        "zeros": np.zeros((4, 64), np.float32),
        "all the same": np.ones((4, 64), np.float32),
    }


def in_order(array: Any) -> np.ndarray:
    """Codes or values of blocks in the order of bitsandbytes."""
    array = np.asarray(array)
    return (array.transpose(2, 0, 1) if array.ndim == 3 else array.T).reshape(-1)


quantize = jax.jit(nf4.quantize, static_argnames="nested")
decode = jax.jit(lambda kernel: kernel.astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", cases())
def test_codes_absmax_scales_and_values_have_the_bits_of_bitsandbytes(case: str, dtype: str) -> None:
    weights = torch.tensor(cases()[case]).to(getattr(torch, dtype))
    outputs, inputs = weights.shape
    make = partial(bitsandbytes.functional.quantize_4bit, weights, quant_type="nf4")
    (packed, nested), (_, single) = make(compress_statistics=True), make(compress_statistics=False)
    kernel = jnp.asarray(weights.float().numpy()).astype(dtype).T
    plain, ours = quantize(kernel, nested=False), quantize(kernel)

    np.testing.assert_array_equal(single.code, CODEBOOK)
    np.testing.assert_array_equal(nested.state2.code, DYNAMIC_MAP)
    pairs = packed.numpy().reshape(-1)
    codes = np.stack([pairs >> 4, pairs & 15], axis=1).reshape(-1)[: weights.numel()]
    np.testing.assert_array_equal(in_order(np.asarray(ours.codes, np.int8))[: weights.numel()] + 8, codes)
    # A partial last block of zeros has 1e-38 there.
    np.testing.assert_allclose(in_order(plain.absmax), single.absmax, rtol=0, atol=1e-37)
    offset = np.float32(nested.offset.item())
    assert abs(float(ours.offset) - offset) <= np.spacing(offset)  # a sum, whose order depends on the machine

    given = jax.jit(nf4.nest)(plain, offset)  # with theirs, every bit
    absmax = bitsandbytes.functional.dequantize_blockwise(nested.absmax, nested.state2) + nested.offset
    np.testing.assert_array_equal(in_order(given.absmax), nested.absmax)
    np.testing.assert_array_equal(given.scales, nested.state2.absmax)
    np.testing.assert_array_equal(in_order(jax.jit(Nf4.block_absmax)(given)), absmax)
    # bitsandbytes' own decoder is wrong for rows that are no multiple of 64, so by hand
    values = CODEBOOK[codes] * absmax.repeat_interleave(BLOCK)[: weights.numel()].numpy()
    expected = torch.tensor(values).reshape(outputs, inputs).to(weights.dtype).float()
    np.testing.assert_array_equal(decode(given), expected.T)
    if inputs % BLOCK == 0:
        theirs = bitsandbytes.functional.dequantize_4bit(packed, nested).float()
        np.testing.assert_array_equal(decode(given), theirs.T)


# --- Model directories ---

VARIANTS: dict[str, dict[str, Any]] = {
    "nested": {},
    "plain": {"bnb_4bit_use_double_quant": False},
    "stored-as-bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
    "skipped": {"llm_int8_skip_modules": ["lm_head", "down_proj"]},
    "with-the-head": {"llm_int8_skip_modules": []},
}


def without_repacking(model: Any) -> Any:
    """On CPUs with bfloat16 instructions evaluation would repack the weights, compute in bfloat16 and lose gradients."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load_theirs(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cpu", **options)
    for parameter in model.parameters():  # of a quantized directory it leaves the others in the dtype of the file
        if dtype == torch.float32 and not isinstance(parameter, bitsandbytes.nn.Params4bit):
            parameter.data = parameter.data.float()
    return without_repacking(model).eval()


def quantized(base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model that transformers quantizes as it loads it."""
    config = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return load_theirs(
        base, dtype, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **config | options)
    )


def values(model: Any) -> dict[str, Any]:
    return {path: variable.get_value() for path, variable in variables.flat(model)[1].items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_of_bitsandbytes_gives_equal_logits_here_and_is_written_as_it_was(
    variant: str, bases: Callable, tmp_path: Path
) -> None:
    theirs = quantized(bases("wide"), **VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model = peftjax.load_model(tmp_path / "theirs")
    kernels = {path: value for path, value in values(model).items() if isinstance(value, Nf4)}
    assert len(kernels) == {"skipped": 6, "with-the-head": 8}.get(variant, 7)
    assert {kernel.scales is None for kernel in kernels.values()} == {variant == "plain"}
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(peftjax.load_model(bases("wide"))))

    save_model(model, tmp_path / "ours", max_shard_bytes=40_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    stored, written = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert written.keys() == stored.keys()
    for key, array in stored.items():
        if "quant_state" in key:
            assert json.loads(written[key].tobytes()) == json.loads(array.tobytes()), key
        else:
            assert written[key].tobytes() == array.tobytes(), key
    np.testing.assert_array_equal(logits(load_theirs(tmp_path / "ours")), logits(theirs))
    assert fingerprint(values(peftjax.load_model(tmp_path / "ours"))) == fingerprint(values(model))


def read(directory: Path) -> dict[str, np.ndarray]:
    return {key: array for file in sorted(directory.glob("*.safetensors")) for key, array in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_dtype_that_was_quantized_before_they_meet_float32(
    dtype: str, bases: Callable, tmp_path: Path
) -> None:
    peftjax.save_model(peftjax.load_model(bases("wide"), dtype), tmp_path / "half")
    quantized(tmp_path / "half", getattr(torch, dtype)).save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(tmp_path / "theirs")
    assert model.blocks.attention.query.kernel.get_value().dtype == dtype
    theirs = load_theirs(tmp_path / "theirs")
    rounded = logits(model)
    # Its forward product decodes to the dtype of the computation; its decoder, and with it its backward product, to the
    # one that was quantized.
    assert_close(rounded, logits(theirs), {"bfloat16": 2**-6, "float16": 2**-9}[dtype])
    for module in theirs.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert weight.dtype == getattr(torch, dtype)
            module.forward = partial(torch.nn.functional.linear, weight=weight.float())
    assert_close(rounded, logits(theirs))


@pytest.mark.parametrize("format_", ["nf4", "nf4_single"])
@pytest.mark.parametrize("skip", [(), ("v_proj",)])
def test_a_model_quantized_here_gives_equal_logits_there(
    format_: str, skip: tuple[str, ...], bases: Callable, tmp_path: Path
) -> None:
    model = peftjax.load_model(bases("wide"), quantize=format_, skip=skip)
    save_model(model, tmp_path / "ours", max_shard_bytes=40_000)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"][1:] == [
        f"model.layers.{i}.self_attn.{name}" for name in skip for i in range(3)
    ]
    theirs = load_theirs(tmp_path / "ours")
    assert isinstance(theirs.model.layers[1].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    assert isinstance(theirs.model.layers[1].self_attn.v_proj, bitsandbytes.nn.Linear4bit) == (not skip)
    assert_close(logits(model), logits(theirs))


def test_quantized_as_it_is_loaded_a_model_is_theirs(bases: Callable) -> None:
    theirs = logits(quantized(bases("wide")))
    model = peftjax.load_model(bases("wide"), quantize="nf4")
    assert_close(logits(model), theirs)


# Conv1D, whose kernels are [in, out] in dense files; modules that transformers never quantizes; a head of two layers
FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=48, n_embd=64, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=48, d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            vocab_size=48,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
        )
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_go_both_ways(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = FAMILIES[family]()
    shake(dict(base.named_parameters()), 0.1)
    base.save_pretrained(tmp_path / "base")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    theirs = type(base).from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs)
    model = peftjax.load_model(tmp_path / "theirs")
    assert_close(outputs(model), expected)
    if family != "roberta":  # they also quantize a classifier, unless told not to
        assert_close(outputs(peftjax.load_model(tmp_path / "base", quantize="nf4")), expected)
    peftjax.save_model(model, tmp_path / "ours")
    np.testing.assert_array_equal(outputs(peftjax.load_model(tmp_path / "ours")), outputs(model))
    assert_close(outputs(type(base).from_pretrained(tmp_path / "ours", device_map="cpu")), expected)


def outputs(model: Any) -> np.ndarray:
    """The logits of any text model; its texts are their own targets."""
    ids = tokens()
    if not isinstance(model, nnx.Module):
        decoder = {"decoder_input_ids": torch.tensor(ids)} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            return without_repacking(model).eval()(torch.tensor(ids), **decoder).logits.float().numpy()
    options = {"decoder_tokens": jnp.asarray(ids)} if isinstance(model, EncoderDecoder) else {}
    return np.asarray(model(jnp.asarray(ids), **options))


def test_rows_that_are_no_multiple_of_64_come_and_go_with_every_bit(bases: Callable, tmp_path: Path) -> None:
    theirs = quantized(bases("untied"))  # 32 and 40 wide
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(tmp_path / "theirs")
    # bitsandbytes' own decoder is wrong for these; that the formula is right is shown above, bit for bit
    ours = values(peftjax.load_model(bases("untied"), quantize="nf4"))
    for path, kernel in values(model).items():
        if isinstance(kernel, Nf4):
            np.testing.assert_array_equal(kernel.codes, ours[path].codes)
            np.testing.assert_allclose(decode(kernel), decode(ours[path]), atol=1e-6)
    save_model(model, tmp_path / "ours")
    stored, written = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert all(written[key].tobytes() == array.tobytes() for key, array in stored.items() if "quant_state" not in key)


def test_on_a_mesh_a_directory_is_read_into_the_same_bits_and_split(bases: Callable, tmp_path: Path) -> None:
    quantized(bases("wide")).save_pretrained(tmp_path / "theirs")
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    split = peftjax.load_model(tmp_path / "theirs", mesh=mesh)
    down = split.blocks.feedforward.down.kernel.get_value()  # 128 inputs: two blocks
    assert down.codes.addressable_shards[0].data.shape == (3, 1, 64, 32)
    assert fingerprint(values(split)) == fingerprint(values(peftjax.load_model(tmp_path / "theirs")))
    save_model(split, tmp_path / "ours")
    stored, written = read(tmp_path / "theirs"), read(tmp_path / "ours")
    assert all(written[key].tobytes() == array.tobytes() for key, array in stored.items() if "quant_state" not in key)


# --- Training ---


def test_twenty_steps_of_qlora_equal_those_of_peft_and_bitsandbytes(
    bases: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.interop.peers.STEPS", 20)
    theirs = quantized(bases("wide"))
    theirs.save_pretrained(tmp_path / "base")
    method = peftjax.Lora(rank=4, alpha=8, targets="all-linear")
    model = peftjax.attach(peftjax.load_model(tmp_path / "base"), method, rngs=nnx.Rngs(0))
    frozen = fingerprint({path: value for path, value in values(model).items() if isinstance(value, Nf4)})
    start = peftjax.save_adapter(model, tmp_path / "start")
    adapted = peft.PeftModel.from_pretrained(theirs, start, is_trainable=True).train()
    with torch.no_grad():
        assert_close(logits(model), logits(adapted))
    ours = train_by_the_step(model)
    assert len(ours) == 20
    np.testing.assert_allclose(ours, train_theirs(adapted), rtol=0, atol=1e-4)
    assert fingerprint({path: value for path, value in values(model).items() if isinstance(value, Nf4)}) == frozen
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(adapted)
    begun = load_file(start / "adapter_model.safetensors")
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-3, rtol=0, err_msg=key)
        assert np.abs(value - begun[key]).max() > 10 * 1e-3, key
