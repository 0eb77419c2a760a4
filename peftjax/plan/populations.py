"""The populations of a sweep, to be planned."""

from collections.abc import Iterable, Sequence

from peftjax.core.errors import UserError
from peftjax.training import space
from peftjax.training.config import Config


def swept_configs(path: str, overrides: Sequence[str], fields: Iterable[str]) -> list[Config]:
    """The config of each run of a sweep over `fields`, strings "--sweep.method.rank=4,8", and those of `get_sweep()`.

    Raises:
      UserError: A field has a range instead of values, or a config is invalid.
    """
    spaces = space.read_spaces(path, fields)
    for name, values in (item for each in spaces for item in each.items()):
        if isinstance(values, space.Range):
            raise UserError(
                f"--sweep.{name}: a plan needs values instead of a range; list some, or use --members=N for N runs of the same "
                "size"
            )
    return [space.load(path, overrides, texts) for each in spaces for texts in space.grid(each)]
