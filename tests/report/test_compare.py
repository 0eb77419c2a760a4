"""The comparison of runs: how they are grouped, the numbers, and mistakes."""

import dataclasses
import json
import re
import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from scipy import stats

from peftjax import compare
from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.report.compare_page import write_comparison
from peftjax.report.compared_tables import difference_intervals
from peftjax.report.comparison import group_seeds, read_runs
from tests.report.test_report import DATA, check_tags, eval_line, train_line, words, write_workdir


def write_run(workdir: Path, *, rank: int, seed: int, loss: float, **train: Any) -> Path:
    config = {"seed": seed, "method": {"rank": rank}, "task": {"kind": "causal_lm"}, "train": {"steps": 30, **train}}
    lines = [
        eval_line(0, 3.0, 0.0),
        train_line(1),
        eval_line(20, loss / 2, 0.75),
        train_line(30),
        eval_line(30, loss, 0.5),
    ]
    return write_workdir(workdir, config, lines, DATA)


def test_runs_that_differ_only_in_the_seed_share_a_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    alone = write_run(tmp_path / "a", rank=4, seed=0, loss=0.5)
    (tmp_path / "sweep").mkdir()
    for seed, loss in ((0, 1.0), (1, 2.0)):
        write_run(tmp_path / "sweep" / f"b{seed}", rank=8, seed=seed, loss=loss)
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps([{"run": name} for name in ("b0", "b1", "not started")]))
    compare.main([str(alone), str(tmp_path / "sweep"), str(alone)])  # a run that is given twice counts once
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.lstrip().startswith("rank=")]
    assert rows[0] == ["rank=4", "1", "0.5", "0.25", "0.5", "0.75"]
    assert " ".join(rows[1]) == "rank=8 2 1.50 ± 0.71 0.75 ± 0.35 0.5 0.75"  # of 1 and 2, and of their halves
    assert rows[2] == ["rank=4", "1", "80", "1.0", "MiB", "30", "s", "500"]


def test_fields_that_do_not_affect_the_results_do_not_separate_a_run_from_other_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        config = {
            "seed": seed,
            "log": {"run_name": f"lora-{seed}", "trackers": ["wandb"] * seed},
            "checkpoint": {"every": 10 + seed, "keep": 1 + seed},
            "data": {"workers": seed},
            "train": {"eval_every": 10 + seed, "steps": 30},
        }
        write_workdir(tmp_path / str(seed), config, [train_line(1)], DATA)
    runs = read_runs([tmp_path / "0", tmp_path / "1"])
    assert [(group.values, group.runs) for group in group_seeds(runs)] == [({}, runs)]


def test_an_option_that_only_some_methods_have_names_the_rows_of_one_method_only(tmp_path: Path) -> None:
    lora, prompt = (
        {"name": name} | options for name, options in (("lora", {"dora": False}), ("prompt", {"tokens": 4}))
    )
    methods = [lora | {"rank": 2}, lora | {"rank": 4}, prompt, prompt]
    for index, method in enumerate(methods):
        write_workdir(tmp_path / str(index), {"seed": index, "method": method}, [train_line(1)], DATA)
    runs = read_runs([tmp_path / str(index) for index in range(4)])
    groups = group_seeds(runs)
    assert [group.values for group in groups] == [
        {"method.name": "lora", "method.rank": 2},
        {"method.name": "lora", "method.rank": 4},
        {"method.name": "prompt"},
    ]
    assert groups[2].runs == runs[2:]
    write_comparison(runs, tmp_path / "out")


def test_an_empty_value_is_shown_in_quotes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"run{name}", rank=4, seed=0, loss=1.0, note=name) for name in ("", "x")]
    compare.main([str(runs[0]), str(runs[1])])
    assert "note=''" in capsys.readouterr().out


def test_what_is_not_comparable_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", rank=4, seed=0, loss=0.5)
    unfinished = write_run(tmp_path / "b", rank=8, seed=0, loss=0.5, steps=31)
    compare.main([str(run), str(unfinished)])
    assert capsys.readouterr().err == f"warning: {unfinished} is at step 30 of 31\n"
    early = write_run(tmp_path / "early", rank=8, seed=0, loss=0.5, steps=40, patience=1)  # no better than at step 20
    compare.main([str(run), str(early)])
    assert capsys.readouterr().err == f"warning: {early} stopped early (train.patience), after step 30 of 40\n"
    entries = [{"run": "a"}, {"run": "b", "stopped": 1030}, {"run": "c", "failed": "step 3: the loss is NaN"}]
    (tmp_path / "sweep.json").write_text(json.dumps(entries))
    failed = write_run(tmp_path / "c", rank=2, seed=0, loss=0.5, steps=31)
    compare.main([str(tmp_path)])
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {unfinished} was stopped by successive halving after step 1,030",
        f"warning: {failed} failed: step 3: the loss is NaN",
    ]
    (tmp_path / "sweep.json").unlink()
    again = write_run(tmp_path / "again", rank=4, seed=0, loss=0.6)
    compare.main([str(run), str(again)])
    warned = f"warning: {run} and {again} have the same seed and equivalent configs, but count as two\n"
    assert capsys.readouterr().err == warned
    member = write_run(tmp_path / "e", rank=8, seed=1, loss=0.5)
    dataclasses.replace(DATA, sweep=True).save(member)
    compare.main([str(run), str(member)])
    assert capsys.readouterr().err.startswith(
        "warning: runs that a sweep trained together show the time of all of them"
    )
    with pytest.raises(UserError, match=r"not the workdir of a run or a sweep"):
        compare.main([str(tmp_path)])
    empty = write_workdir(tmp_path / "c", {"method": {}}, [])
    with pytest.raises(UserError, match=r"has no metrics yet"):
        compare.main([str(empty)])
    other = write_workdir(tmp_path / "d", {"task": {"kind": "seq2seq"}}, [train_line(1)])
    with pytest.raises(UserError, match=r"task\.kind=causal_lm and .* has task\.kind=seq2seq"):
        compare.main([str(run), str(other)])
    (tmp_path / "sweep.json").write_text("[3]")
    with pytest.raises(UserError, match=r"not the result of a sweep"):
        compare.main([str(tmp_path)])


def test_the_output_has_a_page_tables_and_figures_of_the_size_of_a_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {(4, 0): 0.5, (4, 1): 0.6, (8, 0): 1.0, (8, 1): 2.0}
    runs = [write_run(tmp_path / f"{r}-{s}", rank=r, seed=s, loss=loss) for (r, s), loss in losses.items()]
    output = tmp_path / "new" / "output"
    compare.main([*map(str, runs), f"--output={output}"])
    names = ["scores.csv", "differences.csv", "costs.csv", "curves.png", "curves.pdf", "scores.png", "scores.pdf"]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(output))]
    assert printed == [str(output / name) for name in ("compare.html", *names)]
    assert sorted(path.name for path in output.iterdir()) == sorted(["compare.html", *names])
    for name in ("curves.png", "scores.png"):
        height, width, _ = image.imread(output / name).shape
        assert width == 990  # 3.3 inches of 300 dpi
        assert 200 < height < 990
    text = (output / "compare.html").read_text(encoding="utf-8")
    check_tags(text)
    assert "rank=4 2 0.550 ± 0.071" in words(text)
    assert "Held-out loss by step, mean and standard deviation over the seeds rank=4 rank=8" in words(text)
    assert "prompt one Expected 2001-01-01 ✓ rank=4, seed=0 2001-01-01 ✓ rank=8, seed=0 2001-01-01" in words(text)
    assert len(re.findall(r"<svg", text)) == 4
    assert "<script" not in text
    rows = (output / "differences.csv").read_text().splitlines()
    assert rows[:2] == ["run,seeds,loss minus that of the best group", "rank=4,2,best"]


def test_the_output_may_be_below_the_home_directory_but_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "a", rank=4, seed=0, loss=0.5)
    with pytest.raises(UserError, match=r"--output= is empty; give a path"):
        compare.main([str(run), "--output="])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    monkeypatch.setattr(compare, "write_comparison", lambda runs, output: [output])
    compare.main(["~/a", "--output=~/b"])  # as in a script that quotes them
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b")


def test_the_interval_of_a_difference_is_that_of_welch() -> None:
    a, b = [1.0, 1.1, 1.3], [1.2, 1.9]
    _, text = difference_intervals([a, b])
    means = statistics.fmean(b) - statistics.fmean(a)
    errors = [statistics.variance(some) / len(some) for some in (a, b)]
    freedom = sum(errors) ** 2 / sum(e**2 / (len(s) - 1) for e, s in zip(errors, (a, b), strict=True))
    half = stats.t.ppf(0.975, freedom) * sum(errors) ** 0.5
    assert text == f"{means - half:+.1f} to {means + half:+.1f}"
    assert difference_intervals([a, [0.1], [1.0, float("nan")], [0.5, 0.5]]) == [""] * 4
    assert difference_intervals([[0.1], a, b]) == ["", "best", text]


def test_the_module_runs_as_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(cli, "run", started.append)
    runpy.run_path(compare.__file__, run_name="__main__")
    assert [main.__name__ for main in started] == ["main"]
