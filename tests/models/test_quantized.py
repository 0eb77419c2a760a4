"""Every family on a quantized base: it computes what it would with the decoded kernels."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peftjax
from peftjax.core import variables
from peftjax.models import from_hf_config
from peftjax.quant.base import Quantized
from tests import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES | {"vocab_size": 40, "max_position_embeddings": 16},
    "t5": {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "pad_token_id": 0},
    "vit": SIZES | {"image_size": 8, "patch_size": 4, "architectures": ["ViTForImageClassification"], "num_labels": 3},
    "gpt2": {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
    "phi3": SIZES | {"vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 0},
    "gemma2": SIZES | {"vocab_size": 40, "max_position_embeddings": 16, "num_key_value_heads": 1, "head_dim": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_nf4_computes_what_it_does_with_the_decoded_kernels(family: str, tmp_path: Path) -> None:
    peftjax.save_model(tiny.make(from_hf_config(FAMILIES[family] | {"model_type": family})), tmp_path / "model")
    model, exact = (peftjax.load_model(tmp_path / "model", quantize=format_) for format_ in ("nf4", None))
    kernels = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()}
    kernels = {path: kernel for path, kernel in kernels.items() if isinstance(kernel, Quantized)}
    assert {path.rsplit(".", 1)[-1] for path in kernels} == {"kernel"}
    assert len(kernels) >= 4
    one, whole = outputs(family, model), outputs(family, exact)
    variables.update(exact, {path: kernel.astype(jnp.float32) for path, kernel in kernels.items()})
    other = outputs(family, exact)
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    assert np.abs(one - whole).max() > 1e-3


def outputs(family: str, model: Any) -> jax.Array:
    if family == "vit":
        return model(jnp.linspace(-1, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3))
    tokens = jnp.arange(12).reshape(2, 6)
    return model(tokens, **{"decoder_tokens": tokens + 3} if family == "t5" else {})
