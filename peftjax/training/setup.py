"""Setting up a run: the data, and the method attached to the base model.

Mistakes in the config and the data are reported before a model is loaded.
"""

import contextlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import adapters, sharding
from peftjax.adapters.method import Method
from peftjax.core import distributed, variables
from peftjax.core.errors import UserError
from peftjax.core.fingerprint import fingerprint
from peftjax.data.batches import Batches, Batching, HeldOut, train_batches
from peftjax.data.token_rows import check_token_rows
from peftjax.io.hf_config import stored_quantization
from peftjax.io.hf_files import find_model
from peftjax.io.load import load_kernels
from peftjax.io.save import SAVED_BY
from peftjax.models import family
from peftjax.models.base import Model
from peftjax.nn.attention_kernels import SPLASH_BLOCK
from peftjax.tasks import Task, make_task
from peftjax.trackers import check_installed
from peftjax.training import start_from
from peftjax.training.abstract import abstract_model, abstract_step
from peftjax.training.agreement import check_same_data
from peftjax.training.config import Config
from peftjax.training.hooks import NO_HOOKS, Hooks
from peftjax.training.memory import check_batch, check_step


def open_data(config: Config, mesh: Mesh) -> tuple[Task, Batches]:
    """The task and its training batches. `check_fit` opens the held-out data.

    Raises:
        UserError: The model directory lacks what the task needs, a batch does not fit the memory, or the data cannot be
            read.
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
        UserError: The model does not support the task, the options of the method do not fit it, examples are too long
            for it, a token has no row in its embedding, the attention kernel does not support the batch, a step cannot
            fit the memory, the data cannot be read, or it has nothing to learn from; or a tracker is not installed.
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
    fields = {name: value for name, value in task.hf_config.items() if name not in SAVED_BY}
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
        UserError: The options do not fit the model, a token of method.text has no row in its embedding, examples with
            virtual tokens are too long for it, or the adapter in `source` cannot be loaded.
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
