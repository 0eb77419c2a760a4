"""A run on long texts that are split into pieces: its losses, its length and what it prints."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from peftjax import sharding
from peftjax.io.load import load_model
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training.trained import held_out_scores, open_task
from tests.test_train import config

LENGTH = 8
TEXTS = {"train": [f"{n} and {n + 1} make {2 * n + 1}" for n in range(95, 107)], "eval": ["abc", "long " * 9, "x" * 15]}


def made(root: Path, **fields: Any) -> Any:
    """The config of a run on texts, some of which are longer than a row."""
    one = config(root, **fields)
    for name, texts in TEXTS.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    one.data.format, one.data.max_length, one.data.too_long = "text", LENGTH, "split"
    one.eval.exact_match = one.eval.samples = 0
    return configs.validate(one)


@pytest.mark.parametrize("pack", [False, True])
def test_the_held_out_loss_is_the_mean_over_all_tokens_but_the_first_of_each_text(pack: bool, tmp_path: Path) -> None:
    one = made(tmp_path, data__pack=pack)
    task, model, mesh = open_task(one), load_model(one.model.path), sharding.make_mesh()
    losses: list[float] = []
    for text in TEXTS["eval"]:
        tokens = task.tokenizer.end(task.tokenizer.begin(task.tokenizer.encode(text, bos=False, eos=False)))
        for start in range(0, len(tokens) - 1, LENGTH):
            read, predicted = tokens[start : start + LENGTH], tokens[start + 1 : start + LENGTH + 1]
            logits = model(jnp.array([read]))[0].astype(jnp.float32)
            scores = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
            losses += [-float(scores[at, token]) for at, token in enumerate(predicted)]
        assert len(tokens) - 1 <= len(losses)
    task.accept(model, one.model.path)
    scores = held_out_scores(one, model, task, mesh)
    assert scores["eval_tokens"] == len(losses)
    assert scores["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@pytest.mark.slow
def test_an_epoch_is_counted_in_pieces_and_a_run_says_how_many_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = made(tmp_path, train__epochs=1.0, train__steps=1000, train__batch_size=4)
    workdir = tmp_path / "run"
    train(one, workdir)
    printed = capsys.readouterr().out
    task = open_task(one)
    lengths = [len(task.tokenizer.encode(text)) + 1 for text in TEXTS["train"]]  # with the end
    rows = sum(math.ceil((length - 1) / LENGTH) for length in lengths)
    steps = rows // 4
    assert f"{steps} steps of 4 rows: 1 epoch of {rows} rows" in printed
    assert re.search(
        r"records in the first \d+ batches are too long and are split into \d+ pieces of at most 8", printed
    )
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == steps
    counts = json.loads((workdir / "report.json").read_text())["counts"]
    assert counts["rows"] == steps * 4
    assert "Pieces of these" in (workdir / "report.html").read_text()
