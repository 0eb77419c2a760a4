"""Rows for tokens that a tokenizer has and the embedding does not."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers

import peftjax
from peftjax import methods, sharding
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.data.batches import Batching, train_batches
from peftjax.io.random_model import make_random
from peftjax.io.resize import _grown
from peftjax.models import from_hf_config
from peftjax.tasks import make_task
from peftjax.training import config as configs
from peftjax.training.setup import attach_method
from tests import tiny
from tests.runs import in_process

VOCAB, MORE = 48, 54


@pytest.mark.slow_cases
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_and_are_saved(tmp_path: Path, tied: bool) -> None:
    before = tiny.model(tie_word_embeddings=tied)
    peftjax.save_model(before, tmp_path / "model")
    model = peftjax.load_model(tmp_path / "model", resize_embeddings=MORE)
    old, new = (np.asarray(each.embed.embedding.get_value()) for each in (before, model))
    np.testing.assert_array_equal(new[:VOCAB], old)
    np.testing.assert_allclose(new[VOCAB:], np.tile(old.mean(0), (MORE - VOCAB, 1)), atol=1e-6)
    expected, logits = before(tiny.tokens()), model(tiny.tokens())
    assert logits.shape == (4, 8, MORE)
    np.testing.assert_allclose(logits[..., :VOCAB], expected, atol=1e-5)
    np.testing.assert_allclose(logits[..., VOCAB:], expected.mean(-1, keepdims=True).repeat(6, -1), atol=1e-5)
    peftjax.save_model(model, tmp_path / "larger")
    again = peftjax.load_model(tmp_path / "larger", resize_embeddings=VOCAB)  # never shrinks
    np.testing.assert_array_equal(again(tiny.tokens()), logits)
    split = peftjax.load_model(tmp_path / "model", resize_embeddings=MORE, mesh=sharding.make_mesh({"tensor": 2}))
    np.testing.assert_array_equal(split.embed.embedding.get_value(), new)
    assert len(split.embed.embedding.get_value().sharding.device_set) == 2
    assert make_random(tmp_path / "model", resize_embeddings=MORE)(tiny.tokens()).shape == logits.shape


def test_new_rows_have_the_same_bits_on_every_mesh_so_that_a_run_can_resume_on_another(tmp_path: Path) -> None:
    table = jax.random.normal(jax.random.key(0), (1024, 128))
    meshes = [sharding.make_mesh(sizes) for sizes in ({}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 4, "tensor": 2})]
    split = [jax.device_put(table, sharding.spec(("vocab", "embed"), table.shape, mesh)) for mesh in meshes]
    one, *others = (
        np.asarray(_grown(x, (1032, 128), ("vocab", "embed"), mesh)) for x, mesh in zip(split, meshes, strict=True)
    )
    np.testing.assert_allclose(one[1024:], np.tile(np.asarray(table, np.float64).mean(0), (8, 1)), atol=1e-7)
    for other in others:
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("rows", [True, "300", 300.0])
def test_the_number_of_tokens_is_an_integer(rows: Any) -> None:
    with pytest.raises(UserError, match="resize_embeddings must be a number of tokens, such as"):
        peftjax.load_model("embedded", resize_embeddings=rows)


def test_an_image_model_has_no_rows(tmp_path: Path) -> None:
    peftjax.save_model(tiny.make(from_hf_config(tiny.VIT)), tmp_path / "vit")
    with pytest.raises(UserError, match=r"resize_embeddings=9 \(model.resize_embeddings\): the model reads no tokens"):
        peftjax.load_model(tmp_path / "vit", resize_embeddings=9)


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A model directory whose tokenizer has a token without a row, and records that use it."""
    directory = tiny.directory(tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(["<tool>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    records = [{"prompt": "a", "completion": text} for text in ("b", "<tool>")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


@pytest.mark.slow
def test_training_names_the_token_and_the_fix_and_the_fix_works(extended: Path) -> None:
    made = defaults()
    made.model.path, made.method = str(extended), methods.make_config("lora")
    made.data.train, made.data.format = (str(extended.parent / "train.jsonl"),), "completion"
    made.data.max_length, made.data.shuffle = 8, False
    config, mesh = configs.validate(made), sharding.make_mesh({})
    task = make_task(config.task, config.data, extended)
    task.load_model(config.model, extended, mesh, 0)
    batches = train_batches(config.data, task, Batching(2), 0)
    message = r"train.jsonl.*: token '<tool>' has the id 257, but the model's embedding has 257 rows; .*resize_embeddings=True"
    with pytest.raises(UserError, match=message):
        next(batches)
    made.model.resize_embeddings = True
    model = task.load_model(configs.validate(made).model, extended, mesh, 0)
    batch = next(train_batches(config.data, task, Batching(2), 0)).arrays
    assert 257 in batch["targets"]
    assert np.isfinite(task.loss(model, batch).loss)


def test_the_text_of_a_soft_prompt_names_the_token_and_the_fix_works(extended: Path) -> None:
    made = defaults()
    made.data.max_length = 8
    made.model.path, made.method = str(extended), methods.make_config("prompt", init="text", text="a<tool>", tokens=2)
    mesh = sharding.make_mesh({})
    for resize in (False, True):
        made.model.resize_embeddings = resize
        config = configs.validate(made)
        task = make_task(config.task, config.data, extended)
        model = task.load_model(config.model, extended, mesh, 0)
        if resize:
            assert attach_method(config, task, model, mesh).text_ids[-1] == 257
            continue
        with pytest.raises(UserError, match=r"method\.text='a<tool>': token '<tool>' has the id 257, .* has 257 rows"):
            attach_method(config, task, model, mesh)


def test_generate_names_the_token_and_the_fix_works(extended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--model={extended}", "--prompt=a<tool>", "--max-new-tokens=2"]
    assert in_process("generate", *arguments) == 2
    message = "error: --prompt: token '<tool>' has the id 257, but the model's embedding has 257 rows; "
    assert message in capsys.readouterr().err
    assert in_process("generate", *arguments, "--resize-embeddings") == 0
    assert "> a<tool>" in capsys.readouterr().out
