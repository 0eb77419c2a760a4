"""The page of a sweep: its runs, their scores, and links to their reports."""

import json
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.figure import Figure

from peftjax.core.errors import UserError
from peftjax.report import __main__ as command
from peftjax.report.cards import Card
from peftjax.report.data import ReportData
from peftjax.report.page import write_report
from peftjax.report.ranking import ranking_score
from peftjax.report.run_plots import RunCurve, draw_curves, highest_shown
from peftjax.report.scales import make_scale
from peftjax.report.sweep_figures import SweptRun, cost_cards
from peftjax.report.sweep_page import write_sweep_page
from peftjax.report.wall_time import WallTime, read_wall_time
from tests.report.test_report import NASTY, check_tags, eval_line, train_line, words


def test_the_page_links_to_the_reports_of_the_runs_and_these_link_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "optim.name=adamw%2Fx,rank=4"  # a directory whose name has an escaped slash
    ReportData(sweep=True).save(tmp_path / name)
    back = write_report(tmp_path / name).read_text(encoding="utf-8")
    assert '<a href="../sweep.html">All runs of the sweep</a>' in back
    check_tags(back)
    runs = [
        {"run": name, "values": {"method.rank": 4}, "scores": {"loss": 0.5, "eval_loss": 0.25, "eval_labels": 20}},
        {"run": "b", "values": {"method.rank": NASTY}, "scores": {}, "failed": NASTY},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(runs))
    command.main(["--workdir", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'sweep.html'}\n"
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    check_tags(text)
    assert f"Run method.rank loss eval_loss {name} 4 0.5 0.25 b failed:" in words(text.replace("<wbr>", ""))
    assert "runs 2 sorted by eval_loss" in words(text)
    (link,) = [part.partition('"')[0] for part in text.split('<a href="')[1:]]
    assert tmp_path / unquote(link) == tmp_path / name / "report.html"
    assert "<script" not in text
    assert (
        text.count("&lt;script&gt;") == 4
    )  # in the table the value and the failure, and the value in a plot with its small copy


@pytest.mark.parametrize("content", ["3", "[3]", '[{"values": {}}]', "{"])
def test_a_sweep_json_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json is not"):
        write_sweep_page(tmp_path)


def write_sweep(workdir: Path, swept: list[dict[str, Any]]) -> str:
    """A sweep of runs with these values, of which the last one failed; returns the page."""
    runs = []
    for number, values in enumerate(swept):
        name, failed = f"run{number}", number == len(swept) - 1
        (workdir / name / "adapter").mkdir(parents=True)
        loss = 1 + number / 10
        lines = [eval_line(0, 2.5, 0.0), train_line(10), eval_line(10, 50.0 if failed else loss, 0.5)]
        (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ReportData(counts={"tokens": 1000, "records": 7}).save(workdir / name)
        if not failed:
            (workdir / name / "report.html").touch()
        outcome = {"scores": {}, "failed": "not finite"} if failed else {"scores": {"eval_loss": loss}}
        runs.append({"run": name, "values": values, **outcome})
    (workdir / "sweep.json").write_text(json.dumps(runs))
    text = write_sweep_page(workdir).read_text(encoding="utf-8")
    check_tags(text)
    return text


def figures(text: str) -> dict[str, str]:
    """The figures of a page by their titles."""
    found = re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL)
    return {re.findall(r"<h3>(.*?)</h3>", figure)[0]: figure for figure in found}


def test_the_page_has_curves_a_plot_of_each_field_and_parallel_coordinates(tmp_path: Path) -> None:
    swept = [
        {"optim.learning_rate": rate, "method.targets": targets, "seed": seed}
        for rate in (1e-4, 1e-3)
        for targets in ("all-linear", ["$q_proj", NASTY])
        for seed in (0, 1)
    ]
    text = write_sweep(tmp_path, swept)
    found = figures(text)
    assert list(found) == ["Held-out loss", "learning_rate", "targets", "Parallel coordinates"]
    assert all("✗ failed" in figure and "stroke: var(--wrong)" in figure for figure in found.values())
    curves = found["Held-out loss"].split("<svg")[2]
    assert "stroke: var(--first); stroke-width: 2.8" in curves  # the best run is thick
    assert ">50<" not in curves  # the failed run does not set the limits
    assert "eval_loss, mean ± standard deviation over the seeds, logarithmic horizontal axis" in found["learning_rate"]
    assert ">0.0001</text>" in found["learning_rate"]
    assert "eval_loss, mean ± standard deviation" in found["targets"]
    assert "run2 0.0001 $q_proj+" in words(text)
    assert ">all-linear</text>" in found["targets"]
    assert "color-mix(in srgb, var(--second) 50%, var(--first))" in found["Parallel coordinates"]
    assert "Tokens trained 8,000 in 7 finished, 1 failed runs" in words(text)
    assert "Wall time of the longest run 10 s" in words(text)
    assert "Wall time of the sweep" not in words(text)  # it is not recorded
    assert f"learning_rate 0.0001 targets all-linear seed 0 eval loss 1 adapter {tmp_path}/run0/adapter" in words(text)
    assert not re.search(r"(fill|stroke): #", text)
    assert "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_the_page_ranks_runs_by_the_main_score_and_plots_it_beside_the_loss(tmp_path: Path) -> None:
    scores = ((0.5, 0.75), (0.25, 0.5), (0.25, 0.75))
    runs: list[dict[str, Any]] = [
        {"run": f"run{rank}", "values": {"method.rank": rank}, "scores": {"eval_loss": loss, "accuracy": accuracy}}
        for rank, (loss, accuracy) in enumerate(scores, 1)
    ]
    runs.append({"run": "run4", "values": {"method.rank": 4}, "scores": {}, "failed": "not finite"})
    best = {"eval_loss": 1.0, "accuracy": 1.0}
    runs.append({"run": "run5", "values": {"method.rank": 5}, "scores": best, "stopped": 9})
    (tmp_path / "sweep.json").write_text(json.dumps(runs))
    text = write_sweep_page(tmp_path).read_text(encoding="utf-8")
    check_tags(text)
    assert "sorted by accuracy" in words(text)
    # of two with the same accuracy, the one with the lower loss; those that were stopped come last
    assert re.findall(r"<td>(run\d)", text) == ["run3", "run1", "run2", "run4", "run5"]
    assert "rank 3 eval loss 0.25 accuracy 0.75" in words(text)
    plots = map(words, re.findall(r"<figure.*?</figure>", text, flags=re.DOTALL))
    assert [" ".join(plot.split()[:2]) for plot in plots] == ["rank accuracy,", "rank eval_loss,"]
    assert ranking_score([*runs, runs[0] | {"best_score": "eval_loss"}]) == "eval_loss"
    assert ranking_score([{"scores": {"token_accuracy": 0.5, "eval_loss": 1.0}}]) == "eval_loss"


def test_the_costs_are_those_of_all_runs_that_have_ended(tmp_path: Path) -> None:
    ends: list[dict[str, Any]] = [{}, {"stopped": 9}, {"failed": "not finite"}, {}]  # the last one has not ended
    runs = [{"run": str(number), "values": {}, "scores": {}} | end for number, end in enumerate(ends)]
    for number, run in enumerate(runs):
        ReportData(counts={"tokens": 10**number}).save(tmp_path / run["run"])
    (tmp_path / "0" / "report.html").touch()
    (tmp_path / "0" / "metrics.jsonl").write_text(json.dumps(train_line(10)) + "\n")
    (tmp_path / "sweep.json").write_text(json.dumps(runs))
    clock = WallTime(tmp_path, shared=True)
    assert read_wall_time(tmp_path) == 0
    for _ in range(2):
        clock.save()
    assert 0 < read_wall_time(tmp_path) < 10
    text = words(write_sweep_page(tmp_path).read_text(encoding="utf-8"))
    assert "Tokens trained 111 in 1 finished, 1 stopped, 1 failed runs" in text
    assert "Wall time of the sweep 10 s" in text  # at least that of its longest run


def test_runs_on_images_are_trained_on_images() -> None:
    lines = [{"step": 1, "seconds": 2.0, "images_per_second": 5.0}]
    counts = {"records": 10, "tokens": 10}  # an image counts as a token
    (card, _) = cost_cards([SweptRun("a", {}, {}, "", "a/report.html", lines, counts)])
    assert card == Card("Images trained", "10", "in one finished run")


def test_one_field_has_no_parallel_coordinates_and_a_search_has_points_without_lines(tmp_path: Path) -> None:
    one = figures(write_sweep(tmp_path / "one", [{"method.rank": rank} for rank in (4, 8, 16)]))
    assert list(one) == ["Held-out loss", "rank"]
    drawn = [{"optim.learning_rate": 10.0**-k, "method.dropout": 0.01 * k, "method.rank": k} for k in range(1, 10)]
    search = figures(write_sweep(tmp_path / "search", drawn))
    assert list(search) == ["Held-out loss", "learning_rate", "dropout", "rank", "Parallel coordinates"]
    assert "standard deviation" not in search["rank"]


def test_a_run_that_diverged_does_not_set_the_limits(tmp_path: Path) -> None:
    swept = [{"optim.learning_rate": rate, "method.rank": rank} for rank in (16, 4) for rate in (1e-3, 2e-3, 4e-3)]
    runs = [
        {"run": str(number), "values": values, "scores": {"eval_loss": 80.0 if number == 4 else 1 + number / 10}}
        for number, values in enumerate(swept)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps(runs))
    found = figures(write_sweep_page(tmp_path).read_text(encoding="utf-8"))
    assert "eval_loss, ▲ above 1.5" in found["learning_rate"]
    assert words(found["learning_rate"]).index("rank=4") < words(found["learning_rate"]).index("rank=16")
    assert ">80<" not in found["learning_rate"]
    assert "eval_loss above 1.5 is drawn at the end of its axis" in found["Parallel coordinates"]


def test_the_cross_of_a_failed_run_is_inside_the_axes_also_below_all_other_losses() -> None:
    curves = [
        RunCurve("fine", "#000000", (0, 9), (2.5, 2.0)),
        RunCurve("failed", "#000000", (0, 5), (2.5, 0.5), failed=True),
    ]
    axes = Figure().subplots()
    draw_curves(axes, curves)
    (cross,) = (float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_marker() == "x")
    assert axes.get_ylim()[0] <= cross <= 2.0


def test_only_outliers_are_left_out_of_an_axis() -> None:
    assert highest_shown([0.6, 0.7, 0.65, 0.62, 3.0]) == 0.7
    assert highest_shown([0.6, 0.7, 0.8, 3.0]) == 0.8
    assert highest_shown([1.0, 1.2, 1.4, 1.6, 1.8, 2.9]) == math.inf
    assert highest_shown([0.5] * 9 + [0.6]) == math.inf
    assert highest_shown([0.5, 3.0]) == math.inf
    assert highest_shown([]) == math.inf


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1e-4, 3e-4, 1e-3], "logarithmic"),
        ([4, 8, 16], "linear"),
        ([0.004, 0.1, 0.16, 0.2, 0.3], "linear"),  # uniform
        ([0.0, 0.1], "linear"),
        ([3, 3], "linear"),
        ([True, False], "categorical"),
        ([1, "auto"], "categorical"),
        ([None, 0.5], "categorical"),
    ],
)
def test_the_axis_of_a_field_fits_its_values(values: list[Any], kind: str) -> None:
    scale = make_scale(values)
    assert scale.kind == kind
    assert {place for place, _ in scale.ticks} == set(scale.places)


def test_numbers_beside_other_values_are_in_ascending_order() -> None:
    scale = make_scale([8, "not set", 2, 16])
    assert [name for _, name in scale.ticks] == ["2", "8", "16", "not set"]
    assert scale.places == [1, 3, 0, 2]
