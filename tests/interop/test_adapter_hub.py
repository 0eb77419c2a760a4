"""Bottleneck adapters beside AdapterHub's `adapters`: files both ways, initialisation, and five steps of training.

adapters 1.3.0 needs transformers 4.57, so it cannot share an environment with peft's tests (transformers 5): these run in
one that has torch, adapters==1.3.0, peft and this project's dependencies but for the bounds of huggingface-hub, tokenizers
and transformers, and are skipped elsewhere.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from safetensors.torch import save_file

import peftjax
from peftjax.adapters import attached as attached_methods
from peftjax.adapters import count_trainable
from peftjax.methods.bottleneck import Bottleneck
from tests.interop.peers import (
    THEIRS,
    assert_close,
    assert_far,
    attached,
    load_theirs,
    logits,
    shake,
    train_by_the_step,
    train_theirs,
)

adapters = pytest.importorskip("adapters", reason="adapters 1.3.0 has an environment of its own")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]


# Adam makes whole steps of gradients near 0: one of 512 weights ends 2e-4 away where the library trains in float64, and
# 6e-4 in float32 on some machines.
ROUNDING = 1e-3


@dataclasses.dataclass(frozen=True)
class Peer:
    """A method and the same in the library's words."""

    ours: Bottleneck
    theirs: Any


PEERS = {
    "houlsby": Peer(peftjax.Houlsby(), adapters.DoubleSeqBnConfig()),
    "pfeiffer": Peer(peftjax.Pfeiffer(), adapters.SeqBnConfig()),
    "parallel": Peer(peftjax.ParallelAdapter(), adapters.ParBnConfig()),
    "houlsby-norms": Peer(
        peftjax.Houlsby(
            norm_before=True, norm_after=True, residual_before_norm=True, learned_scale="scalar", reduction_factor=5,
            leave_out=(1,), non_linearity="gelu",
        ),
        adapters.DoubleSeqBnConfig(
            ln_before=True, ln_after=True, adapter_residual_before_ln=True, scaling="learned", reduction_factor=5,
            leave_out=[1], non_linearity="gelu",
        ),
    ),
    "pfeiffer-norms": Peer(
        peftjax.Pfeiffer(
            attention=True, norm_before=True, norm_after=True, learned_scale="channel", reduction_factor=0.5,
            non_linearity="gelu_new", init="houlsby",
        ),
        adapters.SeqBnConfig(
            mh_adapter=True, ln_before=True, ln_after=True, scaling="channel", reduction_factor=0.5,
            non_linearity="gelu_new", init_weights="houlsby",
        ),
    ),
    "parallel-norms": Peer(
        peftjax.ParallelAdapter(
            attention=True, norm_after=True, scale=0.5, leave_out=(0, 2), non_linearity="leakyrelu"
        ),
        adapters.ParBnConfig(
            mh_adapter=True, ln_after=True, scaling=0.5, leave_out=[0, 2], non_linearity="leakyrelu"
        ),
    ),
    "tanh": Peer(peftjax.Houlsby(non_linearity="tanh", feedforward=False),
                 adapters.DoubleSeqBnConfig(non_linearity="tanh", output_adapter=False)),
    "quick_gelu": Peer(peftjax.Pfeiffer(non_linearity="quick_gelu"), adapters.SeqBnConfig(non_linearity="quick_gelu")),
    "sigmoid": Peer(peftjax.Pfeiffer(non_linearity="sigmoid"), adapters.SeqBnConfig(non_linearity="sigmoid")),
}  # fmt: skip


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    return PEERS[request.param]


def with_adapters(base: Path) -> Any:
    model = load_theirs(base)
    adapters.init(model)
    return model


def moved(base: Path, config: Any) -> Any:
    """Their model with their adapter, as if it had been trained."""
    model = with_adapters(base)
    model.add_adapter("task", config=config, set_active=True)
    shake({name: p for name, p in model.named_parameters() if ".adapters.task." in name}, 0.1)
    return model.eval()


def save(model: Any, path: Path) -> None:
    """As their save_adapter does, which cannot write a LayerNorm before the bottleneck: it has two names."""
    model.save_adapter(path, "task")
    state = {key: value.clone() for key, value in model.state_dict().items() if ".adapters.task." in key}
    save_file(state, path / "adapter.safetensors")


def load(model: Any, path: Path) -> Any:
    """The adapter in their model. It must find every key that it wants, and use every key and bit of the file."""
    info: dict[str, Any] = {}
    name = model.load_adapter(str(path), use_safetensors=True, set_active=True, loading_info=info)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    used = stored(model, name)
    file = load_file(path / "adapter.safetensors")
    assert used.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_array_equal(used[key], value, err_msg=key)
    return model.eval()


def stored(model: Any, name: str) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in model.state_dict().items() if f".adapters.{name}." in key}


def test_an_adapter_of_the_library_gives_equal_logits_here(peer: Peer, bases: Callable, tmp_path: Path) -> None:
    theirs = moved(bases("untied"), peer.theirs)
    save(theirs, tmp_path)
    model = peftjax.load_model(bases("untied"))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)
    assert count_trainable(model) == sum(
        p.numel() for name, p in theirs.named_parameters() if ".adapters.task." in name
    )
    (method,) = attached_methods(model).values()
    assert method == peer.ours


def test_an_adapter_of_ours_gives_equal_logits_in_the_library(peer: Peer, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases("untied"), peer.ours)
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load(with_adapters(bases("untied")), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(peftjax.use(model, None)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["config"]
    assert adapters.BnConfig.from_dict(config).to_dict() == peer.theirs.to_dict()


def test_five_steps_of_adamw_equal_those_of_the_library(peer: Peer, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases("untied"), peer.ours)
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter.safetensors")
    theirs = load(with_adapters(bases("untied")), tmp_path / "start")
    theirs.train_adapter("default")

    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs), rtol=1e-5)
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter.safetensors")
    for key, expected in stored(theirs, "default").items():
        np.testing.assert_allclose(end[key], expected, atol=ROUNDING, rtol=0, err_msg=key)
    assert all(np.abs(end[key] - start[key]).max() > 10 * ROUNDING for key in end if key.endswith("adapter_up.weight"))


def test_what_the_library_itself_saves_is_read_with_the_copy_of_the_head(bases: Callable, tmp_path: Path) -> None:
    for base in ("tied", "untied"):
        theirs = moved(bases(base), adapters.SeqBnConfig())
        theirs.save_adapter(tmp_path / base, "task", use_safetensors=True)
        assert (tmp_path / base / "model_head.safetensors").exists()
        model = peftjax.load_adapter(peftjax.load_model(bases(base)), tmp_path / base)
        assert_close(logits(model), logits(theirs))
    theirs.lm_head.weight.data += 0.1
    theirs.save_adapter(tmp_path / "trained", "task", use_safetensors=True)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from this model's parameter"):
        peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path / "trained")


def test_an_adapter_saved_without_the_models_head_is_read(bases: Callable, tmp_path: Path) -> None:
    theirs = moved(bases("untied"), adapters.SeqBnConfig())
    theirs.model.save_adapter(tmp_path / "adapter", "task", use_safetensors=True)
    assert all(key.startswith("layers.") for key in load_file(tmp_path / "adapter" / "adapter.safetensors"))
    model = peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))


# Not of parallel ones: there the library gives the second what the first made, and here both read the same x.
@pytest.mark.parametrize("config", [adapters.DoubleSeqBnConfig(), adapters.SeqBnConfig()])
def test_two_adapters_at_once_are_the_librarys_stack(config: Any, bases: Callable, tmp_path: Path) -> None:
    theirs, model = with_adapters(bases("untied")), peftjax.load_model(bases("untied"))
    for name in ("one", "two"):
        theirs.add_adapter(name, config=config)
    shake({name: p for name, p in theirs.named_parameters() if ".adapters." in name}, 0.1)
    for name in ("one", "two"):
        theirs.save_adapter(tmp_path / name, name, use_safetensors=True)
        peftjax.load_adapter(model, tmp_path / name, name)
    theirs.set_active_adapters(adapters.Stack("one", "two"))
    both = logits(peftjax.use(model, ("one", "two")))
    assert_close(both, logits(theirs.eval()))
    assert_far(both, logits(peftjax.use(model, "two")))


def test_a_mistral_has_its_adapters_in_the_same_places(tmp_path: Path) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 8}
    config = transformers.MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=5, **sizes)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    theirs = moved(tmp_path / "base", adapters.DoubleSeqBnConfig(reduction_factor=4))
    theirs.save_adapter(tmp_path / "adapter", "task", use_safetensors=True)
    model = peftjax.load_adapter(peftjax.load_model(tmp_path / "base"), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoders whose norms come after the residual connections, with a head."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_labels": 3}
    paths = {}
    for kind in ("Bert", "Roberta"):
        paths[kind] = tmp_path_factory.mktemp("hub") / kind
        config = getattr(transformers, f"{kind}Config")(num_attention_heads=4, initializer_range=0.2, **sizes)
        model = getattr(transformers, f"{kind}ForSequenceClassification")(config)
        shake(dict(model.named_parameters()), 0.1)
        model.save_pretrained(paths[kind])
    return paths


@pytest.mark.parametrize(
    ("kind", "name"),
    [("Bert", name) for name in PEERS if name[:4] in ("houl", "pfei", "para")] + [("Roberta", "pfeiffer")],
)
def test_adapters_of_post_norm_encoders_go_both_ways_with_their_head(
    kind: str, name: str, classifiers: dict[str, Path], tmp_path: Path
) -> None:
    base, peer = classifiers[kind], PEERS[name]
    theirs = moved(base, dataclasses.replace(peer.theirs, leave_out=[1] if peer.theirs.leave_out else []))
    shake(dict(theirs.classifier.named_parameters()), 0.1)
    theirs.save_adapter(tmp_path / "theirs", "task", use_safetensors=not peer.ours.norm_before)
    if peer.ours.norm_before:  # then the library cannot write safetensors: one tensor has two names
        save(theirs, tmp_path / "theirs")
        head = {f"classifier.{key}": value for key, value in theirs.classifier.state_dict().items()}
        save_file(head, tmp_path / "theirs" / "model_head.safetensors")
    model = peftjax.load_model(base)
    before = logits(model)
    peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)

    model = attached(base, dataclasses.replace(peer.ours, leave_out=(1,) if peer.ours.leave_out else ()))
    peftjax.save_adapter(model, tmp_path / "ours")
    theirs = load(with_adapters(base), tmp_path / "ours")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(peftjax.use(model, None)))


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])  # transformers 4.57 cannot read tinystories656k
def test_real_checkpoints_give_equal_logits_both_ways(assets: Path, name: str, tmp_path: Path) -> None:
    theirs = moved(assets / name, adapters.DoubleSeqBnConfig())
    theirs.save_adapter(tmp_path / "theirs", "task", use_safetensors=True)
    model = peftjax.load_adapter(peftjax.load_model(assets / name), tmp_path / "theirs")
    assert_close(logits(model, 100), logits(theirs, 100))

    model = attached(assets / name, peftjax.Pfeiffer())
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(logits(model, 100), logits(load(with_adapters(assets / name), tmp_path / "ours"), 100))


@pytest.mark.parametrize("init", ["bert", "houlsby", "mam_adapter"])
def test_new_adapters_are_drawn_as_the_librarys_are(init: str, bases: Callable, tmp_path: Path) -> None:
    theirs = with_adapters(bases("untied"))
    torch.manual_seed(0)
    theirs.add_adapter("default", config=adapters.SeqBnConfig(reduction_factor=0.25, init_weights=init))
    method = peftjax.Pfeiffer(reduction_factor=0.25, init=init)
    model = peftjax.attach(peftjax.load_model(bases("untied")), method, rngs=nnx.Rngs(0))
    ours = load_file(peftjax.save_adapter(model, tmp_path / "ours") / "adapter.safetensors")
    for key, expected in stored(theirs, "default").items():  # of 4096 numbers or of zeros
        for moment in (np.std, np.max, np.min):
            np.testing.assert_allclose(moment(ours[key]), moment(expected), rtol=0.05 if moment is np.std else 0.3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (adapters.DoubleSeqBnInvConfig(), "inv_adapter='nice' is not supported for houlsby"),
        (adapters.CompacterPlusPlusConfig(), "phm_layer=True is not supported for pfeiffer"),
        (adapters.AdapterPlusConfig(), "stochastic_depth=0.1 is not supported for pfeiffer"),
        (adapters.SeqBnConfig(use_gating=True), "use_gating=True is not supported for pfeiffer"),
        (adapters.SeqBnConfig(residual_before_ln="post_add"), "residual_before_ln='post_add' is not supported"),
        (adapters.LoRAConfig(), "architecture='lora' of AdapterHub is not supported"),
        (adapters.MAMConfig(), "architecture='union' of AdapterHub is not supported"),
    ],
)
def test_what_the_library_has_besides_is_refused_by_name(
    config: Any, message: str, bases: Callable, tmp_path: Path
) -> None:
    fields = config.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"config": fields, "model_type": "llama", "name": "task"}))
    save_file({}, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)
