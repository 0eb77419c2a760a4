"""The examples run, with fewer steps than by default, and do what they are for."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow


def main_of(script: str) -> Callable[..., Any]:
    return runpy.run_path(str(ROOT / "examples" / script))["main"]


def test_own_loop(workplace: Path) -> None:
    before, after = main_of("own_loop.py")(["--steps=40"])
    assert after < before / 4
    assert (workplace / "runs" / "own_loop" / "adapter_model.safetensors").is_file()


def test_qlora_hf_model(workplace: Path) -> None:
    losses = main_of("qlora_hf_model.py")(["--steps=16"])
    assert sum(losses[-8:]) < sum(losses[:8])
    assert (workplace / "runs" / "qlora" / "adapter_model.safetensors").is_file()


def test_several_adapters() -> None:
    iso, british, base = main_of("several_adapters.py")(steps=60)
    assert iso == " 2019-05-17"
    assert british.count("/") == 2
    assert base not in (iso, british)


def test_classifier(workplace: Path) -> None:
    assert main_of("classifier.py")(["--steps=150"]) > 0.8
    assert (workplace / "runs" / "classifier" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("default")  # those of Jupyter's own libraries
def test_the_notebook(workplace: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "examples" / "lora_from_scratch.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
