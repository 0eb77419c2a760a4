"""What of OFT and BOFT the table of test_methods.py has no place for: the constrained form, and butterfly factors."""

import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import peft.tuners.boft.layer
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import methods
from tests.interop.peers import (
    THEIRS,
    adapted,
    assert_close,
    assert_far,
    attached,
    load_into_theirs,
    load_theirs,
    logits,
    train_by_the_step,
    train_theirs,
    trainable_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]


def test_constrained_training_equals_pefts(bases: Callable, tmp_path: Path) -> None:
    base, names = bases("untied"), ["q_proj", "v_proj"]
    ours = methods.Oft(block_size=8, constrained=True, eps=0.02, targets=tuple(names))
    model = peftjax.attach(peftjax.load_model(base), ours, rngs=nnx.Rngs(0))
    config = peft.OFTConfig(oft_block_size=8, coft=True, eps=0.02, target_modules=names)
    peer = trainable_theirs(base, config, peftjax.save_adapter(model, tmp_path / "start"))
    np.testing.assert_allclose(train_by_the_step(model), train_theirs(peer), rtol=1e-5)
    assert_close(logits(model), logits(peer.eval()))  # where peft projects what the last step left outside
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(peer)
    longest = 0.0
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-5, rtol=0, err_msg=key)
        longest = max(longest, np.sqrt(2 * np.square(value).sum(axis=-1)).max())
    assert longest == pytest.approx(0.02 / 4**0.5, rel=1e-5)


@pytest.fixture
def butterflies(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft with its CUDA extension, which only puts blocks on a diagonal; without it, all factors but one are dropped."""

    def on_a_diagonal(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", types.SimpleNamespace(apply=on_a_diagonal))


@pytest.mark.usefixtures("butterflies")
def test_butterfly_factors_equal_pefts(bases: Callable, tmp_path: Path) -> None:
    base, names = bases("biased"), ["q_proj", "up_proj"]
    ours = methods.Boft(block_size=4, factors=3, targets=tuple(names))
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=names)
    peer = adapted(base, config)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path / "theirs")
    assert_close(logits(model), logits(peer))
    assert_far(logits(model), logits(load_theirs(base)))

    model = attached(base, ours)
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(logits(load_into_theirs(base, tmp_path / "ours").eval()), logits(model))
    expected = logits(model)
    peftjax.save_model(peftjax.merge(model), tmp_path / "merged")
    assert_close(logits(load_theirs(tmp_path / "merged")), expected)
