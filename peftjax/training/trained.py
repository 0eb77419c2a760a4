"""Trained models: of the run in a workdir, with its config, or of an adapter directory on the base model of a config."""

import dataclasses
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some
from peftjax.core.paths import suggest
from peftjax.core.progress import EVALUATING, Progress
from peftjax.core.workdir import is_run
from peftjax.data.batches import HeldOut
from peftjax.data.config import CONVERSATIONS
from peftjax.io.adapter_base import recorded_name
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_method import read_method
from peftjax.io.adapter_tensors import CONFIG as ADAPTER_CONFIG
from peftjax.io.hf_files import find_model
from peftjax.io.json_files import read_json, read_json_if_any
from peftjax.io.model_card import hub_id
from peftjax.log import METRICS, read_metrics
from peftjax.models.base import Model
from peftjax.models.kernels import use_kernel
from peftjax.tasks import TASKS, Task, make_task
from peftjax.tasks.best import out_of_patience
from peftjax.tasks.prompt_format import read_chat_template
from peftjax.training import config as configs
from peftjax.training import moved, precision
from peftjax.training.config import Config
from peftjax.training.evaluation import counted, evaluate, make_eval_step
from peftjax.training.setup import batching

CONFIG = "config.json"  # the resolved config, in the workdir


def run_config(workdir: Path, file: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """The config of the run in a workdir, with overrides, strings "--config.optim.learning_rate=1e-3".

    `file` is a config file to use instead of the run's config.json. There, model.dtype="auto" means the dtype of the run.

    Raises:
        UserError: The directory does not hold a run, or the config is invalid.
    """
    if file is not None:
        config = configs.load(file, overrides)
        stored = _stored(workdir)
        return precision.with_stored_dtype(config, stored) if stored else config
    if not is_run(workdir):
        raise UserError(f"--workdir={workdir}: {_why_not(workdir)}")
    return moved.with_own_records(configs.load(workdir / CONFIG, overrides), workdir)


def _stored(workdir: Path) -> dict[str, Any]:
    """The run's config.json; empty if there is none."""
    return read_json_if_any(workdir / CONFIG) if is_run(workdir) else {}


def _why_not(workdir: Path) -> str:
    """Why a directory is not the workdir of a run, and what to give instead."""
    if workdir.is_file():
        return "this is a file; give the workdir of a run of peftjax train"
    if not workdir.is_dir():
        near = [path.name for path in workdir.parent.glob("*") if path.is_dir()]
        return f"no such directory.{suggest(workdir.name, near)} Give the workdir of a run of peftjax train"
    if runs := sorted(path.name for path in workdir.iterdir() if path.is_dir() and is_run(path)):
        return f"this directory holds several runs; give one of them: {enumerate_some(runs, 6)}"
    there = sorted(path.name for path in workdir.iterdir())
    return f"not the workdir of a run; it holds {enumerate_some(there, 6) or 'no files'}. peftjax train writes {CONFIG} there"


def result_of(config: Config, workdir: Path) -> Path:
    """The directory of the trained adapter, or in full fine-tuning of the model.

    Before the end of the training, this may be the adapter of its newest checkpoint (checkpoint.adapter), with a warning.

    Raises:
        UserError: There is none yet.
    """
    result = workdir / ("model" if config.method.trains_base else "adapter")
    saved = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    newest = max(saved, default=0)
    steps = _stored(workdir).get("train", {}).get("steps", config.train.steps)  # in a config file, they may be epochs
    if not result.is_dir():
        so_far = f"; its newest checkpoint is from step {newest} of {steps}" if newest else ""
        raise UserError(
            f"{result} not found: training has not finished{so_far}. Run peftjax train again to finish it; with "
            "checkpoint.adapter=True it also writes the adapter with every checkpoint"
        )
    if 0 < newest < steps and not stopped_early(config, workdir, newest):
        warnings.warn(
            f"--workdir={workdir}: training has not finished; this is the result of step {newest} of {steps}",
            stacklevel=2,
        )
    return result


def stopped_early(config: Config, workdir: Path, step: int) -> bool:
    """Whether the run in a workdir had run out of patience (train.patience) after a step."""
    if not config.train.patience or not (workdir / METRICS).exists():
        return False
    lines = read_metrics(workdir / METRICS, last=step)
    return out_of_patience(lines, config.checkpoint.best_score, config.train.patience)


def open_task(config: Config) -> Task:
    """The task of a config, with the tokenizer of its base model."""
    return make_task(
        config.task, config.data, find_model(config.model.path, config.model.revision), config.train.loss_chunk
    )


def load_trained(config: Config, task: Task, result: Path, mesh: Mesh) -> Model:
    """The trained model on the mesh, in evaluation mode; `result` is the directory of its adapter or model, from `result_of`."""
    if not config.method.trains_base:
        return load_adapted(config, task, result, mesh)
    options = dataclasses.replace(config.model, new_head=False)  # the head was saved with the model
    return _placed(task.load_model(options, result, mesh, config.seed), config, mesh)


def load_adapted(config: Config, task: Task, adapter: Path | None, mesh: Mesh) -> Model:
    """The base model of a config with the adapter in a directory, or alone, on the mesh, in evaluation mode."""
    model = task.load_model(config.model, task.directory, mesh, config.seed)
    if adapter is not None:
        load_adapter(model, adapter)
    return _placed(model, config, mesh)


def check_adapter(adapter: Path, config: Config, task: Task) -> None:
    """Check what an adapter_config.json says, before any weights are read; warn if it names another base on the hub.

    Raises:
        UserError: The directory holds no adapter, one of an unknown method, or one for another task type.
    """
    read_method(adapter)
    theirs = read_json(adapter / ADAPTER_CONFIG).get("task_type")
    if theirs != task.card_task and (fitting := [kind for kind, each in TASKS.items() if each.card_task == theirs]):
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: task_type {theirs!r} does not fit task.kind={config.task.kind!r}; give another adapter, "
            f"or set task.kind={' or '.join(map(repr, fitting))}"
        )
    base, path = recorded_name(adapter), config.model.path
    if base is not None and base.name != path and hub_id(base.name) and hub_id(path):
        warnings.warn(f"{adapter} names the base model {base.name}, and is used on model.path={path!r}", stacklevel=2)


def with_chat_template(config: Config, adapter: Path) -> Config:
    """The config with the chat template that an adapter was trained with, unless it has one itself or no conversations."""
    if config.data.chat_template or config.data.format not in CONVERSATIONS:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template=read_chat_template(adapter)))


def _placed(model: Model, config: Config, mesh: Mesh) -> Model:
    """The model with all its parameters on the mesh, and an attention kernel of this machine."""
    sharding.place(model, mesh)
    # A kernel that the run computed with may not exist on this machine.
    kernel = "xla" if config.model.attention == "xla" else "auto"
    use_kernel(model, kernel, mesh.devices.flat[0].platform)
    return model


def held_out_scores(
    config: Config, model: Model, task: Task, mesh: Mesh, progress: Progress | None = None
) -> dict[str, float]:
    """The metrics of a model on data.eval."""
    graph, found = variables.flat(model)
    values = {path: variable.get_value() for path, variable in found.items()}
    batches = HeldOut(config.data, task).batches(batching(config, mesh))
    progress = progress or Progress(enabled=False)
    with progress.phase(EVALUATING):
        return evaluate(make_eval_step(graph, task, mesh), task, {}, values, counted(batches, 0, progress), mesh).scores
