"""Generated answers to held-out prompts, and their scores."""

import dataclasses
from collections.abc import Sequence

from rich.table import Table

from peftjax.core.progress import GENERATING, Progress
from peftjax.core.terminal import Clipped
from peftjax.data.records import Prompt
from peftjax.data.token_rows import check_rows, embedding_rows
from peftjax.data.tokenizer import Tokenizer
from peftjax.decoding import generate
from peftjax.models.base import Model
from peftjax.tasks import metrics

BATCH = 64  # prompts answered at a time
LINES = 3  # printed of each text


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
      record: The name of the record.
      prompt: The text that was continued.
      expected: The expected answer.
      answer: The generated answer.
    """

    record: str
    prompt: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer equals the expected one, up to surrounding spaces."""
        return metrics.same(self.answer, self.expected)


def answer(
    model: Model, prompts: Sequence[Prompt], tokenizer: Tokenizer, max_new_tokens: int, progress: Progress
) -> list[Answer]:
    """The model's greedy answers to held-out prompts."""
    for prompt in prompts:
        check_rows(prompt.tokens, embedding_rows(model), tokenizer, prompt.record)
    answers = []
    with progress.phase(GENERATING):
        starts = range(0, len(prompts), BATCH)
        for start in progress.track(starts, "prompts", len(prompts), lambda start: min(BATCH, len(prompts) - start)):
            part = list(prompts[start : start + BATCH])
            filled = part + [part[-1]] * (min(BATCH, len(prompts)) - len(part))  # one batch shape, one compilation
            outputs = generate(
                model, [prompt.tokens for prompt in filled], max_new_tokens=max_new_tokens, stop=tokenizer.eos_ids
            )
            for prompt, output in zip(part, outputs, strict=False):
                answers.append(Answer(prompt.record, prompt.prompt, prompt.expected, tokenizer.decode(output)))
    return answers


def table(answers: Sequence[Answer], scored: bool) -> Table:
    """Answers to print, each text clipped to a few lines; with a verdict if they are scored."""
    made = Table.grid(padding=(0, 2, 0, 0))
    for index, item in enumerate(answers):
        verdict = ("right" if item.correct else "wrong") if scored else "answer"
        texts = {"prompt": item.prompt, verdict: item.answer} | (
            {} if verdict == "right" else {"expected": item.expected}
        )
        for name, text in texts.items():
            made.add_row(name, Clipped(text.strip(), LINES))
        if index < len(answers) - 1:
            made.add_row()
    return made


def score(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, float]:
    """The metrics `names` of generated answers, and the number of answers."""
    found = metrics.of_answers([item.answer for item in answers], [item.expected for item in answers], names)
    return found | {"prompts": len(answers)}
