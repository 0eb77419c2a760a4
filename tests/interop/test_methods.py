"""Every method beside Hugging Face PEFT: files both ways, merged models, and five steps of training. LoRA has more
variants in test_lora.py."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import methods
from peftjax.methods import count_trainable
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


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method and the same in peft's words. base: of tests/interop/peers.py; merges: it changes weights alone;
    trains: five steps of training are compared (not where peft's file lacks what is trained)."""

    ours: methods.Method
    theirs: Callable[[], Any]
    base: str = "untied"
    merges: bool = True
    trains: bool = True


PEERS: dict[str, Peer] = {
    "lora": Peer(
        methods.Lora(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ),
    "prompt": Peer(methods.PromptTuning(tokens=5), lambda: peft.PromptTuningConfig(num_virtual_tokens=5), merges=False),
    "p-tuning": Peer(
        methods.PTuning(tokens=5, hidden=6),
        lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=6),
        merges=False,
        trains=False,
    ),
    "p-tuning-lstm": Peer(
        methods.PTuning(tokens=5, hidden=6, encoder="lstm"),
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=5, encoder_hidden_size=6, encoder_reparameterization_type="LSTM"
        ),
        merges=False,
        trains=False,
    ),
    "prefix": Peer(methods.PrefixTuning(tokens=5), lambda: peft.PrefixTuningConfig(num_virtual_tokens=5), merges=False),
    "prefix-projection": Peer(
        methods.PrefixTuning(tokens=5, projection=True, hidden=6),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=6),
        merges=False,
        trains=False,
    ),
    "ia3": Peer(
        methods.Ia3(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)),
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        base="biased",
    ),
}


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    return PEERS[request.param]


def test_an_adapter_of_peft_gives_equal_logits_here(peer: Peer, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases(peer.base), peer.theirs())
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_model(bases(peer.base))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)
    if peer.trains:
        assert count_trainable(model) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


def test_an_adapter_of_ours_gives_equal_logits_in_peft(peer: Peer, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(peer.base), peer.ours)
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load_into_theirs(bases(peer.base), tmp_path / "adapter").eval()
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(peftjax.use(model, None)))


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.merges])
def test_a_merged_model_gives_equal_logits_in_transformers(name: str, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(PEERS[name].base), PEERS[name].ours)
    expected = logits(model)
    peftjax.save_model(peftjax.merge(model), tmp_path / "merged")
    assert_close(logits(load_theirs(tmp_path / "merged")), expected)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.trains])
def test_five_steps_of_adamw_equal_those_of_torch_and_peft(name: str, bases: Callable, tmp_path: Path) -> None:
    peer = PEERS[name]
    base = bases(peer.base)
    model = peftjax.attach(peftjax.load_model(base), peer.ours, rngs=nnx.Rngs(0))
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter_model.safetensors")
    theirs = trainable_theirs(base, peer.theirs(), tmp_path / "start")

    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs), rtol=1e-5)
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert end.keys() == expected.keys()
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-4, rtol=0, err_msg=key)
    assert any(np.abs(value - start[key]).max() > 10 * 1e-4 for key, value in end.items())
