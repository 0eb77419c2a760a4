"""The populations of a sweep, to be planned."""

from collections.abc import Iterable, Sequence

from peftjax.core.config_file import read_sweep
from peftjax.core.errors import UserError
from peftjax.training import config as configs
from peftjax.training import space
from peftjax.training.alike import separating_fields
from peftjax.training.config import Config


def swept_configs(path: str, overrides: Sequence[str], fields: Iterable[str]) -> list[Config]:
    """The config of each run of a sweep over `fields`, strings "--sweep.method.rank=4,8", and those of `get_sweep()`.

    Raises:
      UserError: A field has a range instead of values, or a config is invalid.
    """
    swept = {name: space.parse_values(name, values) for name, values in read_sweep(path).items()}
    swept |= dict(map(space.parse, fields))
    for name, values in swept.items():
        if isinstance(values, space.Range):
            raise UserError(
                f"--sweep.{name}: a plan needs values instead of a range; list some, or use --members=N for N runs of the same "
                "size"
            )
    return [
        configs.load(path, [*overrides, *(f"--config.{name}={text}" for name, text in texts.items())])
        for texts in space.grid(swept)
    ]


def alike(runs: Iterable[Config]) -> list[list[Config]]:
    """The configs in groups that one program can train."""
    groups: list[list[Config]] = []
    for config in runs:
        group = next((group for group in groups if not separating_fields(group[0], config)), None)
        if group is None:
            groups.append([config])
        else:
            group.append(config)
    return groups
