"""What a report says about the command, the commit and the software of a run."""

import importlib.metadata
import subprocess
from pathlib import Path

import pytest

from peftjax.report import origin as module
from peftjax.report.origin import origin, versions


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_current_directory_if_it_is_in_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin(tmp_path / "run").keys() == {"command", "workdir"}
    assert origin(Path("run"))["workdir"] == str(tmp_path / "run")
    git("init", "--quiet")
    assert "git commit" not in origin(tmp_path)  # a repository without a commit
    (tmp_path / "config.py").write_text("one")
    git("add", "config.py")
    git("commit", "--quiet", "--message=one")
    git("tag", "v1")
    (tmp_path / "run").mkdir()
    assert origin(tmp_path)["git commit"] == git("rev-parse", "HEAD")
    (tmp_path / "config.py").write_text("two")
    assert origin(tmp_path)["git commit"] == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git commit" not in origin(tmp_path)  # git is not installed


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["/usr/bin/python3", "-m", "peftjax.train", "--config=a b.py"], "python3 -m peftjax.train '--config=a b.py'"),
        (["/venv/bin/python", "/venv/bin/peftjax", "train", "--config=a.py"], "peftjax train --config=a.py"),
        (["python", "own.py"], "python own.py"),
        (["python"], "python"),
    ],
)
def test_the_command_is_as_in_a_shell(words: list[str], command: str) -> None:
    assert module._command(words) == command


def test_versions_are_those_of_the_installed_packages() -> None:
    found = versions()
    assert found["optax"] == importlib.metadata.version("optax")
    assert list(found)[:4] == ["Python", "jax", "flax", "optax"]
    assert found["device"].endswith("cpu")
