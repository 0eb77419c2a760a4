"""How good a model is on held-out records: loss and perplexity, the scores of its kind of task, those of its answers."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from peftjax import losses, sharding
from peftjax.core import variables
from peftjax.decoding import generate
from peftjax.losses import Totals
from peftjax.tasks import base as tasks
from peftjax.tasks import metrics as scores
from peftjax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Answer:
    """A held-out prompt, what it should be answered by, and what the model answered."""

    record: str
    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the two answers are the same text, but for spaces around it."""
        return scores.same(self.answer, self.expected)

    def told(self, scored: bool) -> str:
        """A line for people; scored: with a verdict."""
        verdict = ("right  " if self.correct else "wrong  ") if scored else ""
        return f"{verdict}{self.prompt!r} -> {self.answer!r}, expected {self.expected!r}"


class Outputs(NamedTuple):
    """What an evaluation step gives: the sums of the loss, and of labelled examples logits, labels and loss_weights."""

    totals: Totals
    labelled: tuple[jax.Array, jax.Array, jax.Array] | None


def make_eval_step(graph: nnx.GraphDef, task: Task, chunk: int, mesh: Mesh) -> Callable[..., Outputs]:
    """A jitted function (trainable, frozen, batch [1, B, ...]) -> Outputs, whole on every device, of a model in evaluation."""
    everywhere = sharding.spec((), (), mesh)

    @partial(jax.jit, out_shardings=everywhere, compiler_options=sharding.compiler_options(mesh))
    def eval_step(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> Outputs:
        model = variables.join(graph, trainable, frozen)
        batch = {name: value[0] for name, value in batch.items()}
        if task.score is None:
            return Outputs(task.totals(chunk)(model, batch), None)
        logits = losses.outputs(model, batch).astype(jnp.float32)
        return Outputs(task.loss(logits, batch), (logits, batch["labels"], batch["loss_weights"]))

    return eval_step


def held_out_scores(
    eval_step: Callable[..., Outputs], task: Task, trainable: Any, frozen: Any, batches: Iterable[Any], mesh: Mesh
) -> dict[str, float]:
    """The mean loss, and of a model that writes text its perplexity and the share of tokens that are the most likely one
    (loss in nats a token), of another the scores of its task.

    Raises:
        ValueError: the batches hold nothing with a loss.
    """
    sums, labelled = np.zeros(3), []
    for batch in batches:
        outputs = jax.device_get(eval_step(trainable, frozen, sharding.shard_batch(batch.arrays, mesh)))
        sums += np.array(outputs.totals, float)
        if outputs.labelled is not None:
            logits, labels, weights = outputs.labelled
            labelled.append((logits[weights > 0], labels[weights > 0]))
    loss, tokens, correct = sums
    if tokens == 0:
        raise ValueError("data.eval: the held-out records have nothing with a loss")
    if task.score is None:
        perplexity = math.exp(min(loss / tokens, 700.0))
        return {
            "eval_loss": loss / tokens,
            "perplexity": perplexity,
            "token_accuracy": correct / tokens,
            "eval_tokens": tokens,
        }
    logits, labels = (np.concatenate(parts) for parts in zip(*labelled, strict=True))
    return {"eval_loss": loss / tokens} | task.score(logits, labels) | {"eval_labels": tokens}


def answer(
    model: Any, examples: Iterable[Any], tokenizer: Any, max_new_tokens: int, batch_size: int = 64
) -> list[Answer]:
    """The model's greedy answers to held-out prompts, `batch_size` at a time."""
    examples, answers = list(examples), []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        filled = part + [part[-1]] * (min(batch_size, len(examples)) - len(part))  # one batch shape, one compilation
        outputs = generate(
            model, [example.tokens for example in filled], max_new_tokens=max_new_tokens, stop=tokenizer.eos_ids
        )
        for example, output in zip(part, outputs, strict=False):
            answers.append(Answer(example.record, example.prompt, example.expected, tokenizer.decode(output)))
    return answers


def answer_scores(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, float]:
    """The scores `names` of generated answers, and how many there are."""
    found = scores.of_answers([item.answer for item in answers], [item.expected for item in answers], names)
    return found | {"prompts": len(answers)}


def load_trained(config: Any, workdir: Path, mesh: Mesh) -> tuple[Any, Any]:
    """The model as a finished run left it in its workdir, on the mesh, and the `Rows` of its task.

    Raises:
        ValueError: the run has not finished.
    """
    from peftjax.data.rows import load_rows
    from peftjax.io.hf_adapter import load_adapter
    from peftjax.io.hf_files import resolve

    full = config.method.name == "full"
    result = workdir / ("model" if full else "adapter")
    if not result.is_dir():
        raise ValueError(f"{result} is not there: has this run finished? python -m peftjax.train writes it at the end")
    base = resolve(config.model.path, config.model.revision)
    rows = load_rows(config, base)
    if full:
        config.model.new_head = False  # it is there by now
    model = tasks.load_base(config, result if full else base, rows.labels, mesh)
    if not full:
        load_adapter(model, result)
    sharding.place(model, mesh)
    return model, rows


def measure(config: Any, model: Any, rows: Any, mesh: Mesh) -> dict[str, float]:
    """The `held_out_scores` of a model on config.data.eval."""
    from peftjax.data.batches import eval_batches

    graph, found = variables.flat(model)
    values = {path: variable.get_value() for path, variable in found.items()}
    task = tasks.of(config)
    eval_step = make_eval_step(graph, task, config.train.loss_chunk, mesh)
    batches = eval_batches(config, rows, **sharding.batch_share(mesh))
    return held_out_scores(eval_step, task, {}, values, batches, mesh)
