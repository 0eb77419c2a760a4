"""The differences that members of a population may have, and a model whose structure fits all of them.

One program trains all members. Whatever differs between them must therefore be an input of the program, such as an array of
the model, or belong to the update, which is separate for each member. Arrays may differ in shape if padding them with zeros
has no effect, as in the rank axis of LoRA. An adapter may be missing if it has no effect when all of its arrays are zero
(`MethodAdapter.zero_is_identity`).
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from flax import nnx

from peftjax.adapters import Method, active_view
from peftjax.adapters.adapter import MethodAdapter
from peftjax.adapters.sites import sites
from peftjax.core import variables
from peftjax.models.base import Model
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.varied import Varied, find_varied

ModelT = TypeVar("ModelT", bound=nnx.Module)
RunT = TypeVar("RunT")

# Fields that only affect the update, or when a member is evaluated, saved and finished, or where it is logged.
# `Method.traced_options` adds others.
PER_MEMBER = ("optim.", "train.steps:", "train.eval_every:", "train.patience:", "checkpoint.", "log.")


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
    """The runs in groups that one program can train. `config_of` returns the config of a run."""
    groups: list[list[RunT]] = []
    for run in runs:
        for group in groups:
            if not separating_fields(config_of(group[0]), config_of(run)):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def structure(model: nnx.Module) -> nnx.GraphDef:
    """The structure that models must share to be trained by one program.

    It has no array values, and does not depend on the layers and ranks of adapters that may be missing.
    """
    view = active_view(model)
    for adapter in _active_adapters(view).values():
        if adapter.zero_is_identity:
            adapter.forget_layers()
    graph: nnx.GraphDef = nnx.split(view)[0]
    return graph


def unite(one: ModelT, other: nnx.Module) -> ModelT | None:
    """The first model with the adapters that only the second one has; None if one program cannot train both.

    The models have the same base and an adapter of the same name. The result shares their variables.
    """
    united = _with_adapters(one, other)
    return united if structure(united) == structure(_with_adapters(other, one)) else None


def _with_adapters(model: ModelT, other: nnx.Module) -> ModelT:
    """A copy of a model that also has the adapters of another one, in slots where it has none."""
    united: ModelT = nnx.merge(*nnx.split(model))
    copy = nnx.merge(*nnx.split(other))
    for site, counterpart in zip(sites(united), sites(copy), strict=True):
        slot, source = site.module.adapters, counterpart.module.adapters
        if not slot.names() and all(source.adapter(name).zero_is_identity for name in source.names()):
            for name in source.names():
                slot.add(name, source.adapter(name))
            slot.active = source.active
    shared: dict[str, nnx.Variable] = {}
    for _, adapter, leaf in _shared_leaves(united):
        setattr(adapter, leaf, shared.setdefault(leaf, vars(adapter)[leaf]))
    return united


def _active_adapters(model: nnx.Module) -> dict[str, MethodAdapter]:
    """The active adapters by path."""
    slots = [(site.path, site.module.adapters) for site in sites(model)]
    return {f"{path}.adapters.{name}": slot.adapter(name) for path, slot in slots for name in slot.active}


def _shared_leaves(model: nnx.Module) -> list[tuple[str, MethodAdapter, str]]:
    """The leaves that all layers share, such as the projections of VeRA: path, adapter and attribute in each layer."""
    return [
        (variables.dotted((path, *inside, leaf)), part, leaf)
        for path, adapter in _active_adapters(model).items()
        for inside, part in nnx.iter_modules(adapter)  # the adapter itself, or the parts of a `Joint`
        if isinstance(part, MethodAdapter) and part.zero_is_identity
        for leaf in {stored.leaf for stored in part.hf_shared().values()}
    ]


def shared_paths(model: nnx.Module) -> dict[str, str]:
    """The path in the flat tree of a model of each leaf that layers share, by all the paths that it can have.

    It is the path in the first layer with the adapter. A model with adapters in other layers has another path.
    """
    leaves = variables.flat(model)[1]
    paths: dict[str, list[str]] = {}
    for path, _, leaf in _shared_leaves(model):
        paths.setdefault(leaf, []).append(path)
    return {path: next(filter(leaves.__contains__, same)) for same in paths.values() for path in same}


def group_runs(
    runs: Iterable[RunT], method_of: Callable[[RunT], Method], make: Callable[[RunT], Model]
) -> tuple[list[tuple[Model, list[RunT]]], Varied]:
    """Group runs by what one program can train.

    Args:
      runs: Runs with the same base, which differ only in fields that `separating_fields` allows.
      method_of: Returns the method of a run, with all its options.
      make: Makes the model of a run, as shapes. It is called once for each method.

    Returns:
      The groups, and the differences between runs that models hold in variables. A group is a model with the adapters of all
      its runs, as shapes, and the runs. Each leaf is as large as in the run where it is largest.
    """
    by_method: dict[Method, list[RunT]] = {}
    for run in runs:
        by_method.setdefault(method_of(run), []).append(run)
    models = [make(alike[0]) for alike in by_method.values()]
    varied = find_varied(models, ranks_from_data=any(method.data for method in by_method))
    groups: list[tuple[Model, list[RunT]]] = []
    for model, alike in zip(models, by_method.values(), strict=True):
        varied.hold(model)
        for place, (one, members) in enumerate(groups):
            if (united := unite(one, model)) is not None:
                _widen(united, one, model)
                groups[place] = united, [*members, *alike]
                break
        else:
            groups.append((model, alike))
    return groups, varied


def _widen(model: Model, *others: Model) -> None:
    """Enlarge each leaf that came with a method to the largest of its sizes in some models, in place."""
    leaves, names = variables.flat(model)[1], shared_paths(model)
    for other in others:
        for path, same in variables.renamed(variables.flat(other)[1], names).items():
            if type(same) is not nnx.Param:
                leaves[path].set_value(variables.widest(leaves[path].get_value(), same.get_value()))
    variables.update(model, {path: leaf.get_value() for path, leaf in leaves.items()})
