"""Generated answers to held-out prompts, and their scores."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from peftjax.core import variables
from peftjax.core.errors import NotFiniteError
from peftjax.core.progress import GENERATING, Progress
from peftjax.core.terminal import Clipped
from peftjax.data.records import Prompt
from peftjax.data.token_rows import check_token_rows
from peftjax.data.tokenizer import Tokenizer
from peftjax.decoding import generate_each, generate_ids
from peftjax.models.base import Model
from peftjax.report.data import Answer
from peftjax.tasks import metrics

BATCH = 64  # prompts answered at a time
LINES = 3  # printed of each text


def answer(
    model: Model, prompts: Sequence[Prompt], tokenizer: Tokenizer, max_new_tokens: int, progress: Progress
) -> list[Answer]:
    """The model's greedy answers to held-out prompts."""
    answers = []
    with progress.phase(GENERATING):
        for part, tokens in _batches(model, prompts, tokenizer, BATCH, progress):
            outputs = generate_ids(model, tokens, max_new_tokens=max_new_tokens, stop=tokenizer.eos_ids)
            answers += _decoded(part, outputs, tokenizer)
    return answers


def answer_each(
    model: Model,
    own: Sequence[variables.FlatTree],
    shared: variables.FlatTree,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    progress: Progress,
) -> list[list[Answer] | NotFiniteError]:
    """The greedy answers of several models from one program, or the error of a model whose logits are not finite.

    All models together answer about as many prompts at a time as a single model. `own` and `shared` are as in
    `generate_each`.
    """
    found: list[list[Answer] | NotFiniteError] = [[] for _ in own]
    with progress.phase(GENERATING):
        for part, tokens in _batches(model, prompts, tokenizer, max(1, BATCH // len(own)), progress):
            outputs = generate_each(model, own, shared, tokens, max_new_tokens=max_new_tokens, stop=tokenizer.eos_ids)
            for index, (before, output) in enumerate(zip(found, outputs, strict=True)):
                if isinstance(output, NotFiniteError):
                    found[index] = output
                elif isinstance(before, list):
                    before += _decoded(part, output, tokenizer)
    return found


def _batches(
    model: Model, prompts: Sequence[Prompt], tokenizer: Tokenizer, size: int, progress: Progress
) -> Iterator[tuple[list[Prompt], list[list[int]]]]:
    """Up to `size` prompts at a time, and their tokens. The last prompt is repeated, so that all batches have one shape."""
    for prompt in prompts:
        check_token_rows(prompt.tokens, model.embedding_rows, tokenizer, prompt.record)
    size = min(size, len(prompts))
    starts = range(0, len(prompts), size)
    for start in progress.track(starts, "prompts", len(prompts), lambda start: min(size, len(prompts) - start)):
        part = list(prompts[start : start + size])
        yield part, [prompt.tokens for prompt in part + [part[-1]] * (size - len(part))]


def _decoded(prompts: Sequence[Prompt], outputs: Sequence[list[int]], tokenizer: Tokenizer) -> list[Answer]:
    return [
        Answer(prompt.record, prompt.prompt, text, prompt.expected, metrics.same(text, prompt.expected))
        for prompt, text in zip(prompts, map(tokenizer.decode, outputs), strict=False)
    ]


def answers_table(answers: Sequence[Answer], marked: bool) -> Table:
    """Answers to print, each text clipped to a few lines; marked as right or wrong if `marked`."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for index, item in enumerate(answers):
        verdict = ("right" if item.correct else "wrong") if marked else "answer"
        expected = [] if verdict == "right" else [("expected", item.expected)]
        for name, text in [("prompt", item.prompt), (verdict, item.answer), *expected]:
            made.add_row(name, Clipped(text.strip(), LINES))
        if index < len(answers) - 1:
            made.add_row()
    return made


def score(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, float]:
    """The metrics `names` of generated answers, and the number of answers."""
    found = metrics.score_answers([item.answer for item in answers], [item.expected for item in answers], names)
    return found | {"prompts": len(answers)}
