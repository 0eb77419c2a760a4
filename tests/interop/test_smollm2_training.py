"""A real model: ten LoRA steps on SmolLM2-135M-Instruct, in peftjax and in peft."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax.core import variables
from peftjax.totals import next_token_loss
from tests.interop.peers import THEIRS, adamw, load_theirs, optimizer_for

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]
STEPS, LENGTH = 10, 24
TEXT = Path(__file__).resolve().parents[2] / "configs" / "data" / "date_chats" / "train.jsonl"


def batches(base: Path) -> list[np.ndarray]:
    """Token ids [2, LENGTH + 1] of every step: real text, in the model's own tokens."""
    ids = peftjax.load_tokenizer(base).encode(TEXT.read_text()[:6000])
    return list(np.array(ids[: STEPS * 2 * (LENGTH + 1)], np.int32).reshape(STEPS, 2, LENGTH + 1))


def train_ours(model: Any, steps: list[np.ndarray]) -> list[float]:
    graph, trainable, frozen = variables.split(model, variables.trainable_mask(variables.flat(model)[1]))
    optimizer = optimizer_for(model, trainable)

    @jax.jit
    def step(trainable: Any, state: Any, frozen: Any, ids: jax.Array) -> Any:
        batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": jnp.ones((2, LENGTH))}

        def loss(trainable: Any) -> jax.Array:
            totals = next_token_loss(variables.join(graph, trainable, frozen), batch, LENGTH)
            return totals.loss / totals.tokens

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for ids in steps:
        trainable, state, value = step(trainable, state, frozen, jnp.asarray(ids))
        losses.append(float(value))
    variables.update(model, trainable)
    return losses


def train_theirs(model: Any, steps: list[np.ndarray]) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = adamw(parameters), []
    for ids in (torch.tensor(ids, dtype=torch.long) for ids in steps):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_ten_lora_steps_have_the_losses_and_the_adapter_of_peft(smollm2: Path, tmp_path: Path) -> None:
    steps = batches(smollm2)
    model = peftjax.load_model(smollm2)
    options = {"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj")}
    peftjax.attach(model, peftjax.Lora(**options), rngs=nnx.Rngs(0))
    start = peftjax.save_adapter(model, tmp_path / "start")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    other = peft.get_peft_model(load_theirs(smollm2, dtype=torch.float32), config)
    peft.set_peft_model_state_dict(other, peft.utils.load_peft_weights(str(start), device="cpu"))

    losses, expected = train_ours(model, steps), train_theirs(other, steps)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert losses[-1] < losses[0] - 0.3
    ours = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    theirs = peft.get_peft_model_state_dict(other)
    assert ours.keys() == theirs.keys()
    before = load_file(start / "adapter_model.safetensors")
    # Adam divides by the size of the gradient, so a few elements with gradients near 0 differ: compare whole tensors
    for key, value in ours.items():
        moved = np.linalg.norm(theirs[key].detach().numpy() - before[key])
        difference = np.linalg.norm(value - theirs[key].detach().numpy())
        assert difference <= 0.03 * moved, key
