"""Every method beside Hugging Face PEFT: files both ways, merged models, and five steps of training. LoRA has more
variants in test_lora.py."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import adapters, methods
from peftjax.adapters import count_trainable
from peftjax.adapters.sites import adapters_named
from peftjax.methods.prefix import ProjectedPrefix
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
    trains: five steps of training are compared from a file (where it lacks what is trained, they are compared below)."""

    ours: adapters.Method
    theirs: Callable[[], Any]
    base: str = "untied"
    merges: bool = True
    trains: bool = True


PEERS: dict[str, Peer] = {
    "lora": Peer(
        methods.Lora(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    ),
    "lora-dora": Peer(
        methods.Lora(rank=4, alpha=8, dora=True, targets=("q_proj", "v_proj")),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj"]),
        base="biased",
    ),
    "lora-bias": Peer(
        methods.Lora(rank=4, alpha=8, lora_bias=True, targets=("q_proj", "v_proj")),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, lora_bias=True, target_modules=["q_proj", "v_proj"]),
        base="biased",
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
    "ia3-layers": Peer(
        methods.Ia3(
            targets=("q_proj", "down_proj"),
            layers_to_transform=(0, 2),
            feedforward=r".*\.(0\.self_attn\.q|2\.mlp\.down)_proj",
        ),
        lambda: peft.IA3Config(
            target_modules=r".*\.[02]\.(self_attn\.q|mlp\.down)_proj",
            feedforward_modules=r".*\.(0\.self_attn\.q|2\.mlp\.down)_proj",
        ),
    ),
    "loha": Peer(
        methods.LoHa(rank=3, alpha=6, targets=("q_proj", "v_proj", "down_proj"), rank_pattern={"q_proj": 6}),
        lambda: peft.LoHaConfig(
            r=3, alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 6}
        ),
    ),
    "lokr": Peer(
        methods.LoKr(rank=2, alpha=4, targets=("q_proj", "v_proj", "down_proj"), rank_pattern={"q_proj": 3}),
        lambda: peft.LoKrConfig(
            r=2, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"q_proj": 3}
        ),
    ),
    "lokr-both": Peer(
        methods.LoKr(rank=2, targets=("q_proj", "v_proj", "down_proj"), decompose_both=True, decompose_factor=8),
        lambda: peft.LoKrConfig(
            r=2, target_modules=["q_proj", "v_proj", "down_proj"], decompose_both=True, decompose_factor=8
        ),
    ),
    "vera": Peer(
        methods.Vera(rank=4, targets=("q_proj", "v_proj", "down_proj"), exclude=("layers.1.self_attn.v_proj",)),
        lambda: peft.VeraConfig(r=4, target_modules=r".*\.(q_proj|down_proj|[02]\.self_attn\.v_proj)"),
    ),
    "fourierft": Peer(
        methods.FourierFT(
            n_frequency=60,
            targets=("q_proj", "v_proj", "down_proj"),
            random_loc_seed=7,
            n_frequency_pattern={"layers.1.self_attn.v_proj": 90},
        ),
        lambda: peft.FourierFTConfig(
            n_frequency=60,
            target_modules=["q_proj", "v_proj", "down_proj"],
            random_loc_seed=7,
            n_frequency_pattern={"layers.1.self_attn.v_proj": 90},
        ),
    ),
    "randlora": Peer(
        methods.RandLora(rank=5, alpha=10, targets=("k_proj", "o_proj", "up_proj", "down_proj")),
        lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=10, target_modules=["k_proj", "o_proj", "up_proj", "down_proj"]
        ),
    ),
    "vblora": Peer(
        methods.VbLora(rank=2, num_vectors=6, vector_length=8, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=6, vector_length=8, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    ),
    "ln-tuning": Peer(
        methods.LnTuning(),
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    ),
    "ln-tuning-some": Peer(
        methods.LnTuning(targets=("input_layernorm",), layers_to_transform=(0, 2)),
        lambda: peft.LNTuningConfig(target_modules=["layers.0.input_layernorm", "layers.2.input_layernorm"]),
    ),
    "bitfit": Peer(
        methods.BitFit(),
        lambda: peft.BeftConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
        base="biased",
    ),
    "trainable-tokens": Peer(
        methods.TrainableTokens(token_indices=tuple(range(30, 3, -3))),
        lambda: peft.TrainableTokensConfig(token_indices=list(range(30, 3, -3))),
    ),
    "trainable-tokens-tied": Peer(
        methods.TrainableTokens(token_indices=tuple(range(30, 3, -3))),
        lambda: peft.TrainableTokensConfig(token_indices=list(range(30, 3, -3))),
        base="tied",
    ),
    "trainable-tokens-both": Peer(
        methods.TrainableTokens(token_indices=tuple(range(30, 3, -3)), targets=("embed_tokens", "lm_head")),
        lambda: peft.TrainableTokensConfig(
            token_indices=list(range(30, 3, -3)), target_modules=["embed_tokens", "lm_head"]
        ),
    ),
    "miss": Peer(
        methods.Miss(rank=6, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.MissConfig(r=6, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "miss-mini": Peer(
        methods.Miss(rank=6, variant="mini", mini_rank=4, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.MissConfig(r=6, init_weights="mini", mini_r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "miss-bat": Peer(
        methods.Miss(rank=8, variant="bat", targets=("q_proj", "v_proj", "down_proj"), layers_to_transform=(0, 2)),
        lambda: peft.MissConfig(
            r=8, init_weights="bat", target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[0, 2]
        ),
    ),
    "oft": Peer(
        methods.Oft(block_size=6, targets=("q_proj", "v_proj", "down_proj"), layers_to_transform=(1, 2)),
        lambda: peft.OFTConfig(
            oft_block_size=6, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2]
        ),
    ),
    "oft-exact": Peer(
        methods.Oft(block_size=0, blocks=4, neumann=False, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.OFTConfig(
            r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["q_proj", "v_proj", "down_proj"]
        ),
    ),
    "oft-constrained": Peer(
        methods.Oft(block_size=8, constrained=True, eps=0.3, share=True, targets=("q_proj", "v_proj")),
        lambda: peft.OFTConfig(
            oft_block_size=8, coft=True, eps=0.3, block_share=True, target_modules=["q_proj", "v_proj"]
        ),
        trains=False,
    ),
    "boft": Peer(
        methods.Boft(block_size=8, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        base="biased",
    ),
    "hra": Peer(
        methods.Hra(rank=4, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.HRAConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "hra-gram-schmidt": Peer(
        methods.Hra(rank=3, gram_schmidt=True, targets=("q_proj", "v_proj", "down_proj")),
        lambda: peft.HRAConfig(r=3, apply_GS=True, target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
    "adalora": Peer(  # without removal and penalty, which are in test_adalora.py
        methods.AdaLora(
            init_rank=4, target_rank=2, total_steps=90, warmup_steps=80, orthogonality=0.0, targets=("q_proj", "v_proj")
        ),
        lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=90, tinit=80, orth_reg_weight=0.0, target_modules=["q_proj", "v_proj"]
        ),
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
    assert_far(logits(model), logits(load_theirs(bases(peer.base))))


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


def into_theirs(ours: Any, theirs: Any) -> None:
    """Copy what an adapter makes its vectors of, which no file holds, into peft's encoder."""

    def layer(index: int, weight: Any, bias: Any) -> dict[str, Any]:
        return {f"{index}.weight": np.asarray(weight).T, f"{index}.bias": np.asarray(bias)}

    if isinstance(ours, ProjectedPrefix):
        pieces, name = ours.pieces, "transform"
        wide = np.moveaxis(np.asarray(ours.kernel.get_value()), 0, 1)  # [M, L, 2 K H]
        layers = layer(0, ours.dense.kernel.get_value(), ours.dense.bias.get_value())
        layers |= layer(2, wide.reshape(len(wide), -1), np.asarray(ours.bias.get_value()).ravel())
    else:
        pieces, name, layers = ours.embeddings, "mlp_head", {}
        for index, dense in enumerate(ours.mlp):
            layers |= layer(2 * index, dense.kernel.get_value(), dense.bias.get_value())
    state = {f"{name}.{key}": value for key, value in layers.items()} | {"embedding.weight": pieces.get_value()}
    if getattr(ours, "lstm", None) is not None:
        for depth, (w, u, b) in enumerate(zip(ours.lstm.w, ours.lstm.u, ours.lstm.b, strict=True)):
            biases = np.asarray(b.get_value()).reshape(2, 2, -1)
            for direction, suffix in enumerate(("", "_reverse")):
                end = f"_l{depth}{suffix}"
                state[f"lstm_head.weight_ih{end}"] = np.asarray(w.get_value())[direction].T
                state[f"lstm_head.weight_hh{end}"] = np.asarray(u.get_value())[direction].T
                state[f"lstm_head.bias_ih{end}"], state[f"lstm_head.bias_hh{end}"] = biases[direction]
    theirs.load_state_dict({key: torch.tensor(np.asarray(value)) for key, value in state.items()})


@pytest.mark.parametrize("name", ["p-tuning", "p-tuning-lstm", "prefix-projection"])
def test_five_steps_of_an_encoder_equal_those_of_peft(name: str, bases: Callable, tmp_path: Path) -> None:
    base, config = bases("untied"), PEERS[name].theirs()
    model = peftjax.attach(peftjax.load_model(base), PEERS[name].ours, rngs=nnx.Rngs(0))
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter_model.safetensors")
    config.task_type = "CAUSAL_LM"
    theirs = peft.get_peft_model(load_theirs(base), config)
    ((_, ours), *_) = adapters_named(model, "default")
    into_theirs(ours, theirs.prompt_encoder["default"])
    assert_close(logits(model), logits(theirs))

    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs), rtol=1e-5)
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs)["prompt_embeddings"].detach().numpy()
    np.testing.assert_allclose(end["prompt_embeddings"], expected, atol=1e-4, rtol=0)
    assert np.abs(end["prompt_embeddings"] - start["prompt_embeddings"]).max() > 10 * 1e-4


def test_several_methods_at_once_are_pefts_mixed_model(bases: Callable, tmp_path: Path) -> None:
    parts = {
        "lora": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        "loha": peft.LoHaConfig(r=3, target_modules=["q_proj", "down_proj"]),
    }
    model = peftjax.load_model(bases("untied"))
    for name, config in parts.items():
        adapted(bases("untied"), config).save_pretrained(tmp_path / name)
        peftjax.load_adapter(model, tmp_path / name, name=name)
    theirs = peft.PeftMixedModel.from_pretrained(load_theirs(bases("untied")), tmp_path / "lora", adapter_name="lora")
    theirs.load_adapter(tmp_path / "loha", adapter_name="loha")
    theirs.set_adapter(["lora", "loha"])
    both = logits(peftjax.use(model, ("lora", "loha")))
    assert_close(both, logits(theirs.eval()))
    assert_far(both, logits(peftjax.use(model, "lora")))
