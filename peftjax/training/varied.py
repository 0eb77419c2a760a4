"""Differences between the models of a population that are held in variables, so that one program can run all of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from flax import nnx

from peftjax.adapters.adapter import LayerMask
from peftjax.core import variables
from peftjax.nn.dropout import Dropout

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
Path = tuple[Any, ...]  # of a module


@dataclasses.dataclass(frozen=True)
class Varied:
    """Differences between models.

    Attributes:
        rates: The dropout modules whose rates differ.
        layers: The masks of adapters whose layers differ.
        numbered: Whether the models have different dropout modules. A module's key depends on its number in the model,
            so each model then holds the numbers of its own modules.
    """

    rates: tuple[Path, ...]
    layers: tuple[Path, ...]
    numbered: bool

    def hold(self, model: nnx.Module) -> None:
        """Hold the differences in variables of a model, in place."""
        dropouts, masks = _modules(model, Dropout), _modules(model, LayerMask)
        numbers = {path: number for number, path in enumerate(_with_keys(dropouts))}
        for path, module in dropouts.items():
            if path in self.rates:
                module.vary()
            if self.numbered and module.key is not None:
                module.hold_number(numbers.get(path, 0))
        for path, mask in masks.items():
            if path in self.layers:
                mask.vary()


def find_varied(models: Sequence[nnx.Module], *, ranks_from_data: bool) -> Varied:
    """The differences between the models of runs.

    `ranks_from_data`: whether runs choose ranks from their data later. Any layer may then lose its adapter.
    """
    dropouts, masks = [_modules(model, Dropout) for model in models], [_modules(model, LayerMask) for model in models]
    rates = {path: {own[path].rate for own in dropouts if path in own} for each in dropouts for path in each}
    layers = {
        path: {own[path].array.tobytes() if path in own else None for own in masks} for each in masks for path in each
    }
    return Varied(
        rates=tuple(path for path, found in rates.items() if len(found) > 1),
        layers=tuple(path for path, found in layers.items() if ranks_from_data or len(found) > 1),
        numbered=ranks_from_data or len({tuple(_with_keys(own)) for own in dropouts}) > 1,
    )


def _modules(model: nnx.Module, kind: type[ModuleT]) -> dict[Path, ModuleT]:
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, kind)}


def _with_keys(dropouts: dict[Path, Dropout]) -> list[Path]:
    """The modules that have a key, in the order in which a train step draws their keys."""
    keyed = (path for path, module in dropouts.items() if module.key is not None)
    return sorted(keyed, key=lambda path: variables.dotted((*path, "key")))
