"""The table of all methods: what it says is what attaching and saving give."""

from pathlib import Path

import jax
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, list_methods, methods
from peftjax.core.errors import UserError
from peftjax.io.adapter_save import save_adapter
from peftjax.models import from_hf_config


@pytest.mark.parametrize("name", ["lora", "prompt", "vera"])
def test_a_summary_is_what_the_method_trains_and_writes(name: str, tmp_path: Path) -> None:
    summary = list_methods.summarize(from_hf_config(tiny.CONFIG), name)
    method = methods.METHODS[name]()
    model = adapters.attach(tiny.model(), method, rngs=nnx.Rngs(0))
    base = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert summary.trained == adapters.count_trainable(model)
    assert summary.share == summary.trained / base
    written = (save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors").stat().st_size
    assert 0.5 * written < summary.file_bytes < written  # the file has a header too


def test_every_method_has_a_row_or_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    list_methods.main(["--model", "embedded"])
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert all(sum(line[:1] == [name] for line in lines) >= 2 for name in methods.METHODS)  # its numbers, its equation
    assert "100.00%" in printed  # full
    assert [line[-1] for line in lines if line[:1] in (["lora"], ["prompt"])][:2] == ["yes", "no"]
    assert "y = x W + s (x A) B, with W frozen, A random and B zero at initialization" in " ".join(printed.split())
    assert "x + f(x) + B(f(x)) for each sublayer f of a block, with B(u) = s act(u W_down) W_up trained" in " ".join(
        printed.split()
    )
    assert "[1] bitfit does not fit with its default options: method.targets='all-biases'" in printed


def test_the_options_of_a_method_are_printed_with_their_equation(capsys: pytest.CaptureFixture[str]) -> None:
    list_methods.main(["--method=ia3"])
    printed = capsys.readouterr().out
    assert "arXiv:2205.05638" in printed
    assert "feedforward" in printed
    assert (
        "layers_to_transform (tuple of int, default all): The only layers" in printed
    )  # of every method that has targets


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="'loar' is not a method"):
        list_methods.main(["--method=loar"])


def test_an_empty_model_is_refused() -> None:
    with pytest.raises(UserError, match="--model= is empty"):
        list_methods.main(["--model="])
