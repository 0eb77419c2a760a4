"""The config of a run, and whether it resumes the run that the workdir holds."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from peftjax.core import distributed, free_fields
from peftjax.core.errors import UserError
from peftjax.data.batches import Batches
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.json_files import read_json
from peftjax.tasks import Task
from peftjax.training import config as configs
from peftjax.training import duration, moved, precision, start_from
from peftjax.training.config import Config

# Fields that may change when a run resumes: those without an effect on its results, mesh., which affects only their rounding,
# and when to stop and what to export.
FREE_TO_RESUME = (*free_fields.FREE, "mesh.", "train.patience:", "checkpoint.export:")
# Those that may change when train.steps is raised: the schedules then span the new number of steps.
FREE_TO_EXTEND = (*FREE_TO_RESUME, "train.steps:", "optim.warmup_steps:", "method.total_steps:")


def open_checkpoints(config: Config, workdir: Path) -> Checkpoints:
    """The checkpoints of the run in a workdir."""
    return Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)


def resolve_config(
    config: Config, task: Task, data: Batches, workdir: Path, checkpoints: Checkpoints
) -> tuple[Config, Path | None]:
    """The config that is written to the workdir: with all lengths in steps, a dtype, and all options of the method.

    Returns:
        The config, and the directory of the adapter to start from; see `start_from.resolve_options`.

    Raises:
        UserError: A length is in epochs and the data has none; the workdir holds another run, see `check_workdir`; or
            the adapter to start from does not fit, see `start_from.resolve_options`.
    """
    rows = partial(duration.rows_of_epoch, config, task, data)
    config = complete_config(config, checkpoints, rows, lambda: task.hf_config)
    check_workdir(config, workdir, checkpoints)
    return start_from.resolve_options(config, workdir, checkpoints)


def complete_config(
    config: Config, checkpoints: Checkpoints, rows: Callable[[], int], hf_config: Callable[[], Mapping[str, Any]]
) -> Config:
    """The config with all lengths in steps (`rows`: see `duration.in_steps`) and a dtype, the checkpoints' if there are any."""
    config = duration.in_steps(config, rows)
    if (identity := checkpoints.identity()) is not None:
        return precision.with_stored_dtype(config, identity["config"])
    return precision.resolve_dtype(config, hf_config())


def check_workdir(config: Config, workdir: Path, checkpoints: Checkpoints) -> None:
    """Check that a config, whose lengths are in steps, matches the run in the workdir, if there is one.

    train.steps may be higher than before, which extends the run.

    Raises:
        UserError: The workdir holds a run with another configuration, or the result of a run whose checkpoints were
            deleted.
    """
    if (identity := checkpoints.identity()) is not None:
        differ = _differing(config, moved.relocated(identity, workdir))
        raise_if_different(workdir, differ + moved.changed_records(identity, config, workdir))
    elif checkpoints.latest_step() is None:
        distributed.on_first(lambda: _refuse_to_replace_result(config, workdir))


def _differing(config: Config, stored: Mapping[str, Any]) -> list[str]:
    """The fields in which a config differs from an earlier run's but must not."""
    free = FREE_TO_EXTEND if config.train.steps > stored["train"]["steps"] else FREE_TO_RESUME
    config = precision.with_stored_dtype(config, stored)
    lines = configs.differences(start_from.with_stored_options(config, stored), stored)
    if any(line.startswith("method.name:") for line in lines):  # other methods have other options
        lines = [line for line in lines if not line.startswith("method.") or line.startswith("method.name:")]
    return [line for line in lines if not line.startswith(free)]


def _refuse_to_replace_result(config: Config, workdir: Path) -> None:
    """Raises a UserError if a finished run, or one with another configuration, has left its result and no checkpoint."""
    result = next((path for name in ("adapter", "model") if (path := workdir / name).exists()), None)
    if result is None:
        return
    stored = read_json(workdir / "config.json") if (workdir / "config.json").exists() else {}
    same = "train" in stored and not _differing(config, stored)
    if not same or (workdir / "report.html").exists():
        raise UserError(
            f"--workdir={workdir} holds the result of a run, {result}, but no checkpoint to resume from; training would "
            "replace the result. Choose another workdir, or delete this one to start again"
        )


def raise_if_different(workdir: Path, differ: list[str]) -> None:
    """Raises a UserError that names the differences from the run in the workdir, if there are any."""
    if differ:
        raise UserError(
            f"--workdir={workdir} holds a run with another configuration: {'; '.join(differ)}. Choose another workdir, "
            "or delete this one to start again"
        )
