"""The differences that members of a population may have, and a model whose structure fits all of them.

One program trains all members. Whatever differs between them must therefore be an input of the program, such as an array of
the model, or belong to the update, which is separate for each member. Arrays may differ in shape if padding them with zeros
has no effect, as in the rank axis of LoRA. An adapter may be missing if it has no effect when all of its arrays are zero.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx

from peftjax.adapters import Method, active_view
from peftjax.adapters.attach import attach_unchecked
from peftjax.adapters.ranks import RankedAdapter
from peftjax.adapters.sites import sites
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.nn.dropout import Dropout
from peftjax.training import config as configs
from peftjax.training.config import Config

ModelT = TypeVar("ModelT", bound=nnx.Module)
RunT = TypeVar("RunT")
Path = tuple[Any, ...]  # of a module

# Fields that only affect the update, or when a member is evaluated, saved and finished, or where it is logged.
# `Method.traced_options` adds others.
PER_MEMBER = ("optim.", "train.steps:", "train.eval_every:", "checkpoint.every:", "log.")


def separating_fields(one: Config, other: Config) -> list[str]:
    """The dotted names of the fields whose values prevent one program from training both runs."""
    drawn = one.model.init == "random"  # the whole base is initialized from the seed
    traced = tuple(f"method.{option}:" for option in one.method.traced_options)
    free = (*PER_MEMBER, *traced, *(() if drawn else ("seed:",)))
    lines = configs.differences(one, configs.to_dict(other))
    names = [line.partition(":")[0] for line in lines if not line.startswith(free)]
    if "method.name" in names:  # other methods have other options
        return [*(name for name in names if not name.startswith("method.")), "method.name"]
    return names


def populations(runs: Iterable[RunT], config_of: Callable[[RunT], Config]) -> list[list[RunT]]:
    """The runs in groups that one program can train.

    Args:
      runs: The runs.
      config_of: Returns the config of a run.
    """
    groups: list[list[RunT]] = []
    for run in runs:
        group = next((group for group in groups if not separating_fields(config_of(group[0]), config_of(run))), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return groups


def outline(base: ModelT, method: Method) -> ModelT:
    """The base with the adapters of a method, as shapes."""
    method = method.tokenized(lambda text: [0])  # the tokens do not change any shape
    graph, state = nnx.split(base)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    def attached(state: nnx.State) -> ModelT:
        model: ModelT = nnx.merge(graph, state)
        return attach_unchecked(model, method, "default", rngs=nnx.Rngs(0))

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model: ModelT = nnx.eval_shape(attached, shapes)
    return model


def vary_dropout(model: nnx.Module, paths: Sequence[Path]) -> None:
    """Turn the dropout rates at some paths into variables, in place.

    In a model without any dropout, these modules also get keys; at rate 0 they drop nothing. A rate of 0 in a model with
    other dropout, such as that of its base, stays as it is: an additional key would change the other masks. Such a model
    has a different structure.
    """
    dropouts = _dropouts(model)
    without = all(module.key is None for module in dropouts.values())
    for path in paths:
        if without or dropouts[path].rate:
            dropouts[path].vary()


def _dropouts(model: nnx.Module) -> dict[Path, Dropout]:
    return {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Dropout)}


def structure(model: nnx.Module) -> nnx.GraphDef:
    """The structure that models must share to be trained by one program: everything but array values and adapter ranks."""
    view = active_view(model)
    for site in sites(view):
        for name in site.module.adapters.active:
            adapter = site.module.adapters.adapter(name)
            if isinstance(adapter, RankedAdapter):
                adapter.ranks = (1,) * len(adapter.ranks)
    graph: nnx.GraphDef = nnx.split(view)[0]
    return graph


def unite(one: ModelT, other: nnx.Module) -> ModelT | None:
    """The first model with the adapters that only the second one has; None if one program cannot train both.

    The models have the same base and an adapter of the same name. The result shares their variables.
    """
    united: ModelT = nnx.merge(*nnx.split(one))
    added = nnx.merge(*nnx.split(other))
    for site, counterpart in zip(sites(united), sites(added), strict=True):
        mine, theirs = site.module.adapters, counterpart.module.adapters
        for slot, source in ((mine, theirs), (theirs, mine)):
            if not slot.names() and all(source.adapter(name).zero_is_identity for name in source.names()):
                for name in source.names():
                    slot.add(name, source.adapter(name))
                slot.active = source.active
    return united if structure(united) == structure(added) else None


def group_runs(
    runs: Iterable[RunT], method_of: Callable[[RunT], Method], make: Callable[[RunT], Model]
) -> tuple[list[tuple[Model, list[RunT]]], list[Path]]:
    """Group runs by what one program can train.

    Args:
      runs: Runs with the same base, which differ only in fields that `separating_fields` allows.
      method_of: Returns the method of a run, with all its options.
      make: Makes the model of a run, as shapes. It is called once for each method.

    Returns:
      For each group, a model with the adapters of all its runs, as shapes, and the runs. Each leaf is as large as in the run
      where it is largest. And the paths of the dropout modules whose rates differ between runs; see `vary_dropout`.
    """
    by_method: dict[Method, list[RunT]] = {}
    for run in runs:
        by_method.setdefault(method_of(run), []).append(run)
    models = [make(alike[0]) for alike in by_method.values()]
    dropout = _varied_dropout(models)
    groups: list[tuple[Model, list[RunT]]] = []
    for model, alike in zip(models, by_method.values(), strict=True):
        vary_dropout(model, dropout)
        for place, (one, members) in enumerate(groups):
            if (united := unite(one, model)) is not None:
                _widen(united, model)
                groups[place] = united, [*members, *alike]
                break
        else:
            groups.append((model, alike))
    return groups, dropout


def _varied_dropout(models: Sequence[nnx.Module]) -> list[Path]:
    """The paths of the dropout modules whose rates differ between models."""
    dropouts = [_dropouts(model) for model in models]
    return [
        path
        for path in dropouts[0]
        if all(path in own for own in dropouts) and len({own[path].rate for own in dropouts}) > 1
    ]


def _widen(model: Model, other: Model) -> None:
    """Give each leaf that came with a method the larger of its sizes in both models, in place."""
    leaves, others = variables.flat(model)[1], variables.flat(other)[1]
    for path, leaf in leaves.items():
        if path in others and type(leaf) is not nnx.Param:
            leaf.set_value(variables.widest(leaf.get_value(), others[path].get_value()))
    variables.update(model, {path: leaf.get_value() for path, leaf in leaves.items()})
