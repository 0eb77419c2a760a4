"""Agreement of the processes of a run: all of them have the same configs and read the same records."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.core import distributed
from peftjax.training import config as configs
from peftjax.training.config import Config

PER_PROCESS = ("data.workers:", "data.tfds_data_dir:")  # fields that may differ between the processes of a run


def check_same_configs(given: Mapping[str, Config]) -> None:
    """Check that every process has the same configs, by the names of their runs.

    Otherwise each process would go through the steps of another run, without an error.

    Raises:
        UserError: They differ; it is raised in every process.
    """

    def differences(there: Mapping[str, Any]) -> str:
        if list(there) != list(given):
            return f"{', '.join(given)} here, {', '.join(there)} there"
        lines = [line for name, config in given.items() for line in configs.differences(config, there[name])]
        return "; ".join(line for line in dict.fromkeys(lines) if not line.startswith(PER_PROCESS))

    values = {name: json.loads(configs.to_json(config)) for name, config in given.items()}
    distributed.check_same("the configs", values, differences)


def check_same_data(name: str, sources: Sequence[Sequence[Any]], counts: Mapping[str, int]) -> None:
    """Check that every process reads the same records.

    Args:
        name: The field of the config, such as "data.train".
        sources: The name and the number of records of each source.
        counts: What was counted in the first batches.

    Raises:
        UserError: The sources or the counts differ; it is raised in every process.
    """

    def differences(there: Mapping[str, Any]) -> str:
        ours, theirs = (dict(map(tuple, each)) for each in (sources, there["sources"]))
        found = [
            f"{source}: {ours.get(source, 0):,} records here, {theirs.get(source, 0):,} there"
            for source in ours | theirs
            if ours.get(source) != theirs.get(source)
        ]
        return "; ".join(found) or ("the first batches have other records" if counts != there["counts"] else "")

    value = {"sources": [list(source) for source in sources], "counts": dict(counts)}
    distributed.check_same(f"the records in {name}", value, differences)
