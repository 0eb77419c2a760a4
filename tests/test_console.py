"""The console command `peftjax`: it lists the commands, and runs one as `python -m peftjax.COMMAND` does."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peftjax
from peftjax import __main__ as console
from peftjax.core import cli
from peftjax.core.command import command_in

ROOT = Path(__file__).resolve().parents[1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/peftjax", *arguments])
    with pytest.raises(SystemExit) as stop:
        console.main()
    return int(stop.value.code or 0)


def test_it_is_installed_and_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"peftjax": "peftjax.__main__:main"}
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"peftjax {peftjax.__version__}\n"
    assert run(monkeypatch) == run(monkeypatch, "--help") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == [*console.COMMANDS] * 2
    assert max(len(line) for line in console.usage().splitlines()) < 100


def test_an_unknown_command_is_refused_with_what_is_near(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "trian", "--config=a.py") == 2
    assert capsys.readouterr().err == "error: peftjax trian: no such command. Did you mean 'train'?\n"
    assert run(monkeypatch, "--config=a.py") == 2
    assert "no such command. The commands are train, evaluate," in capsys.readouterr().err


@pytest.mark.parametrize("name", [*console.COMMANDS, "list_methods"])
def test_a_command_has_its_own_help_and_names_itself_as_it_was_started(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, name, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: peftjax {name.replace('_', '-')} ")


def test_a_command_reports_mistakes_as_the_module_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "train", "--config=no.py", "--workdir=run") == 2
    assert capsys.readouterr().err == "error: --config=no.py: no such file.\n"


def test_only_the_chosen_command_is_imported() -> None:
    code = """
import sys
from peftjax.__main__ import dispatch
dispatch(["list-methods", "--method=ia3"])
print(*[name for name in sys.modules if name in ("peftjax.train", "peftjax.generate", "peftjax.plan", "peftjax.list_methods")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "peftjax.list_methods"


@pytest.mark.parametrize(
    ("argv", "started", "command"),
    [
        (["-m", "--config=a"], ["python", "-m", "peftjax.train", "--config=a"], "train"),
        (["-m", "train"], ["python", "-X", "dev", "-m", "peftjax", "train"], "train"),
        (["/usr/bin/peftjax", "train", "--config=a"], ["python", "/usr/bin/peftjax", "train", "--config=a"], "train"),
        (["/usr/bin/peftjax"], ["python", "/usr/bin/peftjax"], ""),
        (["-m", "train"], ["python", "-m", "pytest", "train"], None),
        (["train.py"], ["python", "train.py"], None),
    ],
)
def test_a_process_knows_its_command_before_it_imports_anything(
    argv: list[str], started: list[str], command: str | None
) -> None:
    assert command_in(argv, started) == command


@pytest.mark.parametrize(
    ("script", "usage"),
    [
        ("/usr/bin/peftjax", "peftjax list-methods"),
        ("/lib/peftjax/__main__.py", "peftjax list-methods"),
        ("/lib/peftjax/list_methods.py", "python -m peftjax.list_methods"),
        ("/lib/peftjax/plan/__main__.py", "python -m peftjax.list_methods"),
    ],
)
def test_the_usage_message_names_the_program_that_was_started(
    script: str, usage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    assert cli.program("list_methods") == usage
