"""The kinds of task: for each its models, its head, its loss, and what an evaluation makes of the model's outputs."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from peftjax import losses
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.io.load import load_model
from peftjax.io.random_model import make_random
from peftjax.losses import Loss
from peftjax.models.bert import Bert
from peftjax.models.decoder import Decoder
from peftjax.models.t5 import T5
from peftjax.models.vit import Vit
from peftjax.tasks import metrics as scores


@dataclasses.dataclass(frozen=True)
class Task:
    """A kind of task.

    model: the class that learns it. head: of the model, as for `load_model`; None where it has none to choose.
    problem: transformers' problem_type of the head. loss: of (logits, batch); where the model writes text, of (model,
    batch, config.train.loss_chunk). score: of the logits and labels of all held-out examples, {name: score}; None where
    the model writes text.
    """

    model: type
    loss: Callable[..., losses.Totals]
    head: str | None = None
    problem: str | None = None
    score: Callable[..., dict[str, float]] | None = None

    def totals(self, chunk: int) -> Loss:
        """The loss as a function of a model and a batch."""
        if self.score is None:
            return partial(self.loss, chunk=chunk)
        return lambda model, batch: self.loss(losses.outputs(model, batch), batch)


TASKS = {
    "causal_lm": Task(Decoder, losses.next_token_loss),
    "seq2seq": Task(T5, losses.seq2seq_loss),
    "classification": Task(
        Bert,
        losses.classification_loss,
        "sequence_classification",
        "single_label_classification",
        scores.classification,
    ),
    "regression": Task(Bert, losses.regression_loss, "sequence_classification", "regression", scores.regression),
    "token_classification": Task(Bert, losses.classification_loss, "token_classification", score=scores.classification),
    "image_classification": Task(
        Vit, losses.classification_loss, "image_classification", "single_label_classification", scores.classification
    ),
}


def of(config: Any) -> Task:
    """The task of a config."""
    if config.task.multi_label:
        return dataclasses.replace(
            TASKS["classification"],
            loss=losses.multi_label_loss,
            problem="multi_label_classification",
            score=scores.multi_label,
        )
    return TASKS[config.task.kind]


def check(config: Any) -> None:
    """Raises a ValueError where the config asks for a score that there is not, or for answers of what gives none."""
    if unknown := [name for name in config.eval.metrics if name not in scores.OF_ANSWERS]:
        raise ValueError(
            f"eval.metrics has {unknown[0]!r}.{suggest(unknown[0], scores.OF_ANSWERS)} There are "
            f"{', '.join(scores.OF_ANSWERS)}, scores of generated answers; the others come by themselves"
        )
    for field in ("exact_match", "samples"):
        if config.eval[field] and of(config).score is not None:
            raise ValueError(
                f"eval.{field}={config.eval[field]}: task.kind={config.task.kind!r} gives no answers in words; set it to 0"
            )


def head_options(config: Any, labels: Sequence[str]) -> dict[str, Any]:
    """The options for the head of the task's model, as `load_model` and `models.from_hf_config` take them."""
    task = of(config)
    if task.head is None:
        return {}
    return {
        "head": task.head,
        "labels": labels or (1 if task.problem == "regression" else None),
        "problem_type": task.problem,
        "new_head": config.model.new_head,
    }


def load_base(config: Any, directory: Path, labels: Sequence[str], mesh: Mesh) -> Any:
    """The model in a directory as `config` wants it, with the head of its task and these classes, without adapters.

    Raises:
        ValueError: what `load_model` refuses, or a model that does not learn this kind of task.
    """
    make = make_random if config.model.init == "random" else load_model
    model = make(
        directory,
        config.model.dtype,
        config.model.quantize or None,
        param_dtype=config.model.param_dtype or None,
        remat=config.model.remat,
        skip=config.model.skip_quantize,
        mesh=mesh,
        seed=config.seed,
        **head_options(config, labels),
    )
    if not isinstance(model, of(config).model):
        learns = [kind for kind, task in TASKS.items() if isinstance(model, task.model)]
        raise ValueError(
            f"model.path={config.model.path!r} is a {type(model).__name__}, which does not learn "
            f"task.kind={config.task.kind!r}; it learns {', '.join(learns)}"
        )
    return model


def check_length(config: Any, model: Any, mesh: Mesh) -> None:
    """Raises a UserError where an example has more positions than the model, or a number that mesh.sequence does not
    divide."""
    if isinstance(model, Vit):
        lengths = {"an image, its patches and the class token": 1 + model.config.patches}
    else:
        virtual, length, most = getattr(model, "virtual", 0), config.data.max_length, model.config.max_positions
        what = f"data.max_length={length}" + f" and {virtual} virtual tokens" * (virtual > 0)
        lengths = {what: length + virtual}
        if length + virtual > most:
            raise UserError(f"{what} exceed the model's {most} positions; lower data.max_length or method.tokens")
        if isinstance(model, T5):
            lengths[f"data.max_target_length={config.data.max_target_length}"] = config.data.max_target_length
    for what, length in lengths.items():
        if length % (parts := mesh.shape["sequence"]):
            raise UserError(f"{what}: {length} positions, which mesh.sequence={parts} does not divide")
