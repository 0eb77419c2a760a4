"""The table of methods in experiments/peft_table, on a few records."""

import dataclasses
import gzip
import json
import math
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu

import peftjax
from experiments import rates
from experiments.peft_table import bootstrap, costs, plans, setting, study, table
from peftjax.models import from_hf_config
from peftjax.training.config import Config
from tests import tiny

ROOT = Path(__file__).parents[1]
BERT = {
    "model_type": "bert", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 256,
}  # fmt: skip
LLAMA = tiny.CONFIG | {"vocab_size": 257, "eos_token_id": 256, "max_position_embeddings": 128}
QUESTIONS = [
    {"text": text, "label": label} for text, label in (("who ran ?", 3), ("what is it ?", 1), ("how many ?", 5))
]
FACTS = [
    {"mr": mr, "ref": ref}
    for mr, ref in (
        ("name[A]", "A is here."),
        ("name[A]", "Here is A."),
        ("name[B]", "B is there."),
        ("name[C]", "See C."),
    )
]


def write(folder: Path, names: list[str], records: list[dict[str, object]]) -> None:
    folder.mkdir()
    for name in names:
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of study.py, for tiny models and few records; all files are written to `tmp_path`."""
    for task in ("trec", "e2e"):
        few = dataclasses.replace(setting.TASKS[task], rows=16, epochs=2, seeds=2, length=96 if task == "e2e" else 32)
        monkeypatch.setitem(setting.TASKS, task, few)
    for method in ("lora", "full"):
        monkeypatch.setitem(setting.RATES, method, (1e-3, 1e-2))
    monkeypatch.setattr(setting, "MEANINGS", 2)
    monkeypatch.setattr(study, "NEW_TOKENS", 4)
    monkeypatch.setattr(rates, "MOST_RATES", 3)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.setattr(table, "COSTS", tmp_path / "costs.json")
    monkeypatch.setattr(table, "PLANS", tmp_path / "plans.json")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "trec", ["train", "validation", "test"], QUESTIONS * 6)
    write(tmp_path / "data" / "e2e_nlg", ["train", "validation", "test"], FACTS * 4)
    for name, config in (("encoder", BERT), ("decoder", LLAMA)):
        tiny.write_tokenizer(tmp_path / name)
        peftjax.save_model(tiny.make(from_hf_config(config)), tmp_path / "weights")
        for file in (tmp_path / "weights").iterdir():
            file.rename(tmp_path / name / file.name)
    options = [f"--encoder={tmp_path / 'encoder'}", f"--decoder={tmp_path / 'decoder'}", f"--data={tmp_path / 'data'}"]
    return [*options, f"--workdir={tmp_path}"]


@pytest.mark.slow
def test_one_command_trains_scores_and_compares_and_keeps_what_is_there(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for values, kept in (
        (setting.TASKS, {"trec", "e2e"}),
        (setting.METHODS, {"full", "lora"}),
        (setting.RATES, {"full", "lora"}),
    ):
        for name in values.keys() - kept:
            monkeypatch.delitem(values, name)
    monkeypatch.setattr(costs, "COSTS", tmp_path / "costs.json")
    monkeypatch.setattr(costs, "MODELS", {"encoder": "trec", "decoder": "e2e"})
    for name, value in (("ROUNDS", 1), ("STEPS", 1), ("ANSWERS", 2), ("PROMPT", 8), ("NEW_TOKENS", 4)):
        monkeypatch.setattr(costs, name, value)
    monkeypatch.setattr(costs, "peak_of_training", lambda arguments, method: 10**9)  # needs a process for each method
    planned = json.dumps({"bytes": {"7b": {"full": 2**36, "lora": 2**34}}})
    monkeypatch.setattr(plans, "main", lambda: (tmp_path / "plans.json").write_text(planned))  # needs a GPU's compiler
    monkeypatch.setattr(sys, "argv", ["peft_table", *options])
    runpy.run_module("experiments.peft_table", run_name="__main__")

    assert {file.name for file in (tmp_path / "results").iterdir()} == {
        f"{task}-{method}.json" for task in ("trec", "e2e") for method in ("full", "lora")
    }
    lora = json.loads((tmp_path / "results" / "trec-lora.json").read_text())
    mean = statistics.mean(seed["epochs"][-1]["validation"] for seed in lora["seeds"].values())
    assert mean == lora["means"][str(lora["rate"])] == max((lora["validation"] | lora["means"]).values())
    right = bootstrap.records_of(lora, "accuracy", [])
    for seed, share in zip(lora["seeds"].values(), right.score(right.values.sum(1)), strict=True):
        assert share / 100 == pytest.approx(seed["epochs"][-1]["accuracy"])
    answered = json.loads((tmp_path / "results" / "e2e-lora.json").read_text())
    references = [["A is here.", "See C."], ["Here is A.", None]]  # of the first and the last meaning representation
    for score in ("bleu", "rouge_l"):
        records = bootstrap.records_of(answered, score, [["A is here.", "Here is A."], ["See C."]])
        for seed, value in zip(answered["seeds"].values(), records.score(records.values.sum(1)), strict=True):
            assert seed["epochs"][-1][score] * (1 if score == "bleu" else 100) == pytest.approx(value)
    for seed in answered["seeds"].values():
        bleu = sacrebleu.corpus_bleu(seed["predictions"], references).score
        assert seed["epochs"][-1]["bleu"] == pytest.approx(bleu)

    text = (tmp_path / "table.md").read_text()
    lines = text.splitlines()
    assert any(line.startswith("| lora - full |") and " to " in line for line in lines)
    assert (tmp_path / "scores.md").read_text().splitlines()[0] == "| method | TREC | E2E, BLEU | E2E, ROUGE-L |"
    mean = 100 * np.mean([seed["epochs"][-1]["accuracy"] for seed in lora["seeds"].values()])
    assert any(line.startswith("| lora") and f"{mean:.1f} ±" in line for line in lines)
    assert (tmp_path / "scores.png").stat().st_size > 1000
    *scores, encoder, decoder, memory = text.split("\n## ")
    assert len([line for part in scores for line in part.splitlines() if line.startswith("| lora |")]) == 3
    for part in (encoder, decoder):
        full, lora = (line.split(" | ") for line in part.splitlines()[-2:])
        assert (full[0], full[2], lora[0]) == ("| full", "100.00%", "| lora")
    assert memory.splitlines()[-4:-2] == ["| full | 64.0 |", "| lora | 16.0 |"]

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("existing results are kept")

    for module, name in ((study, "study"), (costs, "main"), (plans, "main")):
        monkeypatch.setattr(module, name, never)
    (tmp_path / "table.md").unlink()
    runpy.run_module("experiments.peft_table", run_name="__main__")
    assert (tmp_path / "table.md").read_text() == text


def test_a_killed_study_repeats_only_the_seed_that_was_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def run_seed(config: Config, workdir: Path, *_: Any) -> dict[str, Any]:
        trained.append(config.seed)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return {"epochs": [{"validation": 0.9}], "predictions": f"answers of {config.seed}"}

    monkeypatch.setattr(study, "search", lambda *_, **__: {1e-3: 0.8})
    monkeypatch.setattr(study, "make_scorer", lambda *_: None)
    monkeypatch.setattr(study, "run_seed", run_seed)
    arguments = ("trec", "lora", {"encoder": "BERT"}, tmp_path / "data", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        study.study(*arguments)
    found = study.study(*arguments)
    assert trained == [0, 1, 2, 2, 3, 4]
    assert {seed: run["predictions"] for seed, run in found["seeds"].items()} == {
        seed: f"answers of {seed}" for seed in range(5)
    }
    assert found["cpu_seconds"] >= sum(run["cpu_seconds"] for run in found["seeds"].values())
    assert found["means"] == {1e-3: pytest.approx(0.9)}


def test_the_majority_share_is_that_of_the_most_frequent_label(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*QUESTIONS, QUESTIONS[1]]))
    assert setting.majority_share(tmp_path / "test.jsonl") == 50


def rows(page: str, width: int) -> list[list[str]]:
    """The cells of the tables with that many columns in a Markdown page of the repository."""
    lines = (ROOT / page).read_text().splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in found if len(row) == width and not row[0].startswith("---")]


@pytest.mark.parametrize("page", ["README.md", "experiments/peft_table/README.md"])
def test_a_page_shows_the_scores_and_the_trained_shares_of_the_table(page: str) -> None:
    (_, *titles), *scores = rows("experiments/peft_table/scores.md", 8)
    (_, _, *shown_titles), *shown = rows(page, 9)
    assert shown_titles == titles
    assert [[name, *cells] for name, _, *cells in shown] == [[setting.NAMES[name], *cells] for name, *cells in scores]
    measured = json.loads((ROOT / "experiments/peft_table/costs.json").read_text()).values()
    for (method, *_), (_, text, *_) in zip(scores, shown, strict=True):
        shares = [each["methods"][method]["share"] for each in measured if method in each["methods"]]
        for share, percent in zip(shares, text.removesuffix("%").split(" / "), strict=method != "full"):
            assert round(100 * share, len(percent.partition(".")[2])) == float(percent)


def test_the_readme_of_the_table_shows_its_plans() -> None:
    _, *planned = rows("experiments/peft_table/table.md", 4)
    shown = [row for row in rows("experiments/peft_table/README.md", 4) if row[0] in setting.NAMES.values()]
    assert shown == [[setting.NAMES[name], *cells] for name, *cells in planned]


def test_rates_are_tried_until_the_best_lies_between_others() -> None:
    assert rates.more_rates({1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}, lower=False) == []
    assert rates.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}, lower=False) == [3e-2]
    assert rates.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}, lower=True) == [3e-4]
    assert rates.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: math.nan}, lower=False) == []
    assert len(rates.more_rates({10.0**power: power for power in range(7)}, lower=False)) == 1
    assert rates.more_rates({10.0**power: power for power in range(8)}, lower=False) == []


def result(predictions: list[Any]) -> dict[str, Any]:
    """A result file with these predictions by seed."""
    epochs = [{"eval_labels": 400.0}]
    return {"seeds": {str(seed): {"predictions": one, "epochs": epochs} for seed, one in enumerate(predictions)}}


def test_a_difference_exceeds_chance_if_it_is_large_in_all_seeds() -> None:
    rng = np.random.default_rng(0)

    def accuracies(*shares: float) -> bootstrap.Records:
        bits = [np.packbits(rng.random(400) < share).tobytes().hex() for share in shares]
        return bootstrap.records_of(result(bits), "accuracy", [])

    good, similar, bad = (accuracies(share, share, share) for share in (0.8, 0.8, 0.6))
    unstable = accuracies(0.8, 0.8, 0.1)
    difference = bootstrap.compare(good, bad)
    assert difference.low < difference.mean < difference.high
    assert difference.significant
    assert bootstrap.compare(bad, good).mean == pytest.approx(-difference.mean)
    assert not bootstrap.compare(good, similar).significant
    assert not bootstrap.compare(good, unstable).significant  # one seed of three
    assert bootstrap.compare(good, good) == (0, 0, 0)


def test_missing_references_do_not_shorten_the_expected_answers() -> None:
    columns = setting.columns({"name[A]": ["A is here today ."], "name[B]": ["B is .", "There is B ."]})
    assert columns == [["A is here today .", "B is ."], [None, "There is B ."]]
    assert sacrebleu.corpus_bleu(["A", "B is ."], columns).bp < 1  # "A" would be nearer to an empty reference


@pytest.mark.parametrize("score", ["bleu", "rouge_l"])
def test_scores_of_answers_differ_if_one_method_has_more_wrong_ones(score: str) -> None:
    rng, facts = np.random.default_rng(0), [f"The number {number} is a fine one to have ." for number in range(60)]

    def answers(share: float) -> bootstrap.Records:
        texts = [[fact if rng.random() < share else "It is ." for fact in facts] for _ in range(2)]
        return bootstrap.records_of(result(texts), score, [[fact] for fact in facts])

    good, similar, bad = answers(0.8), answers(0.8), answers(0.2)
    assert bootstrap.compare(good, bad).significant
    assert not bootstrap.compare(good, similar).significant
