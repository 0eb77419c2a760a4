"""Checkpoints of the training state: saved in the background, atomic, and verified when restored.

orbax writes them and decides which to keep. What a checkpoint belongs to, whether it is intact, and which one to fall back
to are decided here. A checkpoint is a directory named by its step; it has a temporary name until it is complete:

    <step>/state/            the arrays
    <step>/about/metadata    one JSON object: score, identity, data state of every process, the names, shapes and dtypes
                             of the arrays, their fingerprint, and a checksum of this object itself
"""

import gc
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]
from orbax.checkpoint import checkpoint_managers as policies

from peftjax.core import debug_log, distributed
from peftjax.core.errors import UserError, root_cause
from peftjax.core.files import sync_directory, sync_files
from peftjax.core.fingerprint import fingerprint

Json = dict[str, Any]
T = TypeVar("T")

_STATE, _ABOUT = "state", "about"
_TEMPORARY = ocp.path.atomicity_types.TMP_DIR_SUFFIX


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: Number of completed training steps.
        state: {name: array}.
        data_state: This process's position in the data.
        identity: The run that the checkpoint belongs to, as given to `Checkpoints.save`.
        damaged: One sentence for each newer checkpoint that was skipped because it is damaged.
    """

    step: int
    state: dict[str, jax.Array]
    data_state: Json
    identity: Json
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and with `keep_best` also the one with the highest score.

    Every process of a run must make the same calls in the same order. If a save fails in the background, the next call of
    any method raises `OSError`.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_best: bool) -> None:
        """Open a checkpoint directory without creating or changing it.

        Args:
            directory: Local or gs:// directory, created by the first save.
            keep: Number of newest checkpoints to keep, at least 1. Older ones are deleted once a newer one is complete.
            keep_best: Also keep the checkpoint with the highest score (the earliest of equals), however old it is.

        Raises:
            UserError: `keep` is less than 1.
        """
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept")
        self._directory = epath.Path(directory).resolve()
        self._damaged: set[int] = set()  # found by `restore`; deleted once a newer checkpoint is complete
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=_PreserveIntact(keep, keep_best=keep_best, damaged=self._damaged),
            ),
        )
        self._saving: int | None = None

    def save(
        self,
        step: int,
        state: Mapping[str, jax.Array],
        data_state: Mapping[str, Any],
        *,
        score: float | None = None,
        identity: Mapping[str, Any],
    ) -> None:
        """Start to save a checkpoint. Once this returns, arrays may be donated and the data state may be modified.

        Args:
            step: Number of completed training steps.
            state: {name: array}, of any dtype that orbax stores, including int4 and PRNG keys. Arrays must not be empty.
            data_state: This process's position in the data, as JSON. The same process gets it back.
            score: Higher is better (for a loss, pass its negative). None or a non-finite score is never the best.
            identity: The run that the checkpoint belongs to, as JSON (base fingerprint, configuration). The caller
                compares it when resuming.

        Raises:
            UserError: An intact checkpoint of this step exists.
            OSError: The previous save failed, or this one cannot be started.
        """
        self.wait()
        if step in self._intact():
            raise UserError(f"{self._directory / str(step)} already exists; an intact checkpoint is never overwritten")
        content = {
            "score": None if score is None or not math.isfinite(score) else float(score),
            "identity": dict(identity),
            "data_states": distributed.gather(dict(data_state)),
            "leaves": {name: _describe(leaf) for name, leaf in state.items()},
            "fingerprint": fingerprint(dict(state)),
        }
        content = json.loads(json.dumps(content))  # a private copy, as it is written in the background
        about = {"content": content, "checksum": _checksum(content)}
        parts = {_STATE: ocp.args.StandardSave(dict(state)), _ABOUT: ocp.args.JsonSave(about)}
        try:
            self._remove_leftovers()
            if step in self._steps():  # damaged
                self._manager.delete(step)
            self._damaged.discard(step)
            # force: the caller has decided to save; without it orbax skips any step that is not its newest.
            self._manager.save(step, args=ocp.args.Composite(**parts), metrics=_metrics(step, content), force=True)
        except Exception as error:  # of any kind: orbax and tensorstore have types of their own
            raise self._failed(step, error) from error
        self._saving = step

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Restored | None:
        """Restore the newest intact checkpoint. Returns None if there is no checkpoint at all.

        Everything that is read is verified against the checksums saved with it. A damaged checkpoint is reported (printed
        and in `Restored.damaged`), and the next older one is used instead.

        Args:
            abstract: {name: shape, dtype and sharding}. Each array is restored onto this sharding, regardless of the one
                it was saved with.

        Raises:
            UserError: Every checkpoint is damaged; or the newest intact one has other names, shapes or dtypes than
                `abstract`, or was saved by another number of processes, each at its own data position.
        """
        self.wait()
        candidates = self._steps()[::-1]
        messages: list[str] = []
        for candidate in candidates:
            try:
                return self._read(candidate, abstract, tuple(messages))
            except _DamagedError as damage:
                self._damaged.add(candidate)
                older = [step for step in candidates if step < candidate]
                then = f"; falling back to checkpoint {older[0]}" if older else ""
                messages.append(f"checkpoint {candidate} is damaged ({damage}){then}")
                if jax.process_index() == 0:
                    print(messages[-1], flush=True)
        if not messages:
            return None
        raise UserError(
            f"no checkpoint in {self._directory} is usable: {'; '.join(messages)}. "
            "Restore one from a backup, or remove the directory to start from step 0."
        )

    def restore_step(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> Restored:
        """Restore the checkpoint of a step, verified as by `restore`.

        Raises:
            UserError: It is missing or damaged.
        """
        self.wait()
        if step not in self._steps():
            raise UserError(f"checkpoint {self._directory / str(step)} is missing")
        try:
            return self._read(step, abstract, ())
        except _DamagedError as damage:
            raise UserError(f"checkpoint {self._directory / str(step)} is damaged: {damage}") from None

    def identity(self) -> Json | None:
        """The identity of the newest checkpoint whose record is readable, or None if there is none.

        No array is read, so a run can report which of its settings differ before names and shapes are compared.
        """
        self.wait()
        found = None
        if jax.process_index() == 0:
            records = (_readable_about(self._directory / str(step)) for step in reversed(self._steps_here()))
            found = next((record["identity"] for record in records if record is not None), None)
        return distributed.gather(found)[0]

    def latest_step(self) -> int | None:
        """The newest step on disk that is not known to be damaged."""
        self.wait()
        return max(self._intact(), default=None)

    def wait(self) -> None:
        """Wait until the last save is complete and the checkpoints it replaces are deleted.

        Raises:
            OSError: The last save failed.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                self._sync(step)
        except Exception as error:  # as in `save`
            raise self._failed(step, error) from error

    def close(self) -> None:
        """Wait for the last save and release orbax's threads. Afterwards only `close` may be called."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct], damaged: tuple[str, ...]) -> Restored:
        path = self._directory / str(step)
        content = _on_every_process("record", lambda: _read_about(path))
        _require_same_leaves(path, content["leaves"], {name: _describe(leaf) for name, leaf in abstract.items()})
        data_state = _own(content["data_states"], path)
        state = _on_every_process("arrays", lambda: _read_arrays(path, abstract))
        if fingerprint(state) != content["fingerprint"]:
            raise _DamagedError("arrays: fingerprint mismatch")
        return Restored(step, state, data_state, content["identity"], damaged)

    def _steps_here(self) -> list[int]:
        """The complete checkpoints that this process knows of, in ascending order."""
        return sorted(self._manager.all_steps())

    def _steps(self) -> list[int]:
        """The complete checkpoints that process 0 knows of, so that all processes try the same ones."""
        steps: list[int] = distributed.gather(self._steps_here())[0]
        return steps

    def _intact(self) -> list[int]:
        return [step for step in self._steps() if step not in self._damaged]

    def _remove_leftovers(self) -> None:
        """Remove what interrupted saves left behind. No save is in progress now.

        orbax's `cleanup_tmp_directories` does this when the directory is opened: that would delete a save in progress if
        another process only reads, and would not free the space of a failed save before the next one.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for path in self._directory.iterdir():
                if _TEMPORARY in path.name:
                    path.rmtree()

    def _sync(self, step: int) -> None:
        """Write to disk what orbax does not: the record, and the names. tensorstore does so with the arrays."""
        if (path := Path(self._directory / str(step))).is_dir():  # false for gs://
            sync_files(path / _ABOUT)
            sync_files(path)
            sync_directory(path.parent)

    def _failed(self, step: int, error: Exception) -> OSError:
        self._manager.reload()  # orbax has dropped the steps that the failed save was to replace; they are still on disk
        details = debug_log.record(error)
        return OSError(f"checkpoint {step} could not be written to {self._directory}: {_reason(error)}{details}")


class _Manager(ocp.CheckpointManager):  # type: ignore[misc]  # orbax ships no types
    """orbax's manager, with scores from our records and without its own checks for preemption."""

    def metrics(self, step: int) -> Json | None:
        record = _readable_about(self.directory / str(step))
        return None if record is None else _metrics(step, record)

    def reached_preemption(self, step: int) -> bool:
        # orbax would ask jax from a background thread, with the step of the checkpoint. The training loop asks after
        # every step with its own count (core/distributed.py); jax compares the two, and could miss the agreed step.
        del step
        return False


class _PreserveIntact:
    """A `PreservationPolicy`: the newest `keep` intact checkpoints, and the best one. Damaged ones count for neither."""

    def __init__(self, keep: int, *, keep_best: bool, damaged: set[int]) -> None:
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        latest = policies.LatestN(keep)
        self._policy = policies.AnyPreservationPolicy([latest, best] if keep_best else [latest])
        self._damaged = damaged

    def should_preserve(self, checkpoints: Sequence[Any], *, context: policies.PreservationContext) -> Sequence[bool]:
        intact = sorted((one for one in checkpoints if one.step not in self._damaged), key=lambda one: one.step)
        decisions = zip(intact, self._policy.should_preserve(intact, context=context), strict=True)
        kept = {one.step for one, preserved in decisions if preserved}
        return [one.step in kept for one in checkpoints]


class _DamagedError(Exception):
    """A checkpoint cannot be read, or differs from what was saved."""


def _score(metrics: Json) -> tuple[float, int]:
    """The sort key of a checkpoint: the higher score, and of equal scores the earlier step."""
    return metrics["score"], -metrics["step"]


def _metrics(step: int, content: Json) -> Json | None:
    """What orbax's policies see of a record; None without a score."""
    return None if content["score"] is None else {"score": content["score"], "step": step}


def _readable_about(path: epath.Path) -> Json | None:
    try:
        return _read_about(path)
    except Exception:  # damaged in any way, which `restore` reports
        return None


def _read_about(path: epath.Path) -> Json:
    about = ocp.JsonCheckpointHandler().restore(path / _ABOUT)
    if about["checksum"] != _checksum(about["content"]):
        raise _DamagedError("checksum mismatch")
    return about["content"]


def _read_arrays(path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    # With the handler, not the manager: the manager waits for all processes, forever if one of them fails.
    return ocp.StandardCheckpointHandler().restore(path / _STATE, args=ocp.args.StandardRestore(dict(abstract)))


def _require_same_leaves(path: epath.Path, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    differences = [f"{name}: only in the checkpoint" for name in saved if name not in wanted]
    differences += [f"{name}: only in this run" for name in wanted if name not in saved]
    differences += [
        f"{name}: {saved[name]} in the checkpoint, {wanted[name]} in this run"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if differences:
        raise UserError(
            f"{path} belongs to another model, method or optimizer. Differences:\n  " + "\n  ".join(differences) + "\n"
            "Use the settings it was saved with, or another workdir."
        )


def _own(data_states: list[Json], path: epath.Path) -> Json:
    """This process's position in the data. If all positions are equal, the number of processes may change."""
    if len(data_states) == jax.process_count():
        return data_states[jax.process_index()]
    if all(state == data_states[0] for state in data_states):
        return data_states[0]
    raise UserError(
        f"{path} was written by {len(data_states)} processes with different positions in the data, but this run has "
        f"{jax.process_count()}. Resume with {len(data_states)} processes."
    )


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(content: Json) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on_every_process(what: str, read: Callable[[], T]) -> T:
    """The result of `read`. If it fails on any process, all of them raise `_DamagedError` and so stay in step."""
    results, problem, details = [], "", ""
    with warnings.catch_warnings():
        # When one array cannot be read, orbax abandons its reads of the others, and Python warns about that.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            results.append(read())
        except Exception as error:  # of any kind: the other processes must not wait for this one
            problem, details = _reason(error), debug_log.record(error)
        if problem:
            gc.collect()  # collect the abandoned reads while the warning is ignored
    if problems := [problem for problem in distributed.gather(problem) if problem]:
        raise _DamagedError(f"{what}: {problems[0]}{details}")
    return results[0]


def _reason(error: BaseException) -> str:
    """What the operating system says of an error's root cause, or its first line, short enough for a sentence."""
    error = root_cause(error)
    if number := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore names it at the end of a long line
        return os.strerror(int(number[1]))
    line = next(iter(str(error).strip().splitlines()), "")
    return line if isinstance(error, _DamagedError) else f"{type(error).__name__}: {line[:200]}"
