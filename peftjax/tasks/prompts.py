"""Prompts to answer, as tokens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peftjax.core.errors import UserError
from peftjax.data.sources import Source

# (a record of a prompt, what messages call it) -> its tokens
Encoder = Callable[[Mapping[str, Any], str], list[int]]


class Prompts(NamedTuple):
    """Prompts whose tokens are computed when they are needed, so that a long file takes little memory.

    Attributes:
        records: The records of the prompts.
        encode: Converts a record, and what messages call it, to tokens.
    """

    records: Source
    encode: Encoder

    def tokens(self, index: int) -> list[int]:
        """The tokens of a prompt."""
        return self.encode(self.records[index], self.records.name(index))

    def extremes(self) -> tuple[int, int]:
        """Encode every prompt once, which reports mistakes; returns which one is the longest, and which has the highest id."""
        longest = highest = (0, 0)
        for index in range(len(self.records)):
            if not (tokens := self.tokens(index)):
                raise UserError(
                    f"{self.records.name(index)}: the prompt is empty, and the tokenizer has no bos token to start from"
                )
            longest, highest = max(longest, (len(tokens), -index)), max(highest, (max(tokens), -index))
        return -longest[1], -highest[1]
