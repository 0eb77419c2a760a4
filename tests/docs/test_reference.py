"""What the documentation says about messages and about the names of Hugging Face PEFT is what the code says."""

import ast
import functools
import re

import pytest

from peftjax.adapters.targeted import Targeted
from peftjax.methods import METHODS
from tests.docs.pages import ROOT


@functools.cache
def messages() -> tuple[str, ...]:
    """Every string in the package, with ... where an f-string inserts a value."""
    found = []
    for path in (ROOT / "peftjax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def quoted() -> list[str]:
    """The messages in the tables of the page."""
    rows = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    return rows


@pytest.mark.parametrize("message", quoted())
def test_a_message_in_troubleshooting_is_one_of_the_program(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))))
    assert any(pattern.search(each) for each in messages())


# Our options that peft's config has, but that are not read from its adapter files.
TRAINING_OPTIONS = {
    "lora": {("init_lora_weights", "init")},
    "prompt": {("prompt_tuning_init", "init"), ("prompt_tuning_init_text", "text")},
    "p_tuning": {("encoder_reparameterization_type", "encoder")},
    "prefix": {("prefix_projection", "projection"), ("encoder_hidden_size", "hidden")},
}


def test_the_names_of_peft_are_those_that_files_are_translated_with() -> None:
    text = (ROOT / "docs" / "migrating.md").read_text()
    rows = re.findall(r"^\| (`\w+Config`[^|]*)\| (`[^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    told = {}
    for theirs, ours, options in rows:
        assert theirs.count("`") == ours.count("`")
        for cls in re.findall(r"`(\w+)`", ours):
            told[cls] = set(re.findall(r"`(\w+)` to `(\w+)`", options))
    for name, cls in METHODS.items():
        if cls.peft_type is None:
            continue
        own = {(theirs, ours) for ours, (theirs, _) in cls.hf_fields.items() if theirs != ours}
        shared = {(theirs, ours) for ours, (theirs, _) in Targeted.hf_fields.items()}
        assert told.pop(cls.__name__) == (own - shared) | TRAINING_OPTIONS.get(name, set()), name
    assert not told
