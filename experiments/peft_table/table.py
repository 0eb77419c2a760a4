"""Make table.md and scores.png from the files in results/:

PYTHONPATH=. python experiments/peft_table/table.py --workdir=DIR
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from experiments.peft_table.setting import METHODS, RATES, TASKS, References, columns, references_of
from experiments.peft_table.study import RESULTS

HERE = Path(__file__).parent
COSTS = HERE / "costs.json"
BASELINE = "full"
SAMPLES = 10_000  # of the bootstrap
Results = dict[str, dict[str, Any]]  # by method


def load() -> dict[str, Results]:
    """The results by task and method, in the order of the table."""
    found: dict[str, Results] = {}
    for task in TASKS:
        files = {method: RESULTS / f"{task}-{method}.json" for method in METHODS}
        if there := {method: json.loads(file.read_text()) for method, file in files.items() if file.exists()}:
            found[task] = there
    return found


def test_scores(result: dict[str, Any], score: str, *, best: bool) -> list[float]:
    """One test score per seed, in percent: after the last epoch, or after the one with the best validation score."""
    lower = TASKS[result["task"]].generates
    scale = 1 if score == "bleu" else 100
    chosen = []
    for seed in result["seeds"].values():
        ranked = sorted(seed["epochs"], key=lambda epoch: epoch["validation"], reverse=not lower)
        chosen.append(scale * (ranked[0] if best else seed["epochs"][-1])[score])
    return chosen


def right_answers(result: dict[str, Any]) -> np.ndarray:
    """Whether each test record was classified correctly after the last epoch, bool [seeds, records]."""
    packed = [np.frombuffer(bytes.fromhex(seed["predictions"]), np.uint8) for seed in result["seeds"].values()]
    return np.unpackbits(np.stack(packed), axis=-1).astype(bool)


def accuracy_differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether 0 is outside the 95 % interval of the difference of the mean accuracies, by a paired bootstrap.

    Seeds and test records are resampled; both methods get the same resamples, because runs of a seed share the data order
    and the initial head (Efron and Tibshirani 1993; Koehn 2004).
    """
    difference = right_answers(one).astype(np.float32) - right_answers(other)  # [seeds, records]; padding bits cancel
    rng = np.random.default_rng(0)
    seeds, records = difference.shape
    by_seed = rng.multinomial(seeds, [1 / seeds] * seeds, SAMPLES) / seeds
    means = np.empty(SAMPLES)
    for index, weights in enumerate(by_seed):
        means[index] = (weights @ difference)[rng.integers(records, size=records)].mean()
    low, high = np.percentile(means, [2.5, 97.5])
    return not low <= 0 <= high


def bleu_differs(one: dict[str, Any], other: dict[str, Any], references: References) -> bool:
    """Whether the BLEU of two methods differs with p < 0.05, over the answers of all seeds.

    By sacrebleu's approximate randomization, which exchanges answers between the methods (Riezler and Maxwell 2005).
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.significance import PairedTest, Result

    texts = [[text for seed in result["seeds"].values() for text in seed["predictions"]] for result in (other, one)]
    repeated = [column * len(one["seeds"]) for column in references]
    systems = [("baseline", texts[0]), ("system", texts[1])]
    test = PairedTest(systems, {"BLEU": BLEU()}, repeated, n_samples=1000)
    system = test()[1]["BLEU"][1]
    assert isinstance(system, Result)
    return system.p_value is not None and system.p_value < 0.05


def cell(results: Results, method: str, task: str, references: References, *, best: bool) -> str:
    """Mean and standard deviation over seeds; bold if the difference to the baseline exceeds chance (last epoch only)."""
    if method not in results:
        return ""
    result, score = results[method], TASKS[task].score
    scores = test_scores(result, score, best=best)
    text = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
    if best or method == BASELINE or BASELINE not in results:
        return text
    baseline = results[BASELINE]
    differs = bleu_differs(result, baseline, references) if score == "bleu" else accuracy_differs(result, baseline)
    return f"**{text}**" if differs else text


def table(found: dict[str, Results], references: References, *, best: bool) -> str:
    """Test scores by method and task, as Markdown."""
    lines = [
        "| method | " + " | ".join(f"{task}, {TASKS[task].score}" for task in found) + " |",
        "|---|" + "---:|" * len(found),
    ]
    for method in METHODS:
        cells = [cell(results, method, task, references, best=best) for task, results in found.items()]
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_table(found: dict[str, Results]) -> str:
    """The chosen rate of each method and task; with * if it is the lowest or the highest that was tried."""
    lines = [f"| method | first tried | {' | '.join(found)} |", "|---|---|" + "---:|" * len(found)]
    for method, rates in RATES.items():
        cells = [chosen_rate(results[method]) if method in results else "" for results in found.values()]
        if any(cells):
            lines.append(f"| {method} | {', '.join(f'{rate:g}' for rate in rates)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chosen_rate(result: dict[str, Any]) -> str:
    tried = [float(rate) for rate in result["validation"]]
    return f"{result['rate']:g}{'*' * (result['rate'] in (min(tried), max(tried)))}"


def costs_table(costs: dict[str, dict[str, Any]]) -> str:
    """What each method costs with one of the models, relative to full fine-tuning or to the base."""
    lines = [
        "| method | trainable | share | file (MB) | training memory (GB) | step, of full | inference, of base | when merged |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, cost in costs.items():
        step = cost["step_seconds"] / costs[BASELINE]["step_seconds"]
        merged = f"{cost['latency_merged']:.2f}" if "latency_merged" in cost else ""
        cells = [
            f"{cost['trainable']:,}", f"{cost['share']:.2%}", f"{cost['file_bytes'] / 1e6:.1f}",
            f"{cost['peak_bytes'] / 1e9:.2f}", f"{step:.2f}", f"{cost['latency']:.2f}", merged,
        ]  # fmt: skip
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Results]) -> None:
    """A panel per task: the test score of each seed, and the mean with its standard deviation."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(found), figsize=(2.6 * len(found) + 0.8, 3.4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (task, results) in zip(panels[0], found.items(), strict=True):
        for row, method in enumerate(METHODS):
            if method in results:
                scores = test_scores(results[method], TASKS[task].score, best=False)
                axes.plot(scores, [row] * len(scores), ".", color="#56B4E9", markersize=5)
                axes.errorbar(
                    statistics.mean(scores), row, xerr=statistics.stdev(scores), fmt="o", color="#0072B2", capsize=3
                )
        label = {"bleu": "Test BLEU", "accuracy": "Test accuracy (%)"}[TASKS[task].score]
        axes.set(title=task, xlabel=label, yticks=range(len(METHODS)), yticklabels=METHODS)
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
        axes.grid(axis="x", color="lightgray", linewidth=0.5)
    figure.savefig(HERE / "scores.png", dpi=200)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make table.md and scores.png from the files in results/.")
    parser.add_argument(
        "--workdir", type=Path, help="That of study.py; needed to compare BLEU, as it has the references"
    )
    options = parser.parse_args(argv)
    found = load()
    references = columns(references_of(options.workdir / "data" / "e2e" / "test.jsonl")) if "e2e" in found else []
    hours = sum(result["cpu_seconds"] for results in found.values() for result in results.values()) / 3600
    parts = {
        "After the last epoch": table(found, references, best=False),
        "After the epoch with the best validation score": table(found, references, best=True),
        "Learning rates": rates_table(found),
    }
    if COSTS.exists():
        for model, costs in json.loads(COSTS.read_text()).items():
            parts[f"Costs with the {model}"] = costs_table(costs)
    text = "\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    (HERE / "table.md").write_text(f"{text}\nAll runs took {hours:.1f} hours of processor time.\n")
    picture(found)


if __name__ == "__main__":
    main(sys.argv[1:])
