"""SmolLM2-135M-Instruct, a real checkpoint with the config.json of the hub, beside transformers in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import peftjax

PROMPTS = ("The capital of France is", "Water boils at")
NEW = 12


@pytest.mark.slow
def test_logits_and_generation_equal_those_of_transformers(smollm2: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"ignoring is_llama_config, rope_interleaved, transformers\.js_config, as"
    ) as warned:
        model = peftjax.load_model(smollm2)
    assert len(warned) == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0]
            logits = theirs(tokens[None]).logits.numpy()
            np.testing.assert_allclose(model(tokens.numpy()[None]), logits, atol=3e-4, rtol=1e-5)
            expected.append(tokens[len(prompt) :].tolist())
    assert peftjax.generate(model, prompts, max_new_tokens=NEW, stop=[tokenizer.eos_token_id]) == expected
    assert "Paris" in tokenizer.decode(expected[0])
