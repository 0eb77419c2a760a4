"""The runs of a sweep, to be planned."""

from collections.abc import Iterable, Sequence

from peftjax.core.errors import UserError
from peftjax.training import space
from peftjax.training.config import Config


def swept_configs(path: str, overrides: Sequence[str], fields: Iterable[str], trials: int, seed: int) -> list[Config]:
    """Return the config of each run that `peftjax sweep` would train with the same arguments in a new workdir.

    Args:
        path: The config file, which may define a search space.
        overrides: Strings "--config.train.steps=100".
        fields: Strings "--sweep.method.rank=4,8"; "--or" separates search spaces.
        trials: The number of random draws; 0 for all combinations.
        seed: The random seed of the draws.

    Raises:
        UserError: There is nothing to sweep, a field has a range and there are no trials, or a config is invalid.
    """
    spaces = space.read_spaces(path, fields)
    if not any(spaces):
        raise UserError(
            "nothing to sweep: the config file defines no search space; name a field and its values, --sweep.FIELD=V,V"
        )
    chosen = space.chosen_values(path, overrides, spaces, trials, seed)
    different = dict.fromkeys(tuple(texts.items()) for texts in chosen)  # as in a sweep, repeated draws count once
    return [space.load(path, overrides, spaces, dict(texts)) for texts in different]
