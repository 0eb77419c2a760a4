import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.io.adapter_tensors import WEIGHTS
from peftjax.io.safetensors_files import read_metadata

SIZES = {"hidden_size": 64, "intermediate_size": 64}
LORA = methods.Lora(rank=2, targets=("q_proj", "down_proj"))


def base(format_: str = "") -> Any:
    model = tiny.model(**SIZES)
    return tiny.quantized(model, format_) if format_ else model


@pytest.fixture(scope="module")
def over_nf4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.randomize(adapters.attach(base("nf4"), LORA, rngs=nnx.Rngs(0)))
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "a")


def kernel(model: Any, path: str) -> np.ndarray:
    return np.asarray(variables.flat(model)[1][path].get_value().astype(jnp.float32))


def said(errors: dict[str, float]) -> str:
    worst = max(errors, key=lambda path: errors[path])
    return f"{np.mean(list(errors.values())):.2%} on average, at most {errors[worst]:.2%} ({worst})"


def test_an_adapter_of_a_base_in_the_same_format_is_loaded_without_a_word(over_nf4: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(base("nf4"), over_nf4)


def test_the_formats_are_recorded_while_the_adapter_is_merged(over_nf4: Path, tmp_path: Path) -> None:
    model = adapters.merge(load_adapter(base("nf4"), over_nf4))
    again = save_adapter(model, tmp_path / "again")
    assert read_metadata(again / WEIGHTS) == read_metadata(over_nf4 / WEIGHTS)


@pytest.mark.parametrize(("format_", "here"), [("", "not quantized"), ("int8", "int8")])
def test_an_adapter_of_a_base_in_another_format_is_loaded_with_a_warning(
    over_nf4: Path, format_: str, here: str
) -> None:
    with pytest.warns(UserWarning, match=rf"another format than this one's \(there nf4, here {here}\)"):
        load_adapter(base(format_), over_nf4)


@pytest.mark.slow
def test_merging_into_the_exact_base_says_by_how_much_the_quantized_one_was_away(
    over_nf4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="another format"):
        model = load_adapter(base(), over_nf4)
    adapters.merge(model)
    paths = [
        path for path, leaf in variables.flat(base("nf4"))[1].items() if "kernel" in path and path != "head.kernel"
    ]
    errors = {}
    for path in paths:
        exact = kernel(base(), path)
        errors[path] = np.linalg.norm(kernel(base("nf4"), path) - exact) / np.linalg.norm(exact)
    assert 0.05 < np.mean(list(errors.values())) < 0.15
    assert said(errors) in capsys.readouterr().out


def test_quantizing_a_merged_kernel_again_says_by_how_much_it_moves(
    over_nf4: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, again = (load_adapter(base("nf4"), over_nf4) for _ in range(2))
    adapters.merge(exact)
    assert capsys.readouterr().out == ""
    adapters.merge(again, requantize=True)
    errors, changes = {}, {}
    for path in ("blocks.attention.query.kernel", "blocks.feedforward.down.kernel"):
        merged = kernel(exact, path)
        errors[path] = np.linalg.norm(kernel(again, path) - merged) / np.linalg.norm(merged)
        before = kernel(base("nf4"), path)
        changes[path] = np.linalg.norm(merged - before) / np.linalg.norm(before)
    told = capsys.readouterr().out
    assert (
        f"rounding error of the kernels: {said(errors)}. Relative size of the adapter's updates: {said(changes)}"
        in told
    )
    assert variables.flat(again)[1][path].get_value().format == "nf4"
    adapters.unmerge(again)
    assert (kernel(again, path) == kernel(base("nf4"), path)).all()
