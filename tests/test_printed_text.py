"""What the commands print of names, paths, prompts and messages that are not ours arrives as it is."""

import dataclasses
import io
import sys
from pathlib import Path

import pytest

from peftjax import list_methods, methods
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.core.terminal import make_console
from peftjax.log import Log
from peftjax.models import from_hf_config
from peftjax.plan import devices, tables
from peftjax.plan.plan import Plan
from peftjax.report.data import Answer
from peftjax.training import config as configs
from peftjax.training.answers import answers_table
from peftjax.training.sweep_table import make_table
from tests import tiny

PACKAGE = Path(__file__).resolve().parents[1] / "peftjax"
TEXT = "peftjax[tpu] [cuda-plan] [bold]x[/bold] [/] :smile: \\[a] b\\"  # rich's markup and emoji codes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[io.StringIO, Terminal])
def out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A file, and a terminal, wide enough that no text is broken into lines."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    stream: io.StringIO = request.param()
    return stream


def test_only_one_place_makes_consoles() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert "rich.markup" not in source, path
        assert path.name == "terminal.py" or " Console(" not in source, path
        assert ".status(" not in source.replace(".status(Text(", ""), path  # a spinner reads markup on any console


def test_plans(out: io.StringIO) -> None:
    config = configs.changed(configs.validate(defaults()), {"model.path": TEXT})
    fields = {"mesh": {"data": 1}, "arguments": {TEXT: 1}, "advice": [(TEXT, 1)], "collectives": {TEXT: (1, 1)}}
    values = {field.name: fields.get(field.name, 1) for field in dataclasses.fields(Plan)}
    plan = Plan(**values | {"device": "cpu", "memory": 0, "compiler": TEXT, "refused": TEXT})
    console = make_console(file=out, soft_wrap=True)
    tables.show(console, config, plan, TEXT)
    assert out.getvalue().count(TEXT) >= 6
    before = len(out.getvalue())
    tables.show(console, config, dataclasses.replace(plan, compiler=""), TEXT)
    assert f"not compiled: {TEXT}. " in out.getvalue()[before:]
    for table in (
        tables.compare_table({TEXT: plan, "b": UserError(TEXT)}),
        tables.search_table("rank", [(1, UserError(TEXT))]),
    ):
        before = len(out.getvalue())
        console.print(table)
        assert TEXT in out.getvalue()[before:]
    assert devices.find(plan.device)


def test_methods(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", {"lora": methods.METHODS["lora"]})
    monkeypatch.setattr(list_methods, "summarize", lambda *_: list_methods.MethodSummary("lora", 0, 0.0, 0, None, TEXT))
    console = make_console(file=out)
    list_methods.print_methods(from_hf_config(tiny.CONFIG), console)
    assert f"[1] lora does not fit with its default options: {TEXT}" in out.getvalue()
    assert "does not fit [1]" in out.getvalue()


def test_sweeps(out: io.StringIO) -> None:
    found = [
        {"run": str(value), "values": {TEXT: value}, "scores": {"loss": 1.0}} for value in (TEXT + "1", TEXT + "2")
    ]
    make_console(file=out).print(make_table(found))
    assert out.getvalue().count(TEXT) == 3


def test_training_and_evaluation(out: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", out)
    with Log(tmp_path, total_steps=1, resume_step=0, tensorboard=False) as log:
        log.message(TEXT)
        log.panel(
            TEXT, answers_table([Answer("", TEXT, TEXT, TEXT, True), Answer("", TEXT, TEXT, "", False)], marked=True)
        )
        log.step(1, {"loss": 1.0})
    assert out.getvalue().count(TEXT) == 2 + 2 + 2
