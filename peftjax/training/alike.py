"""What may differ between the members of a population, and models of one structure for them.

One program trains all members. Whatever differs between them must therefore be an input of the program, such as an array of
the model, or belong to the update, which is separate for each member. Arrays may differ in shape if padding them with zeros
has no effect, as in the rank axis of LoRA. An adapter may be missing if it has no effect when all of its arrays are zero.
"""

from collections.abc import Sequence
from typing import TypeVar

from flax import nnx

from peftjax.adapters import active_view
from peftjax.adapters.ranks import RankedAdapter
from peftjax.adapters.sites import sites
from peftjax.nn.dropout import Dropout
from peftjax.tasks import TASKS
from peftjax.training import config as configs
from peftjax.training.config import Config

ModelT = TypeVar("ModelT", bound=nnx.Module)

# Fields that only affect the update, or when a member is evaluated, saved and finished, or where it is logged.
# `Method.traced_options` adds others.
PER_MEMBER = ("optim.", "train.steps:", "train.eval_every:", "checkpoint.every:", "log.")


def separating_fields(one: Config, other: Config) -> list[str]:
    """The dotted names of the fields whose values prevent one program from training both runs."""
    # Whether a part of the base is initialized from the seed.
    drawn = TASKS[one.task.kind].head is not None or one.model.init == "random"
    traced = tuple(f"method.{option}:" for option in one.method.traced_options)
    free = (*PER_MEMBER, *traced, *(() if drawn else ("seed:",)))
    lines = configs.differences(one, configs.to_dict(other))
    return [line.partition(":")[0] for line in lines if not line.startswith(free)]


def align_dropout(models: Sequence[nnx.Module]) -> None:
    """Turn the dropout rates that differ between models into variables, in place.

    In a model without any dropout, these modules also get keys; at rate 0 they drop nothing. A rate of 0 in a model with
    other dropout, such as that of its base, stays as it is: an additional key would change the other masks. Such a model
    has a different structure.
    """
    found = [dict(nnx.iter_modules(model)) for model in models]
    dropouts = [{path: module for path, module in own.items() if isinstance(module, Dropout)} for own in found]
    varied = [
        path
        for path in dropouts[0]
        if all(path in own for own in dropouts) and len({own[path].rate for own in dropouts}) > 1
    ]
    for own in dropouts:
        without = all(module.key is None for module in own.values())
        for path in varied:
            if without or own[path].rate:
                own[path].vary()


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
