"""A method outside the package: registered, it trains, is saved and is loaded like the built-in ones."""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from peftjax import adapters
from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.sites import Site, insert, sites
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftParam
from peftjax.io.model_card import make_card
from peftjax.methods import METHODS
from peftjax.nn.residual import Residual
from peftjax.nn.slot import Base
from tests import tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate(peftjax.Method):
    """x + g f(x) with one trained number g for each sublayer f."""

    start: float = 1.0

    method: ClassVar[str] = "gate"
    peft_type: ClassVar[str] = "GATE"
    hf_fields: ClassVar = {"start": ("start", 1.0)}

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        for site in sites(model):
            if isinstance(site.module, Residual):
                insert(site, name, GateAdapter(self, site))


class GateAdapter(MethodAdapter):
    """g f(x).

    Attributes:
        gate: g, [*stack].
    """

    def __init__(self, method: Gate, site: Site) -> None:
        self.gate = PeftParam(jnp.full(site.stack, method.start, jnp.float32), axes=site.lead())

    def apply(self, base: Base, x: jax.Array) -> jax.Array:
        return base(x) * self.gate.get_value()

    def hf_leaves(self, layer: int | None) -> dict[str, HfLeaf]:
        return {"gate": HfLeaf("gate")}


class OwnLora(peftjax.Lora):
    """A LoRA that somebody changed, without a name of its own."""


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "gate", Gate)


@pytest.mark.usefixtures("registered")
def test_one_number_per_layer_is_saved_and_loaded(tmp_path: Path) -> None:
    tiny.directory(tmp_path / "base")
    model = peftjax.attach(peftjax.load_model(tmp_path / "base"), Gate(), rngs=nnx.Rngs(0))
    expected = tiny.randomize(model)(tiny.tokens())
    peftjax.save_adapter(model, tmp_path / "adapter")
    again = peftjax.load_adapter(peftjax.load_model(tmp_path / "base"), tmp_path / "adapter")
    np.testing.assert_array_equal(again(tiny.tokens()), expected)


@pytest.mark.usefixtures("registered")
def test_the_card_of_a_method_that_peft_does_not_have_does_not_mention_peft(tmp_path: Path) -> None:
    card = {}
    for method in (Gate(), peftjax.Lora(rank=2)):
        model = peftjax.attach(peftjax.load_model("embedded"), method, rngs=nnx.Rngs(0))
        card[method.method] = make_card(peftjax.save_adapter(model, tmp_path / method.method))
    assert "import peft\n" in card["lora"]
    assert "library_name: peft\n" in card["lora"]
    assert "import peft\n" not in card["gate"]
    assert "library_name: peftjax\n" in card["gate"]
    assert "peftjax.load_adapter(model, adapter)" in card["gate"]


@pytest.mark.parametrize("method", [Gate(), OwnLora(rank=2)])
def test_a_run_does_not_train_another_method_than_the_given_one(method: peftjax.Method, tmp_path: Path) -> None:
    kind = type(method).__name__
    with pytest.raises(UserError, match=re.escape(f"METHODS[{kind}.method] = {kind}")):
        peftjax.train("embedded", method, [{"text": "one"}], workdir=tmp_path / "run")


def test_a_method_registered_with_the_peft_type_of_another_does_not_take_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peftjax.attach(peftjax.load_model("embedded"), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    peftjax.save_adapter(model, tmp_path / "adapter")
    monkeypatch.setitem(METHODS, "own_lora", OwnLora)
    again = peftjax.load_adapter(peftjax.load_model("embedded"), tmp_path / "adapter")
    assert type(adapters.attached(again)["default"]) is peftjax.Lora


def test_a_file_that_nothing_could_load_is_not_written(tmp_path: Path) -> None:
    model = peftjax.attach(peftjax.load_model("embedded"), Gate(), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="Gate is not registered"):
        peftjax.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
