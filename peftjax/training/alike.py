"""What may differ between the members of a population, and models of one structure for them.

One program trains all members. What differs between them must therefore be traced: an array of the model, or a constant of
the update, which each member has for itself. Arrays may differ in their shapes where zeros at their end have no effect, as
beyond the rank of a LoRA.
"""

from collections.abc import Sequence

from flax import nnx

from peftjax.adapters import active_view
from peftjax.adapters.ranks import RankedAdapter
from peftjax.adapters.sites import sites
from peftjax.nn.dropout import Dropout
from peftjax.tasks import TASKS
from peftjax.training import config as configs
from peftjax.training.config import Config

# Beside the options of the method that are traced: what only the update, or when a member logs, saves and ends, depends on.
OF_EACH = ("optim.", "train.steps:", "train.eval_every:", "checkpoint.every:")


def in_the_way(one: Config, other: Config) -> list[str]:
    """The fields whose values prevent that one program trains both runs, by dotted name."""
    drawn = (
        TASKS[one.task.kind].head is not None or one.model.init == "random"
    )  # a part of the base depends on the seed
    traced = tuple(f"method.{option}:" for option in one.method.traced_options)
    free = (*OF_EACH, *traced, *(() if drawn else ("seed:",)))
    lines = configs.differences(one, configs.to_dict(other))
    return [line.partition(":")[0] for line in lines if not line.startswith(free)]


def align_dropout(models: Sequence[nnx.Module]) -> None:
    """Where the rates of a dropout module differ between models, hold them in variables, in place.

    A model without any dropout gets keys too, which drop nothing at rate 0. One with other dropout, such as that of its
    base, keeps a structure of its own: another key would change the masks that it draws.
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
    """What must be equal in models that one program trains: all but the values and the ranks of their adapters."""
    view = active_view(model)
    for site in sites(view):
        for name in site.module.adapters.active:
            adapter = site.module.adapters.adapter(name)
            if isinstance(adapter, RankedAdapter):
                adapter.ranks = tuple(rank and 1 for rank in adapter.ranks)
    graph: nnx.GraphDef = nnx.split(view)[0]
    return graph
