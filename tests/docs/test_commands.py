"""The commands, options, fields and links in the documentation exist."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftjax.__main__ import COMMANDS
from peftjax.core.config import defaults, flat_fields
from peftjax.training import config as configs
from peftjax.training import space
from tests.docs.pages import PAGES, ROOT, blocks, name

SECTIONS = "model|task|data|optim|train|eval|checkpoint|mesh"
FILES = {"train.jsonl", "train.py", "model.safetensors"}  # look like fields


def lines(page: Path) -> Iterator[str]:
    """The command lines of a page: those in its console blocks, and those in running text."""
    for block in blocks(page, "bash"):
        code = re.sub(r"\\\n\s*", " ", block.code)
        yield from re.sub(r"'[^']*'", lambda quoted: " ".join(quoted[0].split()), code).splitlines()
    yield from re.findall(r"`((?:python -m peftjax\.|peftjax )[^`]*)`", page.read_text())


def called(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """The commands that a line calls, as `peftjax train` or `python -m peftjax.train`, with the words that follow."""
    for place, word in enumerate(words):
        if word.startswith("peftjax."):
            yield word.removeprefix("peftjax.").replace("_", "-"), words[place + 1 :]
        elif (
            word.rpartition("/")[2] == "peftjax"
            and words[place - 1 : place] in ([], ["--"])
            and words[1:] != ["--help"]
        ):
            yield words[place + 1], words[place + 2 :]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_these_options_and_fields(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in lines(page):
        words = shlex.split(line, comments=True)
        for command, following in called(words):
            if command == "COMMAND":
                continue
            assert command in COMMANDS, line
            arguments = [word for word in following if word.startswith("--")]
            options = {word.partition("=")[0] for word in arguments if not re.match(r"--(config|sweep)\.", word)}
            with pytest.raises(SystemExit):
                importlib.import_module(COMMANDS[command][0]).main(["--help"])
            told = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert options <= told | {"--help"}, line
            check_fields(arguments)


def check_fields(arguments: list[str]) -> None:
    """Load the config that a command line names, or the defaults, with the changes that it makes."""
    file = next(
        (word.partition("=")[2] for word in arguments if word.startswith("--config=configs/")), "configs/base.py"
    )
    changes = [word for word in arguments if word.startswith("--config.")]
    swept: list[list[str]] = [[]]
    for word in arguments:
        if word == space.OR:
            swept.append([])
        elif word.startswith("--sweep."):
            field, values = space.parse(word)
            swept[-1].append(f"--config.{field}={values.draw(0.0, integer=False)}")
    for fields in swept:
        configs.load(ROOT / file, [*changes, *fields])


@pytest.mark.parametrize("page", [page for page in PAGES if "_config.yaml" in page.read_text()], ids=name)
def test_configs_in_yaml_are_valid(page: Path, tmp_path: Path) -> None:
    texts = [block.code for block in blocks(page, "yaml") if block.code.startswith("# my_config.yaml")]
    assert texts
    file = tmp_path / "my_config.yaml"
    for text in texts:
        file.write_text(text)
        assert configs.load(file) != configs.validate({})
        for swept in space.read_spaces(str(file), []):
            space.load_run(
                str(file), [], [swept], {name: each.draw(0.0, integer=False) for name, each in swept.items()}
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_launchers_have_these_options(page: Path) -> None:
    for line in lines(page):
        for script, rest in re.findall(r"launch/(local\.py|gke\.py|tpu_pod\.sh) (.*)", line):
            own = rest.partition(" -- ")[0]
            text = (ROOT / "launch" / script).read_text()
            for option in re.findall(r"(?:^| )(--[\w-]+)", re.sub(r"'[^']*'", "", own)):
                assert option in text, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fields_in_the_text_exist(page: Path) -> None:
    known = set(flat_fields(defaults()))
    found = re.findall(rf"`(?:--config\.)?((?:{SECTIONS})\.[a-z_0-9]+)(?![\w(.])", page.read_text())
    assert {field for field in found if field not in FILES} <= known


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")], ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
