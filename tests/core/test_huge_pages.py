"""Commands that compute restart with huge pages, where only programs that ask for them get them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftjax.core import huge_pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("always [madvise] never\n", True), ("[always] madvise never\n", False), ("always madvise [never]\n", False)],
)
def test_the_setting_of_the_kernel(content: str, expected: bool, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text(content)
    assert huge_pages.opt_in(str(tmp_path / "enabled")) is expected
    assert not huge_pages.opt_in(str(tmp_path / "other"))  # a kernel without huge pages


@pytest.mark.parametrize(("command", "starts"), [("evaluate", 2), ("report", 1)])
def test_a_command_that_computes_restarts_once(command: str, starts: int, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nprint('started', os.getpid(), os.environ.get('GLIBC_TUNABLES', ''), file=sys.stderr)\n"
    )
    given = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    given |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = [sys.executable, "-m", "peftjax", command, "--workdir=missing"]

    def run(environment: dict[str, str]) -> list[list[str]]:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "missing" in done.stderr.splitlines()[-1]
        return [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("started")]

    found = run(given)
    assert len(found) == (starts if huge_pages.opt_in() else 1)
    assert len({process for process, *_ in found}) == 1
    assert [value for _, *value in found] == [[], [huge_pages.VALUE]][: len(found)]
    assert len(run(given | {huge_pages.VARIABLE: ""})) == 1  # the user's choice
