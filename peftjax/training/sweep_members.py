"""The runs of a sweep, from its fields and their values."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from peftjax.core.config import flat_fields
from peftjax.core.errors import UserError
from peftjax.report.sweep_page import RESULTS
from peftjax.report.text import short_name, value_text
from peftjax.training import config as configs
from peftjax.training import space
from peftjax.training.member import Member
from peftjax.training.sweep_results import read_entries

LONGEST = 255  # bytes of a file name


def members(
    path: str, overrides: Sequence[str], fields: Iterable[str], workdir: Path, trials: int = 0, seed: int = 0
) -> list[Member]:
    """The runs of a sweep over `fields`, strings "--sweep.optim.learning_rate=1e-3,3e-3"; see `space.read_spaces`.

    Without `trials`, there is one run for each combination of the values. Otherwise there are `trials` random draws. Draws
    that are recorded in the workdir's sweep.json are read from there. A draw that repeats an earlier one is left out.

    Raises:
        UserError: There are no fields, one is given twice or without a value, one of several spaces is empty, two runs
            are the same, a config is invalid, or sweep.json records draws from other fields or values.
    """
    spaces = space.read_spaces(path, fields)
    swept = dict.fromkeys(name for each in spaces for name in each)
    chosen = space.chosen_values(path, overrides, spaces, trials, seed)
    if trials:
        chosen = _recorded(spaces, seed, workdir, chosen)
    found: dict[str, Member] = {}
    for index, texts in enumerate(chosen):
        config = space.load_run(path, overrides, spaces, texts)
        values = flat_fields(configs.to_dict(config))
        fixed = {name: values[name] for name in texts}
        name = ",".join(f"{short_name(field, swept)}={value_text(value)}" for field, value in fixed.items())
        if name in found and not trials:
            raise UserError(f"two runs of the sweep are the same: {name}; remove one of the two values")
        trial = {"seed": seed, "index": index, "drawn": texts} if trials else None
        found.setdefault(name, Member(fixed, config, workdir / _directory(name), trial))
    return list(found.values())


def _directory(name: str) -> str:
    """The name of a run's directory; a name that is too long for a file system ends with its hash."""
    quoted = quote(name, safe=",=+ ")
    if len(quoted) <= LONGEST:
        return quoted
    return f"{quoted[: LONGEST - 17]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _recorded(
    spaces: Sequence[space.Space], seed: int, workdir: Path, drawn: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Replace the draws that sweep.json has recorded for this seed by the recorded ones.

    Raises:
        UserError: A recorded draw has other fields, or a value outside the lists and ranges.
    """
    file = workdir / RESULTS
    for trial in (entry["trial"] for entry in read_entries(workdir) if entry.get("trial", {}).get("seed") == seed):
        texts = trial["drawn"]
        accepting = space.space_of(spaces, texts)
        if accepting is None:
            values = ", ".join(f"{name}={text}" for name, text in texts.items())
            raise UserError(
                f"{file} records a draw from other fields or values: {values}; choose another workdir or another "
                "--search_seed"
            )
        if trial["index"] < len(drawn):
            drawn[trial["index"]] = {name: texts[name] for name in accepting}
    return drawn
