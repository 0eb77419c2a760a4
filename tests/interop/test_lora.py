"""LoRA beside Hugging Face PEFT: files both ways, merged models, and five steps of training."""

import dataclasses
import json
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
from peftjax.adapters import count_trainable
from tests.interop.peers import (
    STEPS,
    THEIRS,
    adapted,
    assert_close,
    assert_far,
    attached,
    load_into_theirs,
    load_theirs,
    logits,
    shake,
    train_by_hand,
    train_by_the_step,
    train_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

REGEX = r".*\.[01]\.self_attn\.(q|v)_proj"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of LoRA in our words. merges: peft's own merged model computes what its adapter does."""

    ours: dict[str, Any]
    base: str = "untied"
    merges: bool = True

    @property
    def theirs(self) -> dict[str, Any]:
        """The same options in peft's words."""
        names = {
            "rank": "r",
            "alpha": "lora_alpha",
            "targets": "target_modules",
            "exclude": "exclude_modules",
            "rslora": "use_rslora",
            "dora": "use_dora",
            "token_indices": "trainable_token_indices",
        }
        return {
            names.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in self.ours.items()
        }


def lora(base: str = "untied", merges: bool = True, **options: Any) -> Variant:
    return Variant({"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj")} | options, base, merges)


VARIANTS = {
    "names": lora(),
    "regex": lora(targets=REGEX),
    "all-linear": lora(targets="all-linear"),
    "all-linear-tied": lora("tied", targets="all-linear"),
    "exclude-names": lora(targets="all-linear", exclude=("down_proj", "layers.1.mlp.up_proj")),
    "exclude-regex": lora(targets="all-linear", exclude=r".*\.(0|2)\..*proj"),
    "rank-pattern": lora(rank_pattern={"layers.0.self_attn.q_proj": 2, r"layers\.[12]\.self_attn\.v_proj": 7}),
    "alpha-pattern": lora(alpha_pattern={"layers.0.self_attn.q_proj": 16, r".*\.[12]\.self_attn\.v_proj": 1}),
    "layers": lora(layers_to_transform=(0, 2), targets=("q_proj", "down_proj")),
    "rslora": lora(rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "bias-none": lora("biased", targets="all-linear"),
    "bias-all": lora("biased", bias="all"),
    "bias-all-some-layers": lora("biased", bias="all", layers_to_transform=(1,)),
    "bias-lora-only": lora("biased", bias="lora_only", targets="all-linear"),
    "bias-lora-only-some-layers": lora("biased", bias="lora_only", layers_to_transform=(0, 2)),
    "save-lm-head": lora(modules_to_save=("lm_head",)),
    "save-lm-head-tied": lora("tied", modules_to_save=("lm_head",)),
    "save-embedding": lora(modules_to_save=("embed_tokens",)),
    "save-embedding-tied": lora("tied", modules_to_save=("embed_tokens",)),
    "save-one-layer": lora(modules_to_save=("layers.1.mlp.up_proj",)),
    "save-with-bias": lora("biased", modules_to_save=("k_proj",), bias="lora_only"),
    "save-norms": lora(modules_to_save=("norm",)),
    "save-a-target": lora(targets=("q_proj", "lm_head"), modules_to_save=("lm_head",)),
    "embedding": lora(targets=("q_proj", "embed_tokens")),
    "embedding-regex": lora(targets=r".*(embed_tokens|q_proj)", rslora=True),
    "embedding-tied": lora("tied", targets=("q_proj", "embed_tokens"), merges=False),
    "head": lora(targets=("q_proj", "lm_head")),
    "head-tied": lora("tied", targets=("q_proj", "lm_head"), merges=False),
    "both-ends": lora(targets=("embed_tokens", "lm_head", "q_proj"), rank_pattern={"lm_head": 2}),
    "both-ends-tied": lora("tied", targets=("embed_tokens", "lm_head"), merges=False),
    "tokens": lora(token_indices=(30, 3, 7)),
    "tokens-tied": lora("tied", token_indices=(30, 3, 7)),
    "dora-some-layers": lora(dora=True, rslora=True, layers_to_transform=(0, 2), rank_pattern={"v_proj": 2}),
    "dora-embedding": lora(dora=True, targets=("embed_tokens", "lm_head", "q_proj")),
    "dora-head-tied": lora("tied", dora=True, targets=("q_proj", "lm_head"), merges=False),
    "lora-bias-some-layers": lora("biased", lora_bias=True, layers_to_transform=(1,), bias="lora_only"),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


# --- Files ---


def test_an_adapter_of_peft_gives_equal_logits_here(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases(variant.base), peft.LoraConfig(**variant.theirs))
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_model(bases(variant.base))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)
    assert count_trainable(model) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    np.testing.assert_array_equal(logits(peftjax.use(model, None)), before)


def test_an_adapter_of_ours_gives_equal_logits_in_peft(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(variant.base), peftjax.Lora(**variant.ours))
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load_into_theirs(bases(variant.base), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases(variant.base))))


def test_a_merged_model_gives_equal_logits_in_transformers(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(variant.base), peftjax.Lora(**variant.ours))
    expected = logits(model)
    peftjax.save_adapter(model, tmp_path / "adapter")
    peftjax.save_model(peftjax.merge(model), tmp_path / "merged")
    merged = logits(load_theirs(tmp_path / "merged"))
    assert_close(merged, expected)
    if variant.merges:
        assert_close(merged, logits(load_into_theirs(bases(variant.base), tmp_path / "adapter").merge_and_unload()))


@pytest.mark.parametrize("broad", [r".*\.[01]\.mlp\..*", r"model\.layers\.0.*", r".*(q_proj|norm)"])
def test_a_regular_expression_that_also_matches_other_modules_is_written_as_names(
    broad: str, bases: Callable, tmp_path: Path
) -> None:
    """Activations, containers and norms, at which peft fails."""
    with pytest.raises(ValueError, match=r"(?s)Target module .* is not supported"):
        peft.get_peft_model(load_theirs(bases("untied")), peft.LoraConfig(target_modules=broad))
    model = attached(bases("untied"), peftjax.Lora(rank=4, targets=broad))
    peftjax.save_adapter(model, tmp_path)
    assert_close(logits(model), logits(load_into_theirs(bases("untied"), tmp_path)))
    peftjax.save_adapter(attached(bases("untied"), peftjax.Lora(targets=REGEX)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == REGEX  # it matches nothing else


def test_of_two_patterns_the_first_counts_in_peft_too(bases: Callable, tmp_path: Path) -> None:
    patterns = {"v_proj": 2, "layers.1.self_attn.v_proj": 3}  # peft's own save would sort them, the second first
    model = attached(bases("untied"), peftjax.Lora(rank=4, targets=("v_proj",), rank_pattern=patterns))
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load_into_theirs(bases("untied"), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))


def test_a_bfloat16_adapter_of_peft_is_read(bases: Callable, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens"])
    base = load_theirs(bases("untied"), dtype=torch.bfloat16)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    shake({name: p for name, p in theirs.named_parameters() if p.requires_grad}, 0.1)
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)
    same = peft.PeftModel.from_pretrained(load_theirs(bases("untied")), tmp_path)
    stored = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    # loading it, peft puts the file's bfloat16 copy of the embedding in place of the base's own
    same.get_base_model().get_input_embeddings().base_layer.weight.data = (
        load_theirs(bases("untied")).get_input_embeddings().weight.data
    )
    assert_close(logits(model), logits(same))


@pytest.mark.parametrize("name", ["tinystories656k", "stories260k", "babyllama105"])
def test_real_checkpoints_with_a_random_lora_give_equal_logits_both_ways(
    assets: Path, name: str, tmp_path: Path
) -> None:
    base, vocab = assets / name, 100
    theirs = adapted(base, peft.LoraConfig(**VARIANTS["all-linear"].theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(base)
    before = logits(model, vocab)
    peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model, vocab), logits(theirs, vocab))
    assert_far(logits(model, vocab), before)

    model = attached(base, peftjax.Lora(**VARIANTS["all-linear"].ours))
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(logits(model, vocab), logits(load_into_theirs(base, tmp_path / "ours"), vocab))


# --- Training ---


@pytest.mark.parametrize("train", [train_by_hand, train_by_the_step])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_five_steps_of_adamw_equal_those_of_torch_and_peft(
    base: str, train: Callable[[Any], list[float]], bases: Callable, tmp_path: Path
) -> None:
    method = peftjax.Lora(rank=4, alpha=8, targets="all-linear", rank_pattern={"v_proj": 2})
    model = peftjax.attach(peftjax.load_model(bases(base)), method, rngs=nnx.Rngs(0))
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter_model.safetensors")
    theirs = load_into_theirs(bases(base), tmp_path / "start", is_trainable=True)

    ours = train(model)
    np.testing.assert_allclose(ours, train_theirs(theirs), rtol=1e-5)
    assert len(set(ours)) == STEPS
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs)
    assert end.keys() == expected.keys()
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-4, rtol=0, err_msg=key)
        assert np.abs(value - start[key]).max() > 10 * 1e-4, key  # it moved much further than the tolerance


# --- What peft takes and we refuse ---


def test_the_configs_that_peft_writes_are_read_and_its_variants_are_refused_by_name(
    bases: Callable, tmp_path: Path
) -> None:
    variants: dict[str, dict[str, Any]] = {
        "init_lora_weights": {"init_lora_weights": "pissa_niter_4"},
        "layer_replication": {"layer_replication": [(0, 2), (1, 3)]},
    }
    for field, options in variants.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
        model = peft.get_peft_model(load_theirs(bases("biased")), config)
        model.save_pretrained(tmp_path / field)
        assert json.loads((tmp_path / field / "adapter_config.json").read_text())[field]
        with pytest.raises(ValueError, match=f"adapter_config.json: {field}="):
            peftjax.load_adapter(peftjax.load_model(bases("biased")), tmp_path / field)
