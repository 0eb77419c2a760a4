"""The record of a model's adapters is part of its structure, and leaves no trace once they are detached."""

import re

import pytest
from flax import nnx

from peftjax import adapters
from peftjax.adapters.registry import Registry, registry_of
from peftjax.core.errors import UserError
from peftjax.methods import Lora
from tests import tiny

LORA = Lora(rank=2, targets=("q_proj",))


def test_the_registry_survives_a_split_and_a_merge_of_the_model_and_is_not_in_its_state() -> None:
    model = adapters.attach(tiny.model(), LORA, "one", rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    again = nnx.merge(graph, state)
    assert registry_of(again) == registry_of(model) == Registry(methods=(("one", LORA),), active=("one",))
    assert nnx.split(again)[0] == graph
    adapters.merge(model, "one")
    merged, after = nnx.split(model)
    assert adapters.active(nnx.merge(merged, after)) == ()
    assert [merge.name for merge in registry_of(nnx.merge(merged, after)).merges] == ["one"]
    assert [path for path, _ in nnx.to_flat_state(after)] == [path for path, _ in nnx.to_flat_state(state)]


def test_a_model_whose_adapters_are_detached_has_the_structure_it_had() -> None:
    model = tiny.model()
    before = nnx.split(model)[0]
    adapters.attach(model, LORA, "one", rngs=nnx.Rngs(0))
    adapters.attach(model, LORA, "two", rngs=nnx.Rngs(1))
    assert nnx.split(adapters.use(model, "one"))[0] != nnx.split(adapters.use(model, "two"))[0]
    assert (
        nnx.split(adapters.active_view(adapters.use(model, "one")))[0]
        == (nnx.split(adapters.active_view(adapters.use(model, "two")))[0])
    )
    adapters.merge(model, "two")
    adapters.detach(model, "two")
    adapters.detach(model, "one")
    assert nnx.split(model)[0] == before


def test_a_name_of_another_type_is_not_attached() -> None:
    for name in (None, ["one", "two"], 5):
        message = re.escape(f"no adapter {name!r} is attached. Attached: []")
        for change in (adapters.merge, adapters.unmerge, adapters.detach):
            with pytest.raises(UserError, match=message):
                change(tiny.model(), name)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"adapter name {re.escape(repr(name))}: use letters"):
            adapters.attach(tiny.model(), LORA, name, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^the model must be an nnx.Module, not 'one'$"):
        adapters.detach("one")  # type: ignore[type-var]
    with pytest.raises(
        UserError, match=r"^attach: the method must be an instance such as Lora\(rank=8\), not \S+\(.*$"
    ):
        adapters.attach(LORA, tiny.model(), rngs=nnx.Rngs(0))  # type: ignore[type-var, arg-type]
    with pytest.raises(UserError, match="use: names must be the name of an adapter, a list of names or None, not 5"):
        adapters.use(tiny.model(), 5)  # type: ignore[arg-type]
