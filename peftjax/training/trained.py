"""The model that a finished run left in its workdir."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.progress import EVALUATING, Progress
from peftjax.data.batches import eval_batches
from peftjax.io.adapter_load import load_adapter
from peftjax.io.hf_files import resolve
from peftjax.methods import Full
from peftjax.models.base import Model
from peftjax.tasks import Task, make_task
from peftjax.training.config import Config
from peftjax.training.evaluation import counted, evaluate, make_eval_step
from peftjax.training.setup import batching, check_held_out


def load_trained(config: Config, workdir: Path, mesh: Mesh) -> tuple[Model, Task]:
    """The trained model on the mesh, in evaluation mode, and its task.

    Raises:
      UserError: The run has not finished.
    """
    full = isinstance(config.method, Full)
    result = workdir / ("model" if full else "adapter")
    if not result.is_dir():
        raise UserError(f"{result} not found; has training finished? python -m peftjax.train writes it at the end")
    base = resolve(config.model.path, config.model.revision)
    task = make_task(config.task, config.data, base, config.train.loss_chunk)
    check_held_out(config, task, mesh)
    options = dataclasses.replace(config.model, new_head=config.model.new_head and not full)  # saved with the model
    model = task.load_model(options, result if full else base, mesh, config.seed)
    if not full:
        load_adapter(model, result)
    sharding.place(model, mesh)
    return model, task


def measure(config: Config, model: Model, task: Task, mesh: Mesh, progress: Progress | None = None) -> dict[str, float]:
    """The metrics of a model on data.eval."""
    graph, found = variables.flat(model)
    values = {path: variable.get_value() for path, variable in found.items()}
    batches = eval_batches(config.data, task, batching(config, mesh))
    progress = progress or Progress(enabled=False)
    with progress.phase(EVALUATING):
        return evaluate(make_eval_step(graph, task, mesh), task, {}, values, counted(batches, 0, progress), mesh)
