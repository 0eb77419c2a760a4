"""AdaLoRA's penalty, budget and files beside peft's. Its plain form is in test_methods.py."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import methods, sharding
from peftjax.core import variables
from peftjax.totals import next_token_loss
from peftjax.training import optim
from peftjax.training.step import Objective, init_state, make_train_step
from tests.interop.peers import (
    RATE,
    THEIRS,
    assert_close,
    assert_far,
    batches,
    load_into_theirs,
    load_theirs,
    logits,
    our_batches,
    trainable_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]
TARGETS = ("q_proj", "v_proj", "down_proj")
OURS = methods.AdaLora(
    init_rank=4,
    target_rank=3,
    alpha=64,
    total_steps=5,
    warmup_steps=1,
    final_steps=1,
    orthogonality=0.7,
    targets=TARGETS,
)


def theirs() -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=4,
        target_r=3,
        lora_alpha=64,
        total_step=5,
        tinit=1,
        tfinal=1,
        orth_reg_weight=0.7,
        target_modules=list(TARGETS),
    )


def train_ours(model: Any) -> None:
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model)
    config = optim.OptimConfig(learning_rate=RATE, clip_norm=0.0, schedule="constant")
    decay = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    optimizer = OURS.optimizer(optim.make_optimizer(config, 5, decay), leaves)
    state = init_state(trainable, optimizer, seed=0)
    step = make_train_step(Objective(graph, partial(next_token_loss, chunk=8), OURS.penalty), optimizer, state)
    with jax.set_mesh(mesh):
        for batch in our_batches():
            state, _ = step(state, frozen, sharding.shard_batch(batch, mesh, 2))
    variables.update(model, state.trainable)


def train_theirs(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step, ids in enumerate(map(torch.tensor, batches()), start=1):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


def file(path: Path) -> tuple[dict[str, np.ndarray], Any]:
    return load_file(path / "adapter_model.safetensors"), json.loads((path / "adapter_config.json").read_text())


def test_training_removes_the_same_ranks_and_ends_with_the_same_file(bases: Callable, tmp_path: Path) -> None:
    base = bases("untied")
    model = peftjax.attach(peftjax.load_model(base), OURS, rngs=nnx.Rngs(0))
    peer = trainable_theirs(base, theirs(), peftjax.save_adapter(model, tmp_path / "start"))
    train_ours(model)
    train_theirs(peer)
    peer.save_pretrained(tmp_path / "theirs")
    end, config = file(peftjax.save_adapter(model, tmp_path / "ours"))
    expected, expected_config = file(tmp_path / "theirs")

    assert config["rank_pattern"] == expected_config["rank_pattern"]
    ranks = [sum(entries) for entries in config["rank_pattern"].values()]
    assert sum(ranks) == 3 * len(ranks)
    assert len(set(ranks)) > 1
    assert end.keys() == expected.keys()
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key], atol=1e-4, rtol=0, err_msg=key)

    ours_there = load_into_theirs(base, tmp_path / "ours").eval()
    assert_close(logits(ours_there), logits(model))
    theirs_here = peftjax.load_adapter(peftjax.load_model(base), tmp_path / "theirs")
    assert_close(logits(theirs_here), logits(peer.eval()))
    assert_far(logits(theirs_here), logits(load_theirs(base)))
    again, again_config = file(peftjax.save_adapter(theirs_here, tmp_path / "again"))
    assert again_config["rank_pattern"] == expected_config["rank_pattern"]
    for key, value in again.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
