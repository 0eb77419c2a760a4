"""Search spaces: the values of swept fields, all of their combinations, and random draws from them."""

import argparse
import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from peftjax.core import cli
from peftjax.core.config import flat_fields
from peftjax.core.config_file import read_sweep
from peftjax.core.config_values import ConfigSource
from peftjax.core.errors import UserError
from peftjax.training import config as configs
from peftjax.training.config import Config

RANGE = re.compile(r"(uniform|loguniform)\((.*)\)")
OR = "--or"  # separates the search spaces on the command line
DIGITS = 4  # significant digits of a drawn value, so that the names of runs are short and exact


@dataclasses.dataclass(frozen=True)
class Choice:
    """A list of values, each as the text of an override; `where` they were given, for messages."""

    texts: tuple[str, ...]
    where: str

    def draw(self, quantile: float, *, integer: bool) -> str:
        """Return the value at a quantile in [0, 1), as text; `integer` has no effect."""
        return self.texts[int(quantile * len(self.texts))]

    def __contains__(self, text: str) -> bool:
        return text in self.texts


@dataclasses.dataclass(frozen=True)
class Range:
    """A uniform distribution over the numbers from `low` to `high`; if `log`, uniform in the logarithm.

    `where` it was given, for messages.
    """

    low: float
    high: float
    log: bool
    where: str

    def draw(self, quantile: float, *, integer: bool) -> str:
        """Return the number at a quantile in [0, 1), as text; an integer if `integer`."""
        ends = (math.ceil(self.low), math.floor(self.high) + (not self.log)) if integer else (self.low, self.high)
        low, high = map(math.log, ends) if self.log else ends
        place = low + quantile * (high - low)
        value = math.exp(place) if self.log else place
        if integer:
            return str(round(value) if self.log else math.floor(value))
        return str(min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high))

    def __contains__(self, text: str) -> bool:
        try:
            return self.low <= float(text) <= self.high
        except ValueError:  # a value of a list, such as 10%
            return False


Space = Mapping[str, Choice | Range]  # the values of each field, by its dotted name


def parse(item: str) -> tuple[str, Choice | Range]:
    """Return the field and the values of an argument "--sweep.optim.learning_rate=1e-3,3e-3".

    Values are separated by commas, or by semicolons if they contain commas. "uniform(LOW,HIGH)" and "loguniform(LOW,HIGH)"
    are ranges.

    Raises:
        UserError: There is no value, or the bounds of a range are not two numbers in order.
    """
    name, _, text = item.removeprefix("--sweep.").partition("=")
    return name, _parse_text(text, item)


def parse_values(name: str, values: Any, source: ConfigSource) -> Choice | Range:
    """The values of a field in a config file: a list, or a string as on the command line.

    Raises:
        UserError: The list is empty, or as for `parse`.
    """
    where = source.of(name)
    if isinstance(values, str):
        return _parse_text(values, f"{where}: {name}={values}")
    if isinstance(values, Mapping):
        names = ", ".join(f"{name}.{field}" for field in values)
        raise UserError(f"{where}: write each swept field of the section {name} with a dot: {names}")
    if not isinstance(values, list | tuple) or not values:
        raise UserError(
            f"{where}: the swept field {name} needs a list of values or a range such as 'loguniform(1e-5,1e-2)', not "
            f"{values!r}"
        )
    return Choice(tuple(map(str, values)), where)


def _parse_text(text: str, where: str) -> Choice | Range:
    """The values of a field, from text as on the command line."""
    if found := RANGE.fullmatch(text.strip()):
        return _parse_range(found[1] == "loguniform", found[2], where)
    texts = tuple(value.strip() for value in text.split(";" if ";" in text else ","))
    if not all(texts):
        raise UserError(f"{where}: a swept field needs values, such as VALUE,VALUE")
    return Choice(texts, where)


def _parse_range(log: bool, bounds: str, where: str) -> Range:
    try:
        low, high = map(float, bounds.split(","))
    except ValueError:
        raise UserError(f"{where}: a range needs two numbers, for example loguniform(1e-5,1e-2)") from None
    if not (math.isfinite(high - low) and low < high):
        raise UserError(f"{where}: the lower bound of a range must be below the upper bound, and both must be finite")
    if log and low <= 0:
        raise UserError(
            f"{where}: the lower bound of loguniform must be more than 0; use uniform for a range that starts at {low:g}"
        )
    return Range(low, high, log, where)


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that define search spaces, "--sweep.FIELD=VALUES" and "--or", and all others."""
    fields: list[str] = []
    rest: list[str] = []
    for index, words in enumerate(_split_at_or(argv)):
        own, others = cli.config_fields(words, "--sweep.")
        fields += [OR, *own] if index else own
        rest += others
    return fields, rest


def _split_at_or(words: Iterable[str]) -> list[list[str]]:
    """The words before, between and after "--or"."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == OR:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def read_spaces(path: str, fields: Iterable[str]) -> list[Space]:
    """The search spaces of a sweep, at least one, which may be empty.

    They are the config file's; `fields` are added to each of them or replace its values. `fields` are strings
    "--sweep.optim.learning_rate=1e-3,3e-3"; see `parse`. If they contain "--or", they are the search spaces themselves.

    Raises:
        UserError: A field is given twice in a space, or has no valid values; or there is "--or" although a space is
            empty or the file defines search spaces.
    """
    given = [_parse_space(items) for items in _split_at_or(fields)]
    spaces = [
        {str(name): parse_values(str(name), values, source) for name, values in space.items()}
        for space, source in read_sweep(path)
    ]
    if len(given) == 1:
        return [{**space, **given[0]} for space in spaces or [{}]]
    if not all(given):
        raise UserError(f"{OR} separates search spaces: give at least one --sweep.FIELD=V,V before it and after it")
    if spaces:
        raise UserError(f"{OR} cannot be combined with the search space of {path}; remove one of them")
    return given


def _parse_space(items: Iterable[str]) -> Space:
    """A search space of the command line."""
    found: dict[str, Choice | Range] = {}
    for item in items:
        name, values = parse(item)
        if name in found:
            raise UserError(f"{item}: {name} is swept twice; give all its values at once, separated by commas")
        found[name] = values
    return found


def load_run(path: str, overrides: Iterable[str], spaces: Iterable[Space], texts: Mapping[str, str]) -> Config:
    """The config of a combination of values from one of the spaces. A message about a value says where it was given."""
    space = space_of(spaces, texts)
    assert space is not None
    origins = {f"--config.{name}={text}": space[name].where for name, text in texts.items()}
    return configs.load(path, [*overrides, *origins], origins)


def space_of(spaces: Iterable[Space], texts: Mapping[str, str]) -> Space | None:
    """The first space that has a combination of values; None if there is none."""
    for space in spaces:
        if texts.keys() == space.keys() and all(text in space[name] for name, text in texts.items()):
            return space
    return None


def grid(space: Space) -> list[dict[str, str]]:
    """Return all combinations of the values.

    Raises:
        UserError: One of the fields has a range.
    """
    texts = {}
    for name, values in space.items():
        if isinstance(values, Range):
            raise UserError(
                f"{values.where}: the range of {name} needs random search; set the number of draws, for example --trials=20"
            )
        texts[name] = values.texts
    return [dict(zip(texts, combination, strict=True)) for combination in itertools.product(*texts.values())]


def draw(spaces: Sequence[Space], trials: int, seed: int, integers: Collection[str]) -> list[dict[str, str]]:
    """Independent draws, for random search (Bergstra & Bengio 2012): of a space, then of the values of all its fields.

    Draw i depends only on the seed and on i, so a larger number of draws starts with the same ones. `integers` are the fields
    whose values are integers.
    """
    drawn = []
    for index in range(trials):
        rng = np.random.default_rng([seed, index])
        space = spaces[int(rng.integers(len(spaces)))] if len(spaces) > 1 else spaces[0]
        quantiles = zip(space, rng.random(len(space)).tolist(), strict=True)
        drawn.append({name: space[name].draw(quantile, integer=name in integers) for name, quantile in quantiles})
    return drawn


def add_search_options(parser: argparse._ActionsContainer) -> None:
    """Add --or, --trials and --search_seed."""
    parser.add_argument(OR, action="store_true", help="Start another search space: --sweep.A=1,2 --or --sweep.B=3,4")
    parser.add_argument(
        "--trials",
        type=int,
        default=0,
        metavar="N",
        help="Number of random draws (default: all combinations of the values)",
    )
    parser.add_argument(
        "--search_seed", type=int, default=0, metavar="SEED", help="Random seed of the draws (default: 0)"
    )


def check_search_options(options: argparse.Namespace) -> None:
    """Check the values of these options.

    Raises:
        UserError: One is negative.
    """
    for name in ("trials", "search_seed"):
        if (value := getattr(options, name)) < 0:
            raise UserError(f"--{name}={value} must not be negative")


def chosen_values(
    path: str, overrides: Sequence[str], spaces: Sequence[Space], trials: int, seed: int
) -> list[dict[str, str]]:
    """The values of each run of a sweep: all combinations, or `trials` random draws, which may repeat.

    Raises:
        UserError: There is nothing to sweep; a field has a range, and there are no trials; or the range of an integer
            field has no integer.
    """
    if not any(spaces):
        raise UserError(
            "nothing to sweep: the config file defines no search space (get_sweep() in Python, the entry `sweep` in YAML or "
            "JSON); name a field and its values, for example --sweep.optim.learning_rate=1e-4,3e-4"
        )
    if not trials:
        return [texts for space in spaces for texts in grid(space)]
    integers = {name for space in spaces for name in _integers(path, overrides, space)}
    for name, values in ((name, space[name]) for space in spaces for name in space if name in integers):
        if isinstance(values, Range) and math.ceil(values.low) > math.floor(values.high):
            raise UserError(
                f"{values.where}: there is no integer from {values.low:g} to {values.high:g}, and {name} must be one"
            )
    return draw(spaces, trials, seed, integers)


def _integers(path: str, overrides: Sequence[str], swept: Space) -> list[str]:
    """The fields of a search space whose values are integers."""
    lists = {name: values for name, values in swept.items() if isinstance(values, Choice)}
    first = {name: values.texts[0] for name, values in lists.items()}
    defaults = flat_fields(configs.to_dict(load_run(path, overrides, [lists], first)))
    return [name for name in swept if type(defaults.get(name)) is int]
