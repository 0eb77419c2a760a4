"""LoRA+, LoRA-FA, PiSSA, OLoRA and adapters of a high rank beside peft's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file

import peftjax
from peftjax.adapters.sites import adapters_named
from tests.interop import peers
from tests.interop.peers import (
    DECAY,
    RATE,
    THEIRS,
    adapted,
    assert_close,
    assert_far,
    load_into_theirs,
    load_theirs,
    logits,
    train_by_the_step,
    train_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

QV = ("q_proj", "v_proj")


def started(base: Path, adapter: Path, **options: Any) -> tuple[Any, Any]:
    """A new adapter of ours, and the same in peft, ready to be trained."""
    model = peftjax.attach(peftjax.load_model(base), peftjax.Lora(rank=4, alpha=8, **options), rngs=nnx.Rngs(0))
    peftjax.save_adapter(model, adapter)
    return model, load_into_theirs(base, adapter, is_trainable=True)


def assert_same_parameters(model: Any, theirs: Any, adapter: Path) -> None:
    end = load_file(peftjax.save_adapter(model, adapter) / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert end.keys() == expected.keys()
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-4, rtol=0, err_msg=key)


def test_five_steps_of_lora_plus_equal_pefts(bases: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = [np.random.default_rng(step).integers(1, 48, (4, 17)) for step in range(5)]
    monkeypatch.setattr(peers, "batches", lambda: draw)  # torch gives the padding token's row, 0, no gradient
    targets = (*QV, "embed_tokens", "lm_head")
    model, theirs = started(
        bases("biased"), tmp_path / "start", lr_ratio=3.0, targets=targets, bias="lora_only", rslora=True
    )
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=3.0, loraplus_weight_decay=DECAY,
        loraplus_lr_embedding=RATE,
    )  # fmt: skip
    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs, optimizer), rtol=1e-5)
    assert_same_parameters(model, theirs, tmp_path / "end")


def test_five_steps_of_lora_fa_equal_pefts_with_a_frozen(bases: Callable, tmp_path: Path) -> None:
    model, theirs = started(bases("untied"), tmp_path / "start", freeze_a=True, targets=QV)
    for name, parameter in theirs.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs), rtol=1e-5)
    assert_same_parameters(model, theirs, tmp_path / "end")
    start, end = (load_file(tmp_path / where / "adapter_model.safetensors") for where in ("start", "end"))
    same = {key: np.array_equal(end[key], start[key]) for key in end}
    assert same == {key: "lora_A" in key for key in end}


INITS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "pissa-rslora": {"init": "pissa", "rslora": True},
    "pissa-patterns": {"init": "pissa", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "pissa-dora": {"init": "pissa", "dora": True},
    "olora": {"init": "olora"},
}


@pytest.mark.parametrize("name", INITS)
def test_pissa_and_olora_start_and_train_as_in_peft_and_their_file_fits_the_base(
    name: str, bases: Callable, tmp_path: Path
) -> None:
    options, base = INITS[name], bases("untied")
    model = peftjax.attach(
        peftjax.load_model(base), peftjax.Lora(rank=4, alpha=8, targets=QV, **options), rngs=nnx.Rngs(0)
    )
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(QV), init_lora_weights=options["init"],
        use_rslora=options.get("rslora", False), use_dora=options.get("dora", False),
        rank_pattern=options.get("rank_pattern", {}), alpha_pattern=options.get("alpha_pattern", {}),
    )  # fmt: skip
    theirs = peft.get_peft_model(load_theirs(base), config)
    assert_close(logits(model), logits(theirs))
    for site, adapter in adapters_named(model, "default"):
        for layer, hf in enumerate(site.names):
            module = theirs.get_submodule(f"base_model.model.{hf}")
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            ours_a, ours_b = (np.asarray(leaf.get_value()[layer]) for leaf in (adapter.a, adapter.b))
            ours_a, ours_b = ours_a[:, : len(a)], ours_b[: len(a)]
            np.testing.assert_allclose(ours_a @ ours_b, (b @ a).detach().numpy().T, atol=1e-5)
            # signs of singular vectors are nobody's choice; with ours in the place of theirs Adam does the same
            a.data, b.data = torch.tensor(ours_a.T.copy()), torch.tensor(ours_b.T.copy())

    before = logits(model)
    np.testing.assert_allclose(train_by_the_step(model), train_theirs(theirs), rtol=1e-5)
    assert_close(logits(model), logits(theirs), 1e-4)
    assert_far(logits(model), before)
    peftjax.save_adapter(model, tmp_path / "adapter")
    plain = load_into_theirs(base, tmp_path / "adapter")
    assert plain.peft_config["default"].r == 8
    assert_close(logits(model), logits(plain))


def test_pissa_as_peft_converts_it_is_read(bases: Callable, tmp_path: Path) -> None:
    base = bases("untied")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=list(QV), init_lora_weights="pissa")
    theirs = peft.get_peft_model(load_theirs(base), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    train_theirs(theirs)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path / "end")
    assert_close(logits(model), expected)


def test_an_adapter_of_peft_may_have_a_rank_beyond_a_layers_smaller_side(bases: Callable, tmp_path: Path) -> None:
    base = bases("untied")
    theirs = adapted(base, peft.LoraConfig(r=40, target_modules=[*QV, "embed_tokens"], use_dora=True))
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path)
    assert_close(logits(model), logits(theirs))
    with pytest.raises(
        ValueError, match=r"method.rank=40 exceeds the smaller dimension .32. of .*q_proj; use at most 32"
    ):
        peftjax.attach(model, peftjax.Lora(rank=40, targets=QV), "new", rngs=nnx.Rngs(0))


def test_eva_finds_the_directions_and_the_ranks_of_peft(bases: Callable, tmp_path: Path) -> None:
    ids = np.random.default_rng(5).integers(0, 48, (8, 16))
    targets = [
        "q_proj",
        "o_proj",
        "down_proj",
    ]  # of different inputs: of equal ones peft leaves to chance who gets a rank
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights="eva", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load_theirs(bases("untied")), config)
    peft.initialize_lora_eva_weights(theirs, [{"input_ids": torch.tensor(ids)}], show_progress_bar=False)
    theirs.save_pretrained(tmp_path / "theirs")

    method = peftjax.Lora(rank=3, alpha=6, init="eva", targets=tuple(targets))
    model = peftjax.load_model(bases("untied"))
    peftjax.attach(model, method, rngs=nnx.Rngs(0), batches=[{"tokens": ids}])
    peftjax.save_adapter(model, tmp_path / "ours")
    files = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")}
    assert {key: value.shape for key, value in files["ours"].items()} == {
        key: value.shape for key, value in files["theirs"].items()
    }
    assert len({value.shape for value in files["ours"].values()}) > 6  # the ranks differ
    for key, expected in files["theirs"].items():  # B is zero; rows of A have length 1 and a direction
        if "lora_A" in key:  # each from random projections of its own: 0.9999 and better
            assert ((files["ours"][key] * expected).sum(axis=1) > 0.999).all(), key
    peftjax.load_adapter(model, tmp_path / "theirs", "theirs")
    for site, ours in adapters_named(model, "default"):
        np.testing.assert_allclose(ours.scale.get_value(), site.module.adapters.theirs.scale.get_value())
