"""Rows for added tokens, beside transformers' `resize_token_embeddings`."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import peftjax
from tests.interop.peers import THEIRS, load_theirs, logits

pytestmark = [pytest.mark.filterwarnings(warning) for warning in THEIRS]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_added_rows_equal_theirs_up_to_the_noise_that_they_add(
    bases: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    theirs = load_theirs(bases(name))
    torch.manual_seed(0)
    theirs.resize_token_embeddings(53, mean_resizing=True)
    ours = peftjax.load_model(bases(name), resize_embeddings=53)
    table = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(ours.embed.embedding.get_value(), table, atol=1e-4)  # the noise: 3e-5 times their spread
    np.testing.assert_allclose(logits(ours, 53), logits(theirs, 53), atol=2e-3)
    peftjax.save_model(ours, tmp_path / "larger")
    again = load_theirs(tmp_path / "larger")
    assert again.config.vocab_size == 53
    np.testing.assert_allclose(logits(again, 53), logits(ours, 53), atol=1e-4)
