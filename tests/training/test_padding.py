"""Batches padded to their longest example train the same adapter as batches padded to the maximum length."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import peftjax
from peftjax import methods, sharding
from peftjax.core.config import defaults
from peftjax.data import padding
from peftjax.models import from_hf_config
from peftjax.training import config as configs
from peftjax.training.setup import attach_method, open_data
from peftjax.training.split import split
from peftjax.training.step import init_state, make_train_step
from tests import tiny
from tests.tasks.test_tasks import BERT, T5

LENGTHS = (20, 9, 45, 30, 3, 31)  # of the prompts of three batches, in tokens
MODELS: dict[str, dict[str, Any]] = {
    "causal_lm": tiny.CONFIG | {"vocab_size": 257, "num_hidden_layers": 2},
    "classification": BERT | {"max_position_embeddings": 64},
    "seq2seq": T5,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_padding_to_the_longest_example_changes_no_loss_and_no_parameter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    tiny.write_tokenizer(model)
    peftjax.save_model(tiny.make(from_hf_config(MODELS[kind])), tmp_path / "weights")
    for file in (tmp_path / "weights").iterdir():
        file.rename(model / file.name)
    records = [{"prompt": "ab" * (n // 2), "completion": "c" * (1 + n // 3), "label": n % 2} for n in LENGTHS]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = defaults()
    made.model.path, made.method, made.data.train = (
        str(model),
        methods.make_config("lora", dropout=0.1),
        (str(tmp_path / "train.jsonl"),),
    )
    made.task.kind, made.task.labels = kind, ("no", "yes") if kind == "classification" else ()
    made.data.format, made.data.shuffle, made.data.max_length, made.data.max_target_length = "completion", False, 64, 48
    made.optim.name, made.optim.learning_rate, made.train.steps = "sgd", 0.1, 3
    made.train.batch_size, made.train.accumulate = 2, 2
    config = configs.validate(made)

    def train() -> tuple[list[tuple[int, ...]], list[float], dict[str, jax.Array]]:
        mesh, lengths, losses = sharding.make_mesh(), [], []
        with jax.set_mesh(mesh):
            task, data = open_data(config, mesh)
            model = task.load_model(config.model, task.directory, mesh, config.seed)
            objective, tx, trainable, frozen = split(config, task, model, attach_method(config, task, model, mesh))
            state = init_state(trainable, tx, config.seed)
            step = make_train_step(objective, tx, state)
            for batch in itertools.islice(data, config.train.steps):
                lengths.append(tuple({array.shape[1]: 0 for array in batch.arrays.values() if array.ndim == 2}))
                state, metrics = step(state, frozen, sharding.shard_batch(batch.arrays, mesh, 2))
                losses.append(float(metrics["loss"]))
        return lengths, losses, state.trainable

    lengths, losses, trained = train()
    assert len(set(lengths)) > 1
    monkeypatch.setattr(padding, "SHORTEST", 64)
    full, expected, reference = train()
    assert set(full) == {(64, 48) if kind == "seq2seq" else (64,)}
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert len(set(losses)) == 3
    moved = 0
    for path, value in reference.items():
        if isinstance(value, jax.Array):
            np.testing.assert_allclose(trained[path], value, atol=1e-6, err_msg=path)
            moved += path.endswith(".b") and bool(np.abs(value).max() > 1e-4)
    assert moved
