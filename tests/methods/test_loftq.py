import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.core import variables

SIZES = {"hidden_size": 64, "intermediate_size": 72}  # the kernel of down_proj is no multiple of a block wide


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base"
    peftjax.save_model(tiny.model(**SIZES), path)
    return path


def kernel(model: Any, path: str, layer: int) -> np.ndarray:
    return np.asarray(variables.flat(model)[1][path].get_value().astype(jnp.float32)[layer])


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 8.0},
        pytest.param({"init": "loftq_niter_8"}, marks=pytest.mark.slow),
        pytest.param({"dora": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_update_is_the_best_approximation_of_what_quantizing_took_away(directory: Path, options: dict) -> None:
    exact, model = peftjax.load_model(directory), peftjax.load_model(directory, quantize="nf4")
    before = tiny.bits(model)
    patterns = {"targets": ("q_proj", "down_proj"), "rank_pattern": {"1.self_attn.q_proj": 2}}
    lora = methods.Lora(**{"rank": 4, "init": "loftq"} | patterns | options)
    adapters.attach(model, lora, rngs=nnx.Rngs(0), kernels=peftjax.load_kernels(directory, model))
    assert tiny.bits(model) == before
    for module, layer, rank in (("attention.query", 0, 4), ("attention.query", 1, 2), ("feedforward.down", 2, 4)):
        path = f"blocks.{module}.kernel"
        lost = kernel(exact, path, layer) - kernel(model, path, layer)
        u, values, vt = np.linalg.svd(lost)
        best = (u[:, :rank] * values[:rank]) @ vt[:rank]
        adapter = getattr(getattr(model.blocks, module.split(".")[0]), module.split(".")[1]).adapters.default
        a, b, scale = (np.asarray(leaf.get_value()[layer]) for leaf in (adapter.a, adapter.b, adapter.scale))
        if lora.init == "loftq":
            np.testing.assert_allclose(a * scale @ b, best, atol=1e-5)
        left, least = np.linalg.norm(lost - a * scale @ b), np.linalg.norm(lost - best)
        assert left < 1.02 * least < np.linalg.norm(lost)
    truth, begun = exact(tiny.tokens()), model(tiny.tokens())
    assert np.abs(begun - truth).mean() < np.abs(peftjax.use(model, None)(tiny.tokens()) - truth).mean()


def test_it_needs_the_kernels_and_a_quantized_base(directory: Path) -> None:
    model, lora = peftjax.load_model(directory, quantize="nf4"), methods.Lora(rank=2, init="loftq")
    with pytest.raises(ValueError, match=r"pass kernels=peftjax.load_kernels\(PATH, model\)"):
        adapters.attach(model, lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="lora with these options needs no unquantized kernels"):
        adapters.attach(model, methods.Lora(rank=2), rngs=nnx.Rngs(0), kernels=peftjax.load_kernels(directory, model))
    with pytest.raises(ValueError, match=r"no kernel of this model is quantized: set model\.quantize"):
        adapters.attach(tiny.model(**SIZES), lora, rngs=nnx.Rngs(0))
    peftjax.save_model(model, directory.with_name("nf4"))
    with pytest.raises(ValueError, match="is already quantized; give the directory of the original model"):
        peftjax.load_kernels(directory.with_name("nf4"), model)


@pytest.mark.parametrize("multimodal", [False, True])
def test_the_kernels_of_a_base_with_added_rows_are_those_that_are_stored(tmp_path: Path, multimodal: bool) -> None:
    stored, base = tiny.model(**SIZES), tmp_path / "base"
    peftjax.save_model(stored, base)
    if multimodal:
        text = tiny.CONFIG | SIZES
        (base / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
        tensors = load_file(base / "model.safetensors")
        save_file({f"language_model.{name}": array for name, array in tensors.items()}, base / "model.safetensors")
    model = peftjax.load_model(base, quantize="nf4", resize_embeddings=54)
    kernels, query = peftjax.load_kernels(base, model), "blocks.attention.query"
    np.testing.assert_array_equal(kernels(query, 1), kernel(stored, f"{query}.kernel", 1))
    adapters.attach(model, methods.Lora(rank=2, init="loftq"), rngs=nnx.Rngs(0), kernels=kernels)
    assert model(tiny.tokens()).shape[-1] == 54
