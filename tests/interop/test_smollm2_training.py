"""A real model: ten LoRA steps on SmolLM2-135M-Instruct, in peftjax and in peft."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from tests.interop.peers import THEIRS, load_theirs, train_by_hand, train_theirs

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]
STEPS, LENGTH = 10, 24
TEXT = Path(__file__).resolve().parents[2] / "configs" / "data" / "date_chats" / "train.jsonl"


def batches(base: Path) -> list[np.ndarray]:
    """Token ids [2, LENGTH + 1] of every step: real text, in the model's own tokens."""
    ids = peftjax.load_tokenizer(base).encode(TEXT.read_text()[:6000])
    return list(np.array(ids[: STEPS * 2 * (LENGTH + 1)]).reshape(STEPS, 2, LENGTH + 1))


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

    losses, expected = train_by_hand(model, steps), train_theirs(other, steps=steps)
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
