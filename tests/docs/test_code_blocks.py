"""The Python code of README.md, CONTRIBUTING.md and docs/ is executed.

The blocks of a page run in order and share one namespace. A block that cannot run has a comment in the line before it:
<!-- not run: needs a TPU -->.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from peftjax.core.config import defaults
from peftjax.methods import make_config
from peftjax.training import config as configs
from tests import tiny
from tests.docs.pages import PAGES, blocks, name

# What a page calls a path, and what stands there in the directory of the fixture `world`.
PATHS = {
    '"DIR"': '"{world}/model"',
    "path/to/model": "{world}/model",
    "path/to/adapter": "{world}/adapter",
    "path/to/other-adapter": "{world}/other",
    "path/to/stories-adapter": "{world}/adapter",
    "path/to/poems-adapter": "{world}/other",
    "path/to/bnb-4bit": "{world}/quantized",
    "Qwen/Qwen3-30B-A3B": "{world}/qwen3_moe",
    "path/to/vit": "{world}/vit",
    "path/to/cat.jpg": "{world}/cat.jpg",
    "runs/quickstart/adapter": "{world}/demo",
}


def given() -> dict[str, Any]:
    """The names that a page may use without defining them."""
    return {"tokens": tiny.tokens(), "batch": tiny.batch(), "config": defaults(), "make_config": make_config}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_code_of_a_page_runs(page: Path, world: Path, workplace: Path) -> None:
    namespace, code = given(), blocks(page, "python")
    steps_are_called = any(re.search(r"^(?!def).*\bstep\(", block.code, re.MULTILINE) for block in code)
    for block in code:
        if block.reason is not None:
            continue
        text = block.code
        for path, stands_for in PATHS.items():
            text = text.replace(path, stands_for.format(world=world))
        assert "path/to" not in text, f"{name(page)}:{block.line}: an unknown path; add it to PATHS"
        with jax.numpy_rank_promotion("allow"):  # as in a user's program
            exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)
            if "def step(" in text and not steps_are_called:
                take_a_step(namespace)
        if "def get_config(" in text:
            configs.validate(namespace["get_config"](), source=f"{name(page)}:{block.line}")


def take_a_step(namespace: dict[str, Any]) -> None:
    """Call the page's `step` with what the page has made for its arguments."""
    step = namespace["step"]
    result = step(*(namespace[argument] for argument in inspect.signature(step).parameters))
    loss = result[-1] if isinstance(result, tuple) else result
    assert jnp.isfinite(loss)


def test_every_block_has_a_language() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
        assert all(fences[::2]), f"{name(page)}: a code block without a language; use text"
