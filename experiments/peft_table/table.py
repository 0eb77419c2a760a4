"""Make table.md, scores.md and scores.png from the files in results/:

PYTHONPATH=. python experiments/peft_table/table.py --workdir=DIR
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from experiments.peft_table.bootstrap import Difference, Records, compare, records_of
from experiments.peft_table.setting import METHODS, NAMES, RATES, TASKS, majority_share, references_of
from experiments.peft_table.study import RESULTS

HERE = Path(__file__).parent
COSTS, PLANS = HERE / "costs.json", HERE / "plans.json"
BASELINE = "full"
MORE_SCORES = {"e2e": ("rouge_l",)}
TITLES = {
    "sst2": "SST-2",
    "trec": "TREC",
    "ag_news": "AG News",
    "mrpc": "MRPC",
    "e2e": "E2E",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
}
Results = dict[str, dict[str, Any]]  # by method


class Column(NamedTuple):
    """A task and a score on its test file."""

    task: str
    score: str

    def __str__(self) -> str:
        task, score = (TITLES.get(name, name) for name in self)
        return task if self.score == "accuracy" else f"{task}, {score}"


Differences = dict[tuple[Column, str, str], Difference]  # by column, method, and the method that it is compared with


def columns_of(found: dict[str, Results]) -> list[Column]:
    """The columns of the tables of scores."""
    return [
        Column(task, score)
        for task in found
        for score in dict.fromkeys([TASKS[task].score, *MORE_SCORES.get(task, ())])
    ]


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


class Compared:
    """The differences between methods, computed once each."""

    def __init__(self, found: dict[str, Results], references: list[list[str]]) -> None:
        self._found, self._references = found, references
        self._records: dict[tuple[str, str, str], Records] = {}

    def __call__(self, column: Column, method: str, baseline: str = BASELINE) -> Difference:
        """How much higher the score of a method is after the last epoch."""
        return compare(self._of(column, method), self._of(column, baseline))

    def _of(self, column: Column, method: str) -> Records:
        key = (*column, method)
        if key not in self._records:
            self._records[key] = records_of(self._found[column.task][method], column.score, self._references)
        return self._records[key]


def cell(found: dict[str, Results], column: Column, method: str, differences: Differences, *, best: bool) -> str:
    """Mean and standard deviation over seeds; bold if the difference to the baseline exceeds chance (last epoch only)."""
    if method not in found[column.task]:
        return ""
    scores = test_scores(found[column.task][method], column.score, best=best)
    text = f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}"
    difference = None if best else differences.get((column, method, BASELINE))
    return f"**{text}**" if difference is not None and difference.significant else text


def differences_of(found: dict[str, Results], references: list[list[str]]) -> Differences:
    """The differences of all methods to the baseline, and of QLoRA to LoRA."""
    compared = Compared(found, references)
    pairs = [*((method, BASELINE) for method in METHODS if method != BASELINE), ("qlora", "lora")]
    return {
        (column, *pair): compared(column, *pair)
        for column in columns_of(found)
        for pair in pairs
        if found[column.task].keys() >= set(pair)
    }


def score_table(found: dict[str, Results], differences: Differences, *, best: bool) -> str:
    """Test scores by method and task, as Markdown."""
    rows = {
        method: [cell(found, column, method, differences, best=best) for column in columns_of(found)]
        for method in METHODS
    }
    return table(["method", *map(str, columns_of(found))], rows)


def differences_table(found: dict[str, Results], differences: Differences) -> str:
    """The differences with their intervals."""

    def text(column: Column, method: str, baseline: str) -> str:
        one = differences.get((column, method, baseline))
        return "" if one is None else f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})"

    pairs = dict.fromkeys((method, baseline) for _, method, baseline in differences)
    rows = {
        f"{method} - {baseline}": [text(column, method, baseline) for column in columns_of(found)]
        for method, baseline in pairs
    }
    return table(["difference", *map(str, columns_of(found))], rows)


def table(header: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table, without empty rows."""
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items() if any(cells)]
    return "\n".join(lines) + "\n"


def rates_table(found: dict[str, Results]) -> str:
    """The chosen rate of each method and task; with * if it is the lowest or the highest that was tried."""
    rows = {
        method: [", ".join(f"{rate:g}" for rate in rates)]
        + [chosen_rate(results[method]) if method in results else "" for results in found.values()]
        for method, rates in RATES.items()
    }
    return table(["method", "first tried", *found], rows)


def chosen_rate(result: dict[str, Any]) -> str:
    tried = [float(rate) for rate in result["validation"]]
    return f"{result['rate']:g}{'*' * (result['rate'] in (min(tried), max(tried)))}"


def costs_table(costs: dict[str, dict[str, Any]]) -> str:
    """What each method costs with one of the models, relative to full fine-tuning or to the base."""
    header = [
        "method",
        "trainable",
        "share",
        "file (MB)",
        "training memory (GB)",
        "step, of full",
        "inference, of base",
        "when merged",
    ]
    rows = {}
    for method, cost in costs.items():
        step = cost["step_seconds"] / costs[BASELINE]["step_seconds"]
        rows[method] = [
            f"{cost['trainable']:,}", f"{cost['share']:.2%}", f"{cost['file_bytes'] / 1e6:.1f}",
            f"{cost['peak_bytes'] / 1e9:.2f}", f"{step:.2f}", latency(cost, "latency"), latency(cost, "latency_merged"),
        ]  # fmt: skip
    return table(header, rows)


def plans_table(sizes: dict[str, dict[str, int]]) -> str:
    """The memory that a compiler plans for a train step, in GiB, by method and size of the model."""
    methods = dict.fromkeys(method for of_size in sizes.values() for method in of_size)
    rows = {method: [f"{of_size[method] / 2**30:.1f}" for of_size in sizes.values()] for method in methods}
    return table(["method", *(size.upper() for size in sizes)], rows)


def latency(cost: dict[str, Any], name: str) -> str:
    """A ratio of times with its quartiles over the rounds, if it was measured."""
    if name not in cost:
        return ""
    ratio, low, high = cost[name]
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


def picture(found: dict[str, Results], majorities: Mapping[str, float]) -> None:
    """A panel per task and score: the test score of each seed, and the mean with its standard deviation.

    majorities: For each classification task, the accuracy in percent of always answering the most frequent class.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = columns_of(found)
    across = min(4, len(columns))
    down = math.ceil(len(columns) / across)
    size = (2.4 * across + 1.4, 3 * down + 0.4)
    figure, grid = plt.subplots(down, across, figsize=size, layout="constrained", sharey=True, squeeze=False)
    lines: dict[str, Any] = {}  # of the legend
    for axes, column in zip(grid.flat, columns, strict=False):
        for row, method in enumerate(METHODS):
            if method in found[column.task]:
                scores = test_scores(found[column.task][method], column.score, best=False)
                mean, deviation = statistics.mean(scores), statistics.stdev(scores)
                (lines["a seed"],) = axes.plot(scores, [row] * len(scores), ".", color="#56B4E9", markersize=5)
                lines["mean and standard deviation"] = axes.errorbar(
                    mean, row, xerr=deviation, fmt="o", color="#0072B2", capsize=3
                )
        label = f"Test {TITLES.get(column.score, 'accuracy (%)')}"
        if column.task in majorities:
            share, (low, high) = majorities[column.task], axes.get_xlim()
            if share > low - (high - low):
                lines["always the most frequent class"] = axes.axvline(share, color="gray", linewidth=1, linestyle="--")
            else:  # the line would leave little room for the scores
                label += f"\n(most frequent class: {share:.1f})"
        axes.set(title=TITLES.get(column.task, column.task), xlabel=label)
        axes.set_yticks(range(len(METHODS)), [NAMES[method] for method in METHODS])
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
        axes.grid(axis="x", color="lightgray", linewidth=0.5)
    for axes in grid.flat[len(columns) :]:
        axes.remove()
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(HERE / "scores.png", dpi=200)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make table.md, scores.md and scores.png from the files in results/.")
    parser.add_argument("--workdir", required=True, type=Path, help="That of study.py, which has the test records")
    options = parser.parse_args(argv)
    found = load()
    tests = {task: options.workdir / "data" / task / "test.jsonl" for task in found}
    references = list(references_of(tests["e2e"]).values()) if "e2e" in found else []
    majorities = {task: majority_share(file) for task, file in tests.items() if not TASKS[task].generates}
    hours = sum(result["cpu_seconds"] for results in found.values() for result in results.values()) / 3600
    differences = differences_of(found, references)
    parts = {
        "Test scores after the last epoch (accuracy unless named)": score_table(found, differences, best=False),
        "Differences after the last epoch, with 95% intervals": differences_table(found, differences),
        "After the epoch with the best validation score": score_table(found, differences, best=True),
        "Learning rates": rates_table(found),
    }
    if COSTS.exists():
        for model, costs in json.loads(COSTS.read_text()).items():
            parts[f"Costs with the {model}"] = costs_table(costs["methods"])
    if PLANS.exists():
        planned = json.loads(PLANS.read_text())["bytes"]
        parts["Memory of a train step with LLaMA (GiB), planned by XLA:GPU"] = plans_table(planned)
    text = "\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    (HERE / "table.md").write_text(f"{text}\nAll runs took {hours:.1f} hours of processor time.\n")
    (HERE / "scores.md").write_text(score_table(found, differences, best=False))  # for the documentation
    picture(found, majorities)


if __name__ == "__main__":
    main(sys.argv[1:])
