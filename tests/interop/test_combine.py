"""Combined LoRA adapters beside peft's add_weighted_adapter: A and B, or their product, and the logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

import peftjax
from peftjax.methods.lora.mix import APART, SPARSE, WAYS
from tests.interop.peers import THEIRS, assert_close, assert_far, load_into_theirs, load_theirs, logits, shake

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

NAMES = ("first", "second", "third")

# Adapters that are combined, in peft's words, their weights, and the ways that do it.
GIVEN: dict[str, tuple[list[dict[str, Any]], list[float], tuple[str, ...]]] = {
    "same-targets": (
        [
            {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
            {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        ],
        [0.7, 0.6],
        WAYS,
    ),
    "other-targets": (
        [
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "down_proj"],
                "rank_pattern": {"1.mlp.down_proj": 2},
            },
            {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
            {
                "r": 4,
                "lora_alpha": 4,
                "target_modules": ["q_proj", "v_proj"],
                "alpha_pattern": {"0.self_attn.q_proj": 9},
            },
        ],
        [1.0, -0.8, 0.3],
        WAYS,
    ),
    "other-ranks": (
        [
            {
                "r": 5,
                "lora_alpha": 8,
                "target_modules": ["q_proj", "up_proj"],
                "rank_pattern": {"0.self_attn.q_proj": 2},
            },
            {"r": 3, "target_modules": ["q_proj", "embed_tokens"]},
        ],
        [1.5, -0.5],
        tuple(way for way in WAYS if way not in APART),
    ),
}
CASES = [(given, how, "total") for given, (_, _, ways) in GIVEN.items() for how in ways]
CASES += [("other-targets", how, "frequency") for how in WAYS if "ties" in how]


def with_adapters(base: Path, configs: list[dict[str, Any]]) -> Any:
    """Their model with adapters as if they had been trained."""
    model = None
    for name, options in zip(NAMES, configs, strict=False):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
        if model is None:
            model = peft.get_peft_model(load_theirs(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    lora = {key: parameter for key, parameter in model.named_parameters() if "lora_" in key}
    for parameter in lora.values():
        parameter.data.zero_()  # an embedding's B starts so large that the logits lose digits
    shake(lora, 0.1)
    return model.eval()


def masks_of(
    model: Any, drawn: list[np.ndarray], names: list[str], svd: bool
) -> dict[tuple[str, str, str], np.ndarray]:
    """What torch drew, by what it was drawn for and in our orientation: peft goes through its modules in their order."""
    found, remaining = {}, iter(drawn)
    for key, module in model.base_model.model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        here = [name for name in names if name in module.lora_A or name in module.lora_embedding_A]
        embedding = bool(module.lora_embedding_A)
        for leaf in ("kernel",) if svd else ("a", "b"):
            for name in here:
                mask = next(remaining)
                found[key, name, leaf] = mask if embedding and svd else mask.T  # an update is [V, D] in peft too
    assert not list(remaining)
    return found


@pytest.mark.parametrize(("given", "how", "majority_sign"), CASES)
def test_a_combined_adapter_is_pefts(
    given: str, how: str, majority_sign: str, bases: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs, weights, _ = GIVEN[given]
    names = list(NAMES[: len(configs)])
    theirs = with_adapters(bases("untied"), configs)
    theirs.save_pretrained(tmp_path)
    drawn, bernoulli = [], torch.bernoulli

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        mask = bernoulli(*args, **options)
        drawn.append(mask.numpy())
        return mask

    monkeypatch.setattr(torch, "bernoulli", recorded)
    torch.manual_seed(0)
    options = {"density": 0.6} if how in SPARSE else {}
    theirs.add_weighted_adapter(
        names, weights, "combined", combination_type=how, majority_sign_method=majority_sign, **options
    )
    theirs.set_adapter("combined")
    masks = masks_of(theirs, drawn, names, how.endswith("svd")) if how.startswith("dare") else {}

    ours = peftjax.load_model(bases("untied"))
    base = logits(ours)
    for name in names:
        peftjax.load_adapter(ours, tmp_path / name, name)
    options |= {"draw": lambda layer, name, leaf, shape: masks[layer, name, leaf]} if masks else {}
    peftjax.combine(ours, names, weights, how=how, majority_sign=majority_sign, **options)

    file = peftjax.save_adapter(ours, tmp_path / "ours", "combined") / "adapter_model.safetensors"
    expected = peft.get_peft_model_state_dict(theirs, adapter_name="combined", save_embedding_layers=False)
    compare(
        load_file(file), {key: value.numpy() for key, value in expected.items()}, exact=how in APART or how == "cat"
    )
    assert_close(logits(ours), logits(theirs))
    assert_far(logits(ours), base)
    assert_close(logits(load_into_theirs(bases("untied"), tmp_path / "ours")), logits(theirs))


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], exact: bool) -> None:
    """Both factors where they are unique, else their products. peft fills up with zeros to the largest rank."""
    assert ours.keys() == theirs.keys()
    for key in [key for key in ours if "lora_A" in key or "lora_embedding_A" in key]:
        other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        (a, b), (their_a, their_b) = (ours[key], ours[other]), (theirs[key], theirs[other])
        if exact:
            rank = a.shape[0]
            np.testing.assert_allclose(a, their_a[:rank], atol=1e-5, rtol=1e-5, err_msg=key)
            np.testing.assert_allclose(b, their_b[:, :rank], atol=1e-5, rtol=1e-5, err_msg=other)
            assert not their_a[rank:].any()
        np.testing.assert_allclose(b @ a, their_b @ their_a, atol=1e-5, rtol=1e-5, err_msg=key)
