"""Every kind of task from its records to its scores, by the train and evaluate commands, on tiny random models."""

import json
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peftjax
from peftjax import evaluate, methods
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.io.json_files import read_json
from peftjax.log import read_metrics
from peftjax.models import from_hf_config
from peftjax.report.data import ReportData
from peftjax.tasks import TaskConfig, make_task
from peftjax.tasks.classification import Classification
from peftjax.train import train
from peftjax.training import config as configs
from tests import tiny

BERT = {
    "model_type": "bert", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 256,
}  # fmt: skip
T5 = {
    "model_type": "t5", "vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": 0, "architectures": ["T5ForConditionalGeneration"],
}  # fmt: skip

LLAMA = tiny.CONFIG | {"vocab_size": 257, "hidden_size": 16}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], Path]:
    """Writes a model directory once for each model_type."""
    root = tmp_path_factory.mktemp("models")

    def write(fields: dict[str, Any]) -> Path:
        path = root / fields["model_type"]
        if not path.exists():
            peftjax.save_model(tiny.make(from_hf_config(fields)), path)
            tiny.write_tokenizer(root / "tokenizer" / path.name)
            for file in (root / "tokenizer" / path.name).iterdir():
                file.rename(path / file.name)
        return path

    return write


def records(kind: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Texts of a's and b's: whether and where there is an a, how many, and the text itself are to be told."""
    rng = random.Random(seed)
    for _ in range(count):
        words = [rng.choice(["a", "b"]) for _ in range(4)] if rng.random() < 0.5 else ["b"] * 4
        yield {
            "text": " ".join(words),
            "words": words,
            "label": {
                "classification": int("a" in words),
                "multi_label": [letter for letter in "ab" if letter in words],
                "regression": float(words.count("a")),
                "token_classification": words,
                "seq2seq": "",
                "causal_lm": "",
            }[kind],
        }


def config(root: Path, model: Path, kind: str, labels: tuple[str, ...] = (), **fields: Any) -> Any:
    made = defaults()
    made.model.path = str(model)
    made.method = methods.make_config("lora", rank=4)
    made.task.kind, made.task.labels = kind.replace("multi_label", "classification"), labels
    made.task.multi_label = kind == "multi_label"
    made.data.train, made.data.eval = (str(root / "train.jsonl"),), (str(root / "eval.jsonl"),)
    made.data.prompt_template, made.data.max_length, made.data.max_target_length = "{text}", 16, 10
    made.data.completion_template = "{text}"
    made.optim.learning_rate = 2e-2
    made.train.steps, made.train.batch_size, made.train.log_every, made.checkpoint.every = 12, 16, 4, 6
    made.train.eval_every = 0
    for name, value in fields.items():
        section, _, field = name.partition("__")
        made[section][field] = value
    for name, count, seed in (("train", 64, 0), ("eval", 20, 1)):
        lines = [json.dumps(record) + "\n" for record in records(kind, count, seed)]
        (root / f"{name}.jsonl").write_text("".join(lines))
    return made


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "labels", "measured"),
    [
        ("classification", ("without", "with"), {"accuracy", "f1", "matthews"}),
        ("multi_label", ("a", "b", "c"), {"accuracy", "micro_f1", "macro_f1"}),
        ("regression", (), {"pearson", "spearman"}),
        ("token_classification", ("a", "b", "c"), {"accuracy", "macro_f1", "matthews"}),
    ],
)
def test_an_encoder_learns_a_task_and_is_evaluated_as_it_was_left(
    kind: str, labels: tuple[str, ...], measured: set[str], models: Callable, tmp_path: Path
) -> None:
    made, workdir = config(tmp_path, models(BERT), kind, labels), tmp_path / "run"
    scores = train(configs.validate(made), workdir).scores
    before, after = (line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval")
    assert scores.keys() == {"eval_loss", "eval_labels"} | measured
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_labels"] == (80 if kind == "token_classification" else 20)
    assert "mean over labels" in (workdir / "report.html").read_text()
    assert_reported(kind, labels, tmp_path, workdir, scores)
    task = "TOKEN_CLS" if kind == "token_classification" else "SEQ_CLS"
    assert read_json(workdir / "adapter" / "adapter_config.json")["task_type"] == task

    assert_evaluated(made, workdir)


def assert_reported(kind: str, labels: tuple[str, ...], root: Path, workdir: Path, scores: dict[str, float]) -> None:
    """The report has the predictions of the last evaluation."""
    data = ReportData.load(workdir)
    assert data.counts["records"] == 12 * 16
    assert data.padding == pytest.approx(1 - data.counts["tokens"] / (12 * 16 * 16))
    assert data.origin["workdir"] == str(workdir)
    classes = data.classes
    if kind == "regression":
        assert classes is None
        return
    assert classes is not None
    assert (classes.step, tuple(score.name for score in classes.scores)) == (12, labels)
    if kind != "multi_label":
        right = sum(count for true, predicted, count in classes.confusions if true == predicted)
        assert right / scores["eval_labels"] == pytest.approx(scores["accuracy"])
    if kind == "token_classification":  # each word has a prediction
        assert classes.examples == ()
        return
    lines = (root / "eval.jsonl").read_text().splitlines()
    assert 1 <= len(classes.examples) <= 9
    for example in classes.examples:
        record = json.loads(lines[int(example.record.rpartition(":")[2]) - 1])
        names = [labels[record["label"]]] if kind == "classification" else record["label"]
        assert (example.text, example.expected) == (record["text"], ", ".join(names) or "none")
        assert example.correct == (example.predicted == example.expected)
        assert (example.probability is None) == (kind == "multi_label")
    marks = [example.correct for example in classes.examples]
    assert marks == sorted(marks)  # the wrong ones first
    assert sum(marks) == min(3, round(20 * scores["accuracy"]))


def assert_evaluated(made: Any, workdir: Path) -> None:
    """The evaluate command finds what the training's last evaluation found."""
    file = workdir.with_name("config.py")
    file.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({made.to_dict()!r})\n"
    )
    evaluate.main([f"--config={file}", f"--workdir={workdir}"])
    scores = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "eval"][-1]
    again = json.loads((workdir / "evaluation.json").read_text())
    assert again.keys() == scores.keys() - {"step", "kind", "seconds"}
    np.testing.assert_allclose(list(again.values()), [scores[name] for name in again], rtol=1e-5)


@pytest.mark.slow
def test_full_fine_tuning_leaves_a_classifier_with_the_names_of_its_classes(models: Callable, tmp_path: Path) -> None:
    made = config(tmp_path, models(BERT), "classification", ("without", "with"), train__steps=2)
    made.method = methods.make_config("full")
    train(configs.validate(made), tmp_path / "run")
    stored = read_json(tmp_path / "run" / "model" / "config.json")
    assert stored["architectures"] == ["BertForSequenceClassification"]
    assert stored["id2label"] == {"0": "without", "1": "with"}
    assert stored["problem_type"] == "single_label_classification"

    made.model.path, made.task.labels = str(tmp_path / "run" / "model"), ()  # its own head, and classes
    train(configs.validate(made), tmp_path / "again")
    made.task.labels = ("with", "without")
    with pytest.raises(ValueError, match=r"the checkpoint's head has \('without', 'with'\); use those, or replace it"):
        train(configs.validate(made), tmp_path / "other")
    made.task.kind, made.task.labels = "regression", ()
    with pytest.raises(ValueError, match="labels=1, but the checkpoint's head has 2"):
        train(configs.validate(made), tmp_path / "other")
    made.task.kind, made.task.labels, made.model.new_head = "classification", ("x", "y", "without", "with"), True
    train(configs.validate(made), tmp_path / "new")
    assert list(read_json(tmp_path / "new" / "model" / "config.json")["id2label"].values()) == [
        "x",
        "y",
        "without",
        "with",
    ]
    assert_evaluated(made, tmp_path / "new")


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_write_and_its_answers_are_scored(models: Callable, tmp_path: Path) -> None:
    made = config(
        tmp_path, models(T5), "seq2seq", eval__exact_match=6, eval__samples=2, eval__max_new_tokens=8,
        eval__metrics=("exact_match", "bleu", "rouge_l"),
    )  # fmt: skip
    scores = train(configs.validate(made), tmp_path / "run").scores
    before, after = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval")
    assert after["eval_loss"] < before["eval_loss"]
    answers = {"exact_match", "bleu", "rouge_l", "prompts"}
    assert scores.keys() == {"eval_loss", "perplexity", "token_accuracy", "eval_tokens"} | answers
    assert "SEQ_2_SEQ_LM" in (tmp_path / "run" / "adapter" / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"eval__exact_match": 3},
            "eval.exact_match=3: task.kind='classification' does not generate text; set it to 0",
        ),
        ({"eval__samples": 1}, "eval.samples=1: task.kind='classification' does not generate"),
        (
            {"eval__metrics": ("rouge",)},
            r"eval.metrics has 'rouge'\. Did you mean 'rouge_l'\? Metrics of generated answers: exact_match, bleu",
        ),
        (
            {"model__path": "embedded"},
            "^model.path='embedded' does not support task.kind='classification': a model of type 'llama' has no task head to "
            "choose; only encoders do",
        ),
    ],
)
def test_what_does_not_go_with_the_task_is_an_error(
    fields: dict[str, Any], message: str, models: Callable, tmp_path: Path
) -> None:
    made = config(tmp_path, models(BERT), "classification", ("without", "with"), **fields)
    with pytest.raises(ValueError, match=message):
        train(configs.validate(made), tmp_path / "run")


def test_a_zero_or_one_for_each_class_is_not_taken_for_numbers_of_classes(models: Callable) -> None:
    task = make_task(TaskConfig("classification", ("a", "b", "c"), multi_label=True), DataConfig(), models(BERT))
    assert isinstance(task, Classification)
    assert task.label([0, 1], "r:1").tolist() == [1, 1, 0]
    with pytest.raises(
        UserError, match=r"r:1: .* seems to hold a 0 or 1 for each class, \[0, 1, 1\]; .* such as \[1, 2\]"
    ):
        task.label([0, 1, 1], "r:1")
    of_two = make_task(TaskConfig("classification", ("a", "b"), multi_label=True), DataConfig(), models(BERT))
    assert isinstance(of_two, Classification)
    assert [of_two.label(given, "r:1").tolist() for given in ([0, 1], [1, 0], [0])] == [[1, 1], [1, 1], [1, 0]]
    for flags, meant in (([0, 0], []), ([1, 1], [0, 1]), ([False, True], [1])):
        with pytest.raises(
            UserError, match=rf"seems to hold a 0 or 1 for each class, .* such as {re.escape(str(meant))}"
        ):
            of_two.label(flags, "r:1")


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_a_mixture_of_experts_is_trained_with_a_load_balancing_loss(
    pack: bool, models: Callable, tmp_path: Path
) -> None:
    """Which is logged, is in the sum to minimize, and makes the routers' load more even; the evaluation is without it."""
    made = config(tmp_path, models(MIXTRAL), "causal_lm", data__pack=pack, train__accumulate=2)
    made.task.router_aux_loss_coef = 20.0
    made.method = methods.make_config("lora", rank=4, targets=("mlp.gate",))
    scores = train(configs.validate(made), tmp_path / "run").scores
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    losses = [line["router_aux_loss"] for line in lines]
    assert 0 < losses[-1] < losses[0]
    assert scores.keys() == {"eval_loss", "perplexity", "token_accuracy", "eval_tokens"}
    assert_evaluated(made, tmp_path / "run")
    if not pack:
        made.model.path, made.method = str(models(LLAMA)), methods.make_config("lora", rank=4)
        with pytest.raises(ValueError, match=r"router_aux_loss_coef=20.0: .* is a Llama, for which no load-balancing"):
            train(configs.validate(made), tmp_path / "dense")
