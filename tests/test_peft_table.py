"""The table of methods in experiments/peft_table, on a few records."""

import dataclasses
import gzip
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

import peftjax
from experiments.peft_table import setting, study, table
from peftjax.models import from_hf_config
from tests import tiny

BASE = Path(__file__).parents[1] / "peftjax" / "assets" / "base"
BERT = {
    "model_type": "bert", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 256,
}  # fmt: skip
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


@pytest.mark.slow
def test_methods_are_trained_scored_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("trec", "e2e"):
        few = dataclasses.replace(setting.TASKS[task], rows=16, epochs=2, seeds=2, length=96 if task == "e2e" else 32)
        monkeypatch.setitem(setting.TASKS, task, few)
    for method in ("lora", "full"):
        monkeypatch.setitem(setting.RATES, method, (1e-3, 1e-2))
    monkeypatch.setattr(setting, "MEANINGS", 2)
    monkeypatch.setattr(study, "NEW_TOKENS", 4)
    monkeypatch.setattr(study, "MOST_RATES", 3)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "HERE", tmp_path)
    monkeypatch.setattr(table, "COSTS", tmp_path / "costs.json")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "trec", ["train", "validation", "test"], QUESTIONS * 6)
    write(tmp_path / "data" / "e2e_nlg", ["train", "validation", "test"], FACTS * 4)
    tiny.write_tokenizer(tmp_path / "bert")
    peftjax.save_model(tiny.make(from_hf_config(BERT)), tmp_path / "weights")
    for file in (tmp_path / "weights").iterdir():
        file.rename(tmp_path / "bert" / file.name)
    options = [f"--encoder={tmp_path / 'bert'}", f"--decoder={BASE}", f"--data={tmp_path / 'data'}"]
    options += [f"--workdir={tmp_path}", "--method=lora"]

    study.main([*options, "--task=trec"])
    study.main([*options, "--task=e2e", "--method=full"])

    lora = json.loads((tmp_path / "results" / "trec-lora.json").read_text())
    mean = statistics.mean(seed["epochs"][-1]["validation"] for seed in lora["seeds"].values())
    assert mean == lora["means"][str(lora["rate"])] == max((lora["validation"] | lora["means"]).values())
    for seed, right in zip(lora["seeds"].values(), table.right_answers(lora), strict=True):
        assert right.sum() / 18 == pytest.approx(seed["epochs"][-1]["accuracy"])
    answered = json.loads((tmp_path / "results" / "e2e-lora.json").read_text())
    references = [["A is here.", "See C."], ["Here is A.", None]]  # of the first and the last meaning representation
    for seed in answered["seeds"].values():
        bleu = sacrebleu.corpus_bleu(seed["predictions"], references).score
        assert seed["epochs"][-1]["bleu"] == pytest.approx(bleu)

    table.main([f"--workdir={tmp_path}"])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| lora")] == ["| lora"] * 3
    mean = 100 * np.mean([seed["epochs"][-1]["accuracy"] for seed in lora["seeds"].values()])
    assert any(line.startswith("| lora") and f"{mean:.1f} ±" in line for line in lines)
    assert (tmp_path / "scores.png").stat().st_size > 1000


def test_rates_are_tried_until_the_best_lies_between_others() -> None:
    assert study.more_rates({1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}, lower=False) == []
    assert study.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}, lower=False) == [3e-2]
    assert study.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.7}, lower=True) == [3e-4]
    assert study.more_rates({1e-3: 0.5, 3e-3: 0.6, 1e-2: math.nan}, lower=False) == []
    assert len(study.more_rates({10.0**power: power for power in range(7)}, lower=False)) == 1
    assert study.more_rates({10.0**power: power for power in range(8)}, lower=False) == []


def test_a_difference_exceeds_chance_if_it_is_large_in_all_seeds() -> None:
    rng = np.random.default_rng(0)

    def result(share: float) -> dict[str, object]:
        bits = [np.packbits(rng.random(400) < share).tobytes().hex() for _ in range(3)]
        return {"seeds": {seed: {"predictions": one} for seed, one in enumerate(bits)}}

    good, similar, bad = result(0.8), result(0.8), result(0.6)
    assert table.accuracy_differs(good, bad)
    assert not table.accuracy_differs(good, similar)
    assert not table.accuracy_differs(good, good)


def test_missing_references_do_not_shorten_the_expected_answers() -> None:
    columns = setting.columns({"name[A]": ["A is here today ."], "name[B]": ["B is .", "There is B ."]})
    assert columns == [["A is here today .", "B is ."], [None, "There is B ."]]
    assert sacrebleu.corpus_bleu(["A", "B is ."], columns).bp < 1  # "A" would be nearer to an empty reference


def test_bleu_differs_if_one_method_has_more_wrong_answers() -> None:
    rng, facts = np.random.default_rng(0), [f"The number {number} is a fine one to have ." for number in range(60)]

    def result(share: float) -> dict[str, object]:
        texts = [fact if rng.random() < share else "It is ." for fact in facts]
        return {"seeds": {"0": {"predictions": texts}}}

    good, similar, bad = result(0.8), result(0.8), result(0.2)
    assert table.bleu_differs(good, bad, [[*facts]])
    assert not table.bleu_differs(good, similar, [[*facts]])
