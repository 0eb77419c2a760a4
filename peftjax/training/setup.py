"""Setting up a run: the workdir, the data, and the method attached to the base model.

Mistakes in the workdir, the config and the data are reported before a model is loaded.
"""

import contextlib
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import adapters, sharding
from peftjax.adapters.method import Method
from peftjax.core import distributed, free_fields, variables
from peftjax.core.errors import UserError
from peftjax.core.fingerprint import fingerprint
from peftjax.data.batches import Batches, Batching, HeldOut, train_batches
from peftjax.data.token_rows import check_token_rows
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_config import stored_quantization
from peftjax.io.hf_files import find_model
from peftjax.io.json_files import read_json
from peftjax.io.load import load_kernels
from peftjax.io.save import MARK
from peftjax.models import family
from peftjax.models.base import Model
from peftjax.nn.attention_kernels import SPLASH_BLOCK
from peftjax.tasks import Task, make_task
from peftjax.trackers import check_installed
from peftjax.training import config as configs
from peftjax.training import duration, moved, precision, start_from
from peftjax.training.abstract import abstract_model, abstract_step
from peftjax.training.config import Config
from peftjax.training.hooks import NO_HOOKS, Hooks
from peftjax.training.memory import check_batch, check_step

# Fields that may change when a run resumes: those without an effect on its results, mesh., which affects only their rounding,
# and when to stop and what to export.
FREE = (*free_fields.FREE, "mesh.", "train.patience:", "checkpoint.export:")
# Those that may change when train.steps is raised: the schedules then span the new number of steps.
FREE_LONGER = (*FREE, "train.steps:", "optim.warmup_steps:", "method.total_steps:")
PER_PROCESS = ("data.workers:", "data.tfds_data_dir:")  # fields that may differ between the processes of a run


def open_checkpoints(config: Config, workdir: Path) -> Checkpoints:
    """The checkpoints of the run in a workdir."""
    return Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)


def resolve_config(
    config: Config, task: Task, data: Batches, workdir: Path, checkpoints: Checkpoints
) -> tuple[Config, Path | None]:
    """The config that is written to the workdir: with all lengths in steps, a dtype, and all options of the method.

    Returns:
      The config, and the directory of the adapter to start from; see `start_from.resolve_options`.

    Raises:
      UserError: A length is in epochs and the data has none; the workdir holds another run, see `check_workdir`; or the
        adapter to start from does not fit, see `start_from.resolve_options`.
    """
    rows = partial(duration.rows_of_epoch, config, task, data)
    config = complete_config(config, checkpoints, rows, lambda: task.hf_config)
    check_workdir(config, workdir, checkpoints)
    return start_from.resolve_options(config, workdir, checkpoints)


def complete_config(
    config: Config, checkpoints: Checkpoints, rows: Callable[[], int], hf_config: Callable[[], Mapping[str, Any]]
) -> Config:
    """The config with all lengths in steps (`rows`: see `duration.in_steps`) and a dtype, the checkpoints' if there are any."""
    config = duration.in_steps(config, rows)
    if (identity := checkpoints.identity()) is not None:
        return precision.with_stored_dtype(config, identity["config"])
    return precision.resolve_dtype(config, hf_config())


def check_workdir(config: Config, workdir: Path, checkpoints: Checkpoints) -> None:
    """Check that a config, whose lengths are in steps, matches the run in the workdir, if there is one.

    train.steps may be higher than before, which extends the run.

    Raises:
      UserError: The workdir holds a run with another configuration, or the result of a run whose checkpoints were deleted.
    """
    if (identity := checkpoints.identity()) is not None:
        differ = _differing(config, moved.relocated(identity, workdir))
        raise_if_different(workdir, differ + moved.changed_records(identity, config, workdir))
    elif checkpoints.latest_step() is None:
        distributed.on_first(lambda: _refuse_to_replace_result(config, workdir))


def _differing(config: Config, stored: Mapping[str, Any]) -> list[str]:
    """The fields in which a config differs from an earlier run's but must not."""
    free = FREE_LONGER if config.train.steps > stored["train"]["steps"] else FREE
    config = precision.with_stored_dtype(config, stored)
    lines = configs.differences(start_from.with_stored_options(config, stored), stored)
    if any(line.startswith("method.name:") for line in lines):  # other methods have other options
        lines = [line for line in lines if not line.startswith("method.") or line.startswith("method.name:")]
    return [line for line in lines if not line.startswith(free)]


def _refuse_to_replace_result(config: Config, workdir: Path) -> None:
    """Raises a UserError if a finished run, or one with another configuration, has left its result and no checkpoint."""
    result = next((path for name in ("adapter", "model") if (path := workdir / name).exists()), None)
    if result is None:
        return
    stored = read_json(workdir / "config.json") if (workdir / "config.json").exists() else {}
    same = "train" in stored and not _differing(config, stored)
    if not same or (workdir / "report.html").exists():
        raise UserError(
            f"--workdir={workdir} holds the result of a run, {result}, but no checkpoint to resume from; training would "
            "replace the result. Choose another workdir, or delete this one to start again"
        )


def raise_if_different(workdir: Path, differ: list[str]) -> None:
    """Raises a UserError that names the differences from the run in the workdir, if there are any."""
    if differ:
        raise UserError(
            f"--workdir={workdir} holds a run with another configuration: {'; '.join(differ)}. Choose another workdir, "
            "or delete this one to start again"
        )


def check_same_configs(given: Mapping[str, Config]) -> None:
    """Check that every process has the same configs, by the names of their runs.

    Otherwise each process would go through the steps of another run, without an error.

    Raises:
      UserError: They differ; it is raised in every process.
    """

    def differences(there: Mapping[str, Any]) -> str:
        if list(there) != list(given):
            return f"{', '.join(given)} here, {', '.join(there)} there"
        lines = [line for name, config in given.items() for line in configs.differences(config, there[name])]
        return "; ".join(line for line in dict.fromkeys(lines) if not line.startswith(PER_PROCESS))

    values = {name: json.loads(configs.to_json(config)) for name, config in given.items()}
    distributed.check_same("the configs", values, differences)


def check_same_data(name: str, sources: Sequence[Sequence[Any]], counts: Mapping[str, int]) -> None:
    """Check that every process reads the same records.

    Args:
      name: The field of the config, such as "data.train".
      sources: The name and the number of records of each source.
      counts: What was counted in the first batches.

    Raises:
      UserError: The sources or the counts differ; it is raised in every process.
    """

    def differences(there: Mapping[str, Any]) -> str:
        ours, theirs = (dict(map(tuple, each)) for each in (sources, there["sources"]))
        found = [
            f"{source}: {ours.get(source, 0):,} records here, {theirs.get(source, 0):,} there"
            for source in ours | theirs
            if ours.get(source) != theirs.get(source)
        ]
        return "; ".join(found) or ("the first batches have other records" if counts != there["counts"] else "")

    value = {"sources": [list(source) for source in sources], "counts": dict(counts)}
    distributed.check_same(f"the records in {name}", value, differences)


def open_data(config: Config, mesh: Mesh) -> tuple[Task, Batches]:
    """The task and its training batches. `check_fit` opens the held-out data.

    Raises:
      UserError: The model directory lacks what the task needs, a batch does not fit the memory, or the data cannot be read.
    """
    directory = find_model(config.model.path, config.model.revision)
    task = make_task(config.task, config.data, directory, config.train.loss_chunk)
    share = batching(config, mesh)
    check_batch(config, task, share.size * len(share.own) // share.parts)
    return task, train_batches(config.data, task, share, config.seed)


def check_fit(config: Config, task: Task, data: Batches, mesh: Mesh, hooks: Hooks = NO_HOOKS) -> None:
    """Check everything that follows from config.json, the config and the first records, before any weights are read.

    The model and its adapters are built as shapes. The first batches of the training data and the first batch of the held-out
    data are read, which fails if a record is invalid or no record has a loss. `hooks` may have a loaded base model and an
    optimizer.

    Raises:
      UserError: The model does not support the task, the options of the method do not fit it, examples are too long for
        it, a token has no row in its embedding, the attention kernel does not support the batch, a step cannot fit the
        memory, the data cannot be read, or it has nothing to learn from; or a tracker is not installed.
    """
    distributed.on_first(lambda: check_installed(config.log.trackers))
    model = abstract_run(config, task)
    task.accept(hooks.model or model, config.model.path)
    task.check_lengths(model, mesh)

    def check(*, trace: bool) -> None:
        with jax.set_mesh(mesh):
            step, arguments = abstract_step(config, task, model, mesh, hooks.optimizer, data.row)
            check_step(config, task, model, mesh, step, arguments)
            if trace:
                step.trace(*arguments)

    check(trace=config.model.attention not in ("xla", "auto"))  # a kernel that supports one length supports all of them
    data.preview(config.train.steps)
    check_same_data("data.train", data.sources, data.previewed)
    check(trace=False)  # again, as the first batches are longer than the shortest possible ones
    if config.data.eval:
        check_held_out(config, task, mesh)


def abstract_run(config: Config, task: Task) -> Model:
    """The model that a run trains, as shapes; see `abstract_model`."""
    fields = {name: value for name, value in task.hf_config.items() if name not in MARK}
    if task.head is not None and not family(fields).heads:
        raise UserError(
            f"model.path={config.model.path!r} does not support task.kind={config.task.kind!r}: a model of type "
            f"{fields['model_type']!r} has no task head to choose; only encoders do"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about config.json are given when the weights are read
        return abstract_model(config, task, fields | {"quantization_config": stored_quantization(task.directory)})


def check_held_out(config: Config, task: Task, mesh: Mesh) -> None:
    """Check the first held-out batch and the prompts to answer, before any weights are read."""
    held_out = HeldOut(config.data, task)
    with contextlib.closing(held_out.batches(batching(config, mesh))) as batches:
        next(batches)
        check_same_data("data.eval", batches.sources, batches.summary())
    if count := config.eval.exact_match or config.eval.samples:
        for prompt in held_out.prompts(count):
            check_token_rows(prompt.tokens, task.embedding_rows, task.tokenizer, prompt.record)


def batching(config: Config, mesh: Mesh) -> Batching:
    """How rows are divided among processes, and the multiple that the mesh and the attention kernel require of lengths."""
    multiple = mesh.shape["sequence"] * (SPLASH_BLOCK if config.model.attention == "splash" else 1)
    return Batching(config.train.batch_size, config.train.accumulate, multiple=multiple, **sharding.batch_share(mesh))


def attach_method(config: Config, task: Task, model: Model, mesh: Mesh, source: Path | None = None) -> Method:
    """Attach the method of a config, from `resolve_config`, to a base model on a mesh; returns it with its texts tokenized.

    `source` is the directory of an adapter that gives the initial values; None: new ones.

    Raises:
      UserError: The options do not fit the model, a token of method.text has no row in its embedding, examples with virtual
        tokens are too long for it, or the adapter in `source` cannot be loaded.
    """

    def encode(text: str) -> list[int]:
        ids = task.tokenizer.encode(text)
        check_token_rows(ids, model.embedding_rows, task.tokenizer, f"method.text={text!r}")
        return ids

    method, rngs = config.method.tokenized(encode), nnx.Rngs(config.seed)
    if source is not None:
        method = start_from.attach_trained(model, method, source, rngs)
    else:
        adapters.attach(
            model,
            method,
            rngs=rngs,
            batches=_first_batches(config, task, method, mesh) if method.data else None,
            kernels=load_kernels(task.directory, model) if method.unquantized else None,
        )
    task.check_lengths(model, mesh)
    sharding.place(model, mesh)
    return method


def _first_batches(config: Config, task: Task, method: Method, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """The first training batches, [B, ...], from which the method is initialized."""
    batches = train_batches(config.data, task, batching(config, mesh), config.seed)
    shown = (sharding.shard_batch(batch.arrays, mesh) for batch in batches)
    return ({key: value[0] for key, value in batch.items()} for batch in itertools.islice(shown, method.data))


def base_fingerprint(model: Model) -> str:
    """The fingerprint of a base model, before adapters are attached."""
    return fingerprint({path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()})
