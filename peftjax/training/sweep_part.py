"""A part of a sweep: the runs that one of several jobs trains, such as a task of a job array."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeVar

from peftjax.core.errors import UserError

RunT = TypeVar("RunT")


@dataclasses.dataclass(frozen=True)
class SweepPart:
    """Part `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    def of(self, populations: Sequence[Sequence[RunT]]) -> list[RunT]:
        """The runs of this part. The sizes of the parts differ by at most one.

        A part has consecutive runs of a population, so that they can be trained together. The result depends only on the runs,
        so all jobs, including restarted ones, agree.

        Raises:
            UserError: There are fewer runs than parts.
        """
        runs = [run for population in populations for run in population]
        if self.count > len(runs):
            raise UserError(f"--part={self}: the sweep has {len(runs)} runs; use at most {len(runs)} parts")
        first, end = (len(runs) * index // self.count for index in (self.index - 1, self.index))
        return runs[first:end]

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_part(text: str) -> SweepPart:
    """The part that --part=I/N names.

    Raises:
        UserError: It is not of this form, or I is not from 1 to N.
    """
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)):
        raise UserError(f"--part={text} must be I/N, for example --part=1/4 for the first of four parts")
    part = SweepPart(int(found[1]), int(found[2]))
    if not 1 <= part.index <= part.count:
        raise UserError(f"--part={text}: the parts of {part.count} are numbered from 1 to {part.count}")
    return part
