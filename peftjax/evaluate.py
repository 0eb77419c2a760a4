"""How good a model is on held-out records: loss, perplexity, token accuracy, exact match by generation.

python -m peftjax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import cli, variables
from peftjax.core import config as configs
from peftjax.generate import generate
from peftjax.losses import Loss, Totals, next_token_loss


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
        return self.answer.strip() == self.expected.strip()

    def told(self, scored: bool) -> str:
        """A line for people; scored: with a verdict."""
        verdict = ("right  " if self.correct else "wrong  ") if scored else ""
        return f"{verdict}{self.prompt!r} -> {self.answer!r}, expected {self.expected!r}"


def make_eval_step(graph: nnx.GraphDef, loss: Loss, mesh: Mesh) -> Callable[..., Totals]:
    """A jitted function (trainable, frozen, batch [1, B, T]) -> Totals, of a model in evaluation."""

    @partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    def eval_step(trainable: Any, frozen: Any, batch: Mapping[str, jax.Array]) -> Totals:
        model = variables.merge(graph, trainable, frozen)
        return loss(model, {name: value[0] for name, value in batch.items()})

    return eval_step


def evaluate_loss(
    eval_step: Callable[..., Totals], trainable: Any, frozen: Any, batches: Iterable[Any], mesh: Mesh, packed: bool
) -> dict[str, float]:
    """Mean loss per token in nats, its perplexity, and the share of tokens that are the most likely one.

    Raises:
        ValueError: the batches hold no token with a loss.
    """
    sums = np.zeros(3)
    for batch in batches:
        placed = sharding.shard_batch(batch.arrays(packed), mesh)
        sums += np.array(jax.device_get(eval_step(trainable, frozen, placed)), float)
    loss, tokens, correct = sums
    if tokens == 0:
        raise ValueError("data.eval: the held-out records have no token with a loss")
    return {
        "eval_loss": loss / tokens,
        "perplexity": math.exp(min(loss / tokens, 700.0)),
        "token_accuracy": correct / tokens,
        "eval_tokens": tokens,
    }


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


def exact_match(answers: list[Answer]) -> float:
    """The share of answers that are right."""
    return sum(item.correct for item in answers) / len(answers)


def main(argv: list[str]) -> None:
    from peftjax import methods
    from peftjax.data.batches import eval_batches, eval_examples
    from peftjax.data.text import load_tokenizer
    from peftjax.io.hf_adapter import load_adapter
    from peftjax.io.hf_model import load_model, resolve

    options = cli.parse(argv, "evaluate", "Evaluate what a training run left in its workdir.")
    config = configs.load(options.config, options.overrides, method_defaults=methods.method_defaults)
    workdir = Path(options.workdir)
    result = workdir / ("model" if config.method.name == "full" else "adapter")
    if not result.is_dir():
        raise ValueError(f"{result} is not there: has this run finished? python -m peftjax.train writes it at the end")
    mesh = sharding.make_mesh(config.mesh)
    base = resolve(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(base)
    model = load_model(
        result if config.method.name == "full" else base, config.model.dtype,
        config.model.quantize or None, param_dtype=config.model.param_dtype or None, skip=config.model.skip_quantize,
        mesh=mesh,
    )  # fmt: skip
    if config.method.name != "full":
        load_adapter(model, result)
    sharding.place(model, mesh)

    with jax.set_mesh(mesh):
        graph, found = variables.flat(model)
        values = {path: variable.get_value() for path, variable in found.items()}
        eval_step = make_eval_step(graph, partial(next_token_loss, chunk=config.train.loss_chunk), mesh)
        scores = evaluate_loss(eval_step, {}, values, eval_batches(config, tokenizer), mesh, config.data.pack)
        if count := config.eval.exact_match or config.eval.samples:
            answers = answer(model, eval_examples(config, tokenizer, count), tokenizer, config.eval.max_new_tokens)
            if scored := config.eval.exact_match > 0:
                scores["exact_match"] = exact_match(answers)
            for item in answers[: config.eval.samples]:
                print(item.told(scored))
    for name, value in scores.items():
        print(f"{name:15} {value:.6g}")
    (workdir / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
