"""The examples in the docstrings, executed."""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import peftjax
from peftjax import losses
from tests import hub

NAMES = {"jax": jax, "jnp": jnp, "nnx": nnx, "np": np, "optax": optax, "peftjax": peftjax}
PACKAGE = Path(peftjax.__file__).parent

SLOW = {"peftjax.losses.seq2seq", "peftjax.io.load.load_kernels", "peftjax.trainer.train"}  # they compile whole models


def modules() -> Iterator[ModuleType]:
    """The modules with an example; the others need not be imported."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text():
            yield importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {test.name: test for module in modules() for test in finder.find(module, extraglobs=NAMES)}
    return [test for test in found.values() if test.examples]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub in its HTTP library
@pytest.mark.parametrize(
    "example",
    [pytest.param(test, id=test.name, marks=pytest.mark.slow if test.name in SLOW else ()) for test in examples()],
)
def test_the_example_prints_what_its_docstring_says(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner()
    report: list[str] = []
    with stand_in_hub(example, monkeypatch) if example.name.endswith(".push_adapter") else nullcontext():
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


@contextmanager
def stand_in_hub(example: doctest.DocTest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uploads of my-name go to a stand-in for the hub, whose address replaces that of the hub in what is printed."""
    with hub.logged_in(monkeypatch) as server:
        server.user["name"] = "my-name"
        for line in example.examples:
            line.want = line.want.replace("https://huggingface.co", server.endpoint)
        yield


@pytest.mark.parametrize("module", [peftjax, losses], ids=["peftjax", "losses"])
def test_every_public_function_has_an_example(module: ModuleType) -> None:
    functions = [getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    assert functions
    assert [f.__name__ for f in functions if ">>> " not in (f.__doc__ or "")] == []
