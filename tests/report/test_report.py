"""The report: what stands on the page, what must never be on it, and that odd data does not break it."""

import base64
import dataclasses
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.report import __main__ as command
from peftjax.report import svg
from peftjax.report.classes import Classes, ClassScore, Prediction
from peftjax.report.comparison import compared_scores
from peftjax.report.data import Answer, Part, ReportData, count_parts, tree_bytes
from peftjax.report.page import write_report
from peftjax.report.text import format_duration, format_number, format_spread

SCRIPT = Path(svg.__file__).with_name("charts.js").read_text(encoding="utf-8")
NASTY = '<script>alert(1)</script> & "quoted" </div>{{ 7*7 }} \x1b[31m \ud800'
CONFIG = {
    "method": {"name": "lora", "rank": 16},
    "model": {"path": "embedded"},
    "data": {"train": ["tfds:rewrite_dates/train"]},
    "train": {"steps": 30},
}
DATA = ReportData(
    parts=(
        Part("embed", 1000, 4000, adapter=False, trained=False),
        Part("blocks.attention", 3000, 12000, adapter=False, trained=False),
        Part("blocks.attention.query", 80, 320, adapter=True, trained=True),
    ),
    optimizer_bytes=640,
    adapter_file_bytes=2048,
    before=(Answer("a:1", "prompt one", "old", "2001-01-01", False), Answer("a:2", NASTY, "", NASTY, False)),
    after=(Answer("a:1", "prompt one", "2001-01-01", "2001-01-01", True), Answer("a:2", NASTY, NASTY, NASTY, True)),
    timings={"compile": 12.5},
    versions={"jax": "0.0.1"},
    counts={"records": 4000, "too_long": 12, "empty": 3, "rows": 3985, "tokens": 90_000, "loss_tokens": 30_000},
    loss_unit="nats per token",
    padding=0.4125,
    origin={"command": "peftjax train --config=a.py", "workdir": "/runs/a", "git commit": "0123abc-dirty"},
    classes=Classes(
        30,
        (ClassScore("no", 0.5, 1.0, 2 / 3, 2, 4), ClassScore(NASTY, 1.0, 0.5, 2 / 3, 4, 2)),
        ((0, 0, 2), (1, 0, 2), (1, 1, 2)),
        (Prediction("b:1", NASTY, "no", NASTY, False, 0.75), Prediction("b:2", "", "no", "no", True, 0.5)),
    ),
    default_config={**CONFIG, "method": {"name": "lora", "rank": 8}},
)


def train_line(step: int, **numbers: float) -> dict[str, Any]:
    line = {"loss": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 500.0}
    return {"step": step, "kind": "train", "seconds": float(step), "peak_memory_bytes": 2**20, **line, **numbers}


def eval_line(step: int, loss: float, match: float) -> dict[str, Any]:
    scores = {"eval_loss": loss, "perplexity": math.exp(loss), "token_accuracy": match, "exact_match": match}
    return {"step": step, "kind": "eval", "seconds": step + 0.5, **scores, "prompts": 256}


LINES = [eval_line(0, 3.0, 0.0), *(train_line(step) for step in range(1, 31)), eval_line(30, 0.1, 0.9375)]


def write_workdir(
    workdir: Path, config: Any = None, lines: list[dict[str, Any]] | None = None, data: ReportData | None = None
) -> Path:
    workdir.mkdir(exist_ok=True)
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    if lines is not None:
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if data is not None:
        data.save(workdir)
    return workdir


def page(workdir: Path) -> str:
    text = write_report(workdir).read_text(encoding="utf-8")
    check_tags(text)
    return text


def check_tags(text: str) -> None:
    """Every element is closed in its place, and none loads anything; the only script is the page's own, after the charts."""

    class Checker(HTMLParser):
        open: tuple[str, ...] = ()
        scripts = 0

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("link", "iframe", "object")
            assert "srcset" not in {name for name, _ in attributes}
            sources = [value or "" for name, value in attributes if name == "src"]
            assert all(tag == "img" and re.fullmatch(r"data:image/jpeg;base64,[^:]*", source) for source in sources)
            assert not [name for name, _ in attributes if name.startswith("on")]
            links = [value or "" for name, value in attributes if name == "href"]
            assert all(tag == "a" and re.fullmatch(r"\.\./sweep\.html|[\w.%-]+/report\.html", link) for link in links)
            assert all(value and value[0] == "#" for name, value in attributes if name == "xlink:href")
            if tag not in ("meta", "wbr", "input", "img"):
                self.open = (*self.open, tag)
            if tag == "script":
                self.scripts += 1
                assert attributes == []
                assert self.open == ("html", "body", "script")

        def handle_data(self, data: str) -> None:
            if self.open[-1:] == ("script",):
                assert data == SCRIPT

        def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open[-1] == tag
            self.open = self.open[:-1]

    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == ()
    assert checker.scripts == ("data-curves" in text)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in text


def words(text: str) -> str:
    """What a reader sees: no tags, single spaces."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(write_workdir(tmp_path_factory.mktemp("full") / "run", CONFIG, LINES, DATA))


def test_headline_numbers_go_from_before_to_after(full: str) -> None:
    seen = words(full)
    assert "Exact match 0% → 93.8% +93.8 points · 256 held-out prompts" in seen
    assert "Held-out loss 3 → 0.1 perplexity 20.09 → 1.105" in seen
    assert "Trainable parameters 80 2.00% of the 4,000 in the base" in seen
    assert "Adapter file 2.0 KiB for a base of 15.6 KiB" in seen
    assert "Wall time 30 s 30 steps" in seen
    assert "Tokens per second 500" in seen


def test_bleu_is_no_fraction(tmp_path: Path) -> None:
    lines = [eval_line(step, 1.0, 0.5) | {"bleu": bleu} for step, bleu in ((0, 3.25), (10, 56.2))]
    page = words(write_report(write_workdir(tmp_path, lines=lines)).read_text(encoding="utf-8"))
    assert "BLEU 3.25 → 56.2 256 held-out prompts" in page
    alone = [{name: value for name, value in line.items() if name != "exact_match"} for line in lines]
    page = words(write_report(write_workdir(tmp_path / "bleu", lines=alone)).read_text(encoding="utf-8"))
    assert "Token accuracy 50% → 50% +0.0 points BLEU 3.25 → 56.2 256 held-out prompts" in page
    assert compared_scores(lines[0].keys() - {"exact_match"}) == ["eval_loss", "bleu"]


def test_every_section_is_there(full: str) -> None:
    seen = words(full)
    for expected in (
        "Loss nats per token", "Scores", "Learning rate", "Gradient norm", "Answers before and after",
        "Base frozen", "Adapter trained", "Optimizer state 640 B", "Peak usage 1.0 MiB", "compile 12 s",
        "Changed from the defaults 1 of 5 fields", "jax 0.0.1", "method lora, rank 16",
        "Parameters, memory, data and time", "Records read 4,000 Longer than the limit 12 Dropped, no tokens in the loss 3",
        "Rows 3,985 Tokens 90,000", "Padding 41.2%",
        "command peftjax train --config=a.py workdir /runs/a git commit 0123abc-dirty",
        "Classes held-out data, step 30", "Confusion matrix", "no 2 ·", "no 50% 100% 66.7% 2",
        "75% , expected no", "Correct predictions b:2 no 50%",
    ):  # fmt: skip
        assert expected in seen
    assert "Not finished" not in seen


def test_the_page_needs_nothing_from_elsewhere(full: str) -> None:
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|@font-face", full)
    assert "prefers-color-scheme: dark" in full


def test_answers_are_marked_and_paired_by_prompt(full: str) -> None:
    assert "Expected 2001-01-01 ✗ incorrect Before old ✓ correct After 2001-01-01" in words(full)
    assert full.count("✓ correct") == 2
    assert "empty" in words(full)


def test_text_is_escaped(full: str) -> None:
    assert full.count("<script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;quoted&#34;" in full
    assert "{{ 7*7 }}" in full  # not evaluated either
    assert "\\x1b[31m" in full
    assert "\x1b" not in full


def test_nasty_text_is_escaped_wherever_it_can_stand(tmp_path: Path) -> None:
    config = {"model": {"path": NASTY}, "data": {"train": [NASTY], "too_long": NASTY}, "a": {NASTY: NASTY}}
    scores = (ClassScore(NASTY, 1, 1, 1, 1, 2), ClassScore("no", 0, 0, 0, 1, 0))
    classes = Classes(1, scores, ((0, 0, 1), (1, 0, 1)), (Prediction(*[NASTY] * 4, True, 0.5, NASTY.replace(":", "")),))
    origin = {NASTY: NASTY}
    data = ReportData(
        versions={NASTY: NASTY}, timings={NASTY: 1.0}, parts=(Part(NASTY, 1, 1, False, False),),
        classes=classes, origin=origin,
    )  # fmt: skip
    text = page(write_workdir(tmp_path / "<script>alert(1)", config, None, data))  # its title
    assert text.count("&lt;script&gt;") >= 21
    assert "Warning: the model predicts &#39;&lt;script&gt;" in text
    assert "<script" not in text


def test_fields_at_their_default_are_folded_away(full: str) -> None:
    changed, everything = full.split("<summary>All fields")
    changed = words(changed.split("Changed from the defaults")[1])
    assert "method.rank 16 8" in changed
    assert "train.steps" not in changed
    assert "train.steps 30" in words(everything)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    seen = words(page(write_workdir(tmp_path / "a", CONFIG)))
    assert "Not finished: step 0 of 30" in seen
    for absent in ("Training", "Answers", "Parameters", "Memory", "Changed"):
        assert absent not in seen
    seen = words(page(write_workdir(tmp_path / "b", None, [train_line(1)])))
    assert "Learning rate" in seen
    for absent in ("Held-out", "Exact match", "Answers", "Configuration", "Not finished"):
        assert absent not in seen


def test_without_an_evaluation_before_training_there_is_no_before(tmp_path: Path) -> None:
    seen = words(page(write_workdir(tmp_path, CONFIG, LINES[1:], dataclasses.replace(DATA, before=()))))
    assert "Exact match 93.8%" in seen
    assert "→" not in seen
    assert "Before" not in seen


def test_the_title_is_the_name_of_the_workdir(tmp_path: Path) -> None:
    assert "<title>my-run · peftjax</title>" in page(write_workdir(tmp_path / "my-run", CONFIG))


def charts(text: str) -> dict[str, ElementTree.Element]:
    """The charts' svg elements by title."""
    found = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    elements = [ElementTree.fromstring(svg.replace("<svg", '<svg xmlns:xlink="xlink"', 1)) for svg in found]
    return {element.attrib["aria-label"].removesuffix(" by step"): element for element in elements}


def curves(chart: ElementTree.Element, color: str = "first") -> list[list[tuple[float, float]]]:
    """The points of the lines of that color, in pixels."""
    paths = [path for path in chart.iter("path") if f"fill: none; stroke: var(--{color})" in path.get("style", "")]
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.attrib["d"])] for path in paths]


def dots(chart: ElementTree.Element) -> int:
    return sum(1 for _ in chart.iter("use"))


def labels(chart: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in chart.iter("text")]


def test_each_chart_holds_its_curves(full: str) -> None:
    drawn = charts(full)
    assert list(drawn) == ["Loss", "Scores", "Learning rate", "Gradient norm", "Tokens per second"]
    assert [len(line) for line in curves(drawn["Loss"])] == [30]
    assert [len(line) for line in curves(drawn["Loss"], "second")] == [2]
    assert dots(drawn["Loss"]) == 32
    ((start, zero), (end, match)) = curves(drawn["Scores"])[0]
    assert start < end
    assert zero > match  # y points down
    assert labels(drawn["Scores"])[-6:] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert labels(drawn["Loss"])[:4] == ["0", "10", "20", "30"]


def test_charts_have_the_colors_of_the_page_and_ids_of_their_own(full: str) -> None:
    for name, color in svg.COLORS.items():
        assert f"--{name}: {color};" in full  # in the light; the charts name the variables
    for name in ("first", "second", "soft", "grid"):
        assert f": var(--{name})" in full
    assert not re.search(r"(fill|stroke): #", full)
    ids = re.findall(r' id="([^"]*)"', full)
    assert len(ids) == len(set(ids))


def chart_data(text: str) -> dict[str, Any]:
    """What the script gets, by the titles of the charts: the curves, and the frames of the drawings."""
    figures = re.findall(r'<figure [^>]*data-curves="([^"]*)">(.*?)</figure>', text, flags=re.DOTALL)
    found = {}
    for values, inside in figures:
        frames = [json.loads(frame) for frame in re.findall(r'data-frame="([^"]*)"', inside)]
        (title,) = re.findall(r"<h3>(.*?)</h3>", inside)
        found[title] = json.loads(unescape(values)) | {"frames": frames}
    return found


@pytest.mark.parametrize("last", [0.1, 0.05], ids=["linear", "logarithmic"])
def test_the_script_has_the_values_of_the_curves_and_the_place_of_the_axes(tmp_path: Path, last: float) -> None:
    text = page(write_workdir(tmp_path, CONFIG, [*LINES[:-1], eval_line(30, last, 0.9375)]))
    found = chart_data(text)
    training, held_out = found["Loss"]["curves"]
    assert training["steps"] == list(range(1, 31))
    assert training["values"] == [float(f"{3 / step:.5g}") for step in range(1, 31)]
    assert (held_out["name"], held_out["steps"], held_out["values"]) == ("held out", [0, 30], [3.0, last])
    narrow, wide = found["Loss"]["frames"]
    assert narrow[1] < wide[1]
    left, right, top, bottom, end, low, high, log = wide
    assert (end, log) == (30, last < 0.1)
    scale = math.log if log else float
    (points,) = curves(charts(text)["Loss"])  # of the wide drawing, which is the second
    for (x, y), step, value in zip(points, training["steps"], training["values"], strict=True):
        assert x == pytest.approx(left + step / end * (right - left), abs=0.1)
        share = (scale(value) - scale(low)) / (scale(high) - scale(low))
        assert y == pytest.approx(bottom + share * (top - bottom), abs=0.1)
    assert found["Scores"]["format"] == "percent"
    assert [curve["name"] for curve in found["Gradient norm"]["curves"]] == ["gradient norm"]


def test_the_same_run_gives_the_same_page(tmp_path: Path, full: str) -> None:
    (tmp_path / "again").mkdir()
    assert page(write_workdir(tmp_path / "again" / "run", CONFIG, LINES, DATA)) == full


def test_matplotlib_is_imported_only_to_draw_and_without_pyplot(tmp_path: Path) -> None:
    write_workdir(tmp_path, None, [train_line(1)])
    code = (
        "import sys, pathlib, peftjax.train, peftjax.report.page as report; print('matplotlib' in sys.modules);"
        f"report.write_report(pathlib.Path({str(tmp_path)!r}));"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    root = Path(svg.__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "False"]


@pytest.mark.parametrize(
    "losses",
    [
        [1.0],
        [0.0, 0.0],
        [2.0, 2.0],
        [-3.0, 5.0],
        [math.nan, math.inf],
        [1e-30, 1e30],
        [1.0, math.nan, 3.0],
        [1e-45, 3e38],
    ],
    ids=str,
)
def test_odd_losses_make_a_page_and_those_that_are_not_finite_are_skipped(tmp_path: Path, losses: list[float]) -> None:
    lines = [train_line(step, loss=loss) for step, loss in enumerate(losses, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(map(json_line, lines)))
    drawn = charts(page(tmp_path))
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert ("Loss" in drawn) == bool(finite)
    if finite:
        assert dots(drawn["Loss"]) == len(finite)
        width, height = map(float, drawn["Loss"].attrib["viewBox"].split()[2:])
        for x, y in itertools.chain(*curves(drawn["Loss"])):
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_a_finished_run_whose_loss_rose_has_a_warning(tmp_path: Path) -> None:
    worse = [eval_line(0, 0.1, 0.9), train_line(30), eval_line(30, 3.0, 0.0)]
    warning = "Warning: eval_loss rose from 0.1 to 3; lower optim.learning_rate or check the data"
    for steps, shown in ((30, True), (40, False)):
        config = {"train": {"steps": steps}}
        assert (warning in words(page(write_workdir(tmp_path / str(steps), config, worse)))) == shown


@pytest.mark.parametrize(("last", "logarithmic"), [(0.1, True), (0.5, False), (0.0, False)])
def test_a_loss_that_falls_far_has_a_logarithmic_axis(tmp_path: Path, last: float, logarithmic: bool) -> None:
    text = page(write_workdir(tmp_path, None, [train_line(1, loss=5.0), train_line(2, loss=last)]))
    assert ("Loss logarithmic" in words(text)) == logarithmic
    assert labels(charts(text)["Loss"])[3:] == (
        ["0.1", "0.3", "1", "3"] if logarithmic else ["0", "1", "2", "3", "4", "5"][last > 0 :]
    )


def json_line(line: dict[str, Any]) -> str:
    names = {"nan": "NaN", "inf": "Infinity"}
    return json.dumps({key: names.get(repr(value), value) for key, value in line.items()}) + "\n"


def test_a_long_noisy_run_makes_a_small_page_with_its_extremes_and_a_running_mean(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(size=20_000)
    lines = [train_line(step, loss=2 + noise[step - 1], grad_norm=noise[-step]) for step in range(1, 20_001)]
    lines[12_345]["loss"] = 50.0
    text = page(write_workdir(tmp_path, CONFIG, lines))
    assert len(text) < 400_000
    assert "each logged step" in text
    raw, mean = curves(charts(text)["Loss"])
    assert len(raw) < 8_000
    (left, _), *_, (right, bottom) = raw
    peak = min(raw, key=lambda point: point[1])
    assert (peak[0] - left) / (right - left) == pytest.approx(12_345 / 20_000, abs=1e-3)
    assert min(y for _, y in mean) > (peak[1] + bottom) / 2
    assert text.count('class="mean"') == 3  # of the loss, the gradient norm, and the speed
    (curve,) = chart_data(text)["Gradient norm"]["curves"]
    assert curve["noisy"]
    assert curve["steps"] == list(range(1, 20_001, 20))
    assert curve["values"][1] == pytest.approx(noise[-21], rel=1e-4)
    assert curve["means"][1] == pytest.approx(noise[-40:-20].mean(), rel=1e-4)


def test_numbers_are_short() -> None:
    values = (0, 0.25, 1000, 12_000, 1_500_000, 2e-5, 2.5e-17, 1e30, -0.5)
    assert [format_number(value) for value in values] == [
        "0", "0.25", "1,000", "12,000", "1.5e6", "2e-5", "2.5e-17", "1e30", "-0.5",
    ]  # fmt: skip
    spreads = [[], [0.25, 0.25], [1.5, 2.5], [1.9, 1.93], [100.0, 300.0], [2.0, 2 + 1e-9], [1.0, float("nan")]]
    assert [format_spread(values) for values in spreads] == [
        "", "0.25", "2.00 ± 0.71", "1.915 ± 0.021", "200 ± 141", "2 ± 7.1e-10", "nan",
    ]  # fmt: skip
    assert [format_duration(seconds) for seconds in (0.84, 59.9, 60, 151, 11_520)] == [
        "0.8 s", "1 min 0 s", "1 min 0 s", "2 min 31 s", "3 h 12 min",
    ]  # fmt: skip


def test_report_data_comes_back_equal(tmp_path: Path) -> None:
    DATA.save(tmp_path)
    assert ReportData.load(tmp_path) == DATA
    assert ReportData.load(tmp_path / "elsewhere") == ReportData()
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"title": "", **json.loads(path.read_text())}))  # as earlier versions wrote it
    assert ReportData.load(tmp_path) == DATA


def test_a_probability_that_is_not_finite_stays_json_and_comes_back(tmp_path: Path) -> None:
    example = Prediction("a:1", "NaN", "yes", "no", False, math.nan)
    ReportData(classes=Classes(1, (), (), (example,))).save(tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    classes = ReportData.load(tmp_path).classes
    assert classes
    assert repr(classes.examples) == repr((example,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"titel": "x"}', "unexpected keyword argument 'titel'"),
        ('{"parts": [{"name": "x"}]}', "missing"),
        ('{"before": 3}', "report.json"),
        ("[]", "not a JSON object but list"),
        ('{"title', "not JSON"),
    ],
)
def test_a_report_json_that_is_not_ours_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match=r"report\.json") as error:
        write_report(tmp_path)
    assert message in str(error.value)


def test_a_tilde_in_an_option_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells do not expand it after an equals sign."""
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"{tmp_path}/absent"):
        command.main(["--workdir=~/absent"])


def test_an_empty_workdir_and_the_directory_of_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the workdir of a run"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"its config\.json does not belong to a run"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_command_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_workdir(tmp_path, CONFIG, LINES)
    command.main(["--workdir", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()


def test_parameters_are_counted_by_part_and_what_is_trained_by_type() -> None:
    model = tiny.model()
    base = {part.name: part for part in count_parts(variables.flat(model)[1], variables.PeftParam)}
    assert base["embed"] == Part("embed", 48 * 32, 48 * 32 * 4, adapter=False, trained=False)
    assert base["blocks.attention"].parameters == 3 * (2 * 32 * 32 + 2 * 32 * 16)

    adapters.attach(model, methods.Lora(rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0))
    leaves = variables.flat(model)[1]
    parts = {part.name: part for part in count_parts(leaves, variables.PeftParam)}
    added = Part("blocks.attention.query", 3 * 2 * (32 + 32), 3 * 2 * (32 + 32) * 4, adapter=True, trained=True)
    assert parts.pop("blocks.attention.query") == added
    assert parts == base

    full = count_parts(variables.flat(tiny.model())[1], nnx.Param)
    assert all(part.trained and not part.adapter for part in full)


def test_bytes_are_those_that_an_array_takes() -> None:
    tree = {
        "a": jnp.zeros((3, 5), jnp.float32),
        "b": [jnp.zeros(10, jnp.bfloat16)],
        "c": jnp.zeros(7, jnp.int4),
        "d": None,
    }
    assert tree_bytes(tree) == 60 + 20 + 4
    assert tree_bytes(jnp.zeros(3, bool)) == 3
