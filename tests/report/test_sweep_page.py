"""The page of a sweep: its runs, their scores, and links to their reports."""

import json
from pathlib import Path
from urllib.parse import unquote

import pytest

from peftjax.core.errors import UserError
from peftjax.report import __main__ as command
from peftjax.report.data import ReportData
from peftjax.report.page import write_report
from peftjax.report.sweep_page import write_sweep_page
from tests.report.test_report import NASTY, check_tags, words


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
    assert text.count("&lt;script&gt;") == 2


@pytest.mark.parametrize("content", ["3", "[3]", '[{"values": {}}]', "{"])
def test_a_sweep_json_that_is_not_ours_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json is not"):
        write_sweep_page(tmp_path)
