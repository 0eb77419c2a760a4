"""The documentation as data: its pages, and their code blocks."""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

# An optional comment <!-- not run: REASON --> in the line before, the fence with its language, the code, the same fence.
BLOCK = re.compile(
    r"^(?:(?P<margin> *)<!-- not run: (?P<reason>.+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
      line: The line of the page on which the code starts, from 1.
      reason: Why it is not executed; None if it is.
    """

    language: str
    code: str
    line: int
    reason: str | None


def blocks(page: Path, *languages: str) -> list[Block]:
    """The code blocks of a page in these languages, in order."""
    text, found = page.read_text(), []
    for match in BLOCK.finditer(text):
        lines = match["code"].splitlines(keepends=True)
        code = "".join(line.removeprefix(match["indent"]) for line in lines)
        found.append(Block(match["language"], code, text.count("\n", 0, match.start("code")) + 1, match["reason"]))
    return [block for block in found if block.language in languages]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))
