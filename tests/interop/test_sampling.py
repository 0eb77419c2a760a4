"""Sampling beside `generate` of transformers: the scores that the next token is drawn from."""

import itertools

import jax
import numpy as np
import pytest
import torch
import transformers

from peftjax.sampling import Sampling

pytestmark = pytest.mark.interop


def test_tokens_are_drawn_from_the_scores_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    prompts = torch.randint(3, 96, (8, 5))
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits, axis: logits)
    for temperature, top_k, top_p in itertools.product((0.3, 1.0, 1.7), (0, 1, 7, 200), (0.05, 0.6, 0.95, 1.0)):
        found = theirs.generate(
            prompts,
            max_new_tokens=1,
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            pad_token_id=0,
            output_logits=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ours = Sampling(temperature, top_k, top_p).draw(found.logits[0].numpy(), jax.random.key(0))
        np.testing.assert_allclose(ours, found.scores[0].numpy(), rtol=1e-6)
