"""Checkpoints of the trainable state: saved asynchronously and atomically, and verified on restore.

A checkpoint is a directory named after its step. Orbax writes it under a temporary name and renames it when complete:

    <step>/state/            the arrays
    <step>/about/metadata    the record, a JSON object: score, identity, data state of every process, the names, shapes
                             and dtypes of the arrays, their fingerprint, and a checksum of the record itself
"""

import gc
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # type: ignore[import-untyped]
from jax.experimental import multihost_utils

from peftjax.core.errors import UserError
from peftjax.core.fingerprint import fingerprint

Json = dict[str, Any]
T = TypeVar("T")

_STATE, _ABOUT = "state", "about"
_TEMPORARY = ocp.path.atomicity_types.TMP_DIR_SUFFIX


@dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        step: Number of training steps behind the state.
        state: {name: array} with the requested shardings.
        data_state: Position of this process in the data.
        identity: Description of the run that wrote the checkpoint.
        damaged: One message for each newer checkpoint that was skipped because it is damaged.
    """

    step: int
    state: dict[str, jax.Array]
    data_state: Json
    identity: Json
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """Context manager for the checkpoints of one run.

    It keeps the newest `keep` checkpoints and, with `keep_best`, the one with the highest score. In a distributed run,
    every process must make the same calls in the same order. If a save fails in the background, the next call of any
    method raises `OSError`.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_best: bool) -> None:
        """
        Args:
            directory: Local or gs:// directory, created by the first save.
            keep: Number of newest checkpoints to keep, at least 1. The first call after a completed save removes older ones.
            keep_best: Also keep the checkpoint with the highest score, the earliest among equals.

        Raises:
            UserError: `keep` is less than 1.
        """
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; keep at least 1 checkpoint")
        self._directory = epath.Path(directory).resolve()
        self._keep, self._keep_best = keep, keep_best
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saving: int | None = None
        self._damaged: set[int] = set()  # found by `restore`; removed once a newer checkpoint is complete

    def save(
        self,
        step: int,
        state: Mapping[str, jax.Array],
        data_state: Mapping[str, Any],
        *,
        score: float | None = None,
        identity: Mapping[str, Any],
    ) -> None:
        """Start writing a checkpoint in the background.

        When this method returns, the arrays may be donated and `data_state` may be modified.

        Args:
            step: Number of training steps behind the state.
            state: {name: array} of any dtype that Orbax stores, including int4 and PRNG keys. Empty arrays are not
                supported.
            data_state: JSON object with the position of this process in the data, restored to the same process.
            score: Higher is better, so the negative of a loss. A checkpoint whose score is None or not finite is never
                the best.
            identity: JSON object that describes the run (fingerprint of the base, configuration), to compare on resume.

        Raises:
            UserError: An intact checkpoint of this step exists.
            OSError: The previous save failed, or this one could not be started.
        """
        self.wait()
        if step in self._intact():
            raise UserError(f"{self._directory / str(step)} already exists; move it away to save this step again")
        content = {
            "score": None if score is None or not math.isfinite(score) else float(score),
            "identity": dict(identity),
            "data_states": _gather(dict(data_state)),
            "leaves": {name: _describe(leaf) for name, leaf in state.items()},
            "fingerprint": fingerprint(dict(state)),
        }
        content = json.loads(json.dumps(content))  # a copy that the caller cannot modify while it is written
        items = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(dict(state)),
                _ABOUT: ocp.args.JsonSave({"content": content, "checksum": _checksum(content)}),
            }
        )
        try:
            self._remove_leftovers()
            # force: replace a damaged checkpoint of this step or, on gs://, an unfinished one.
            self._checkpointer.save(self._directory / str(step), args=items, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step
        self._damaged.discard(step)

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct], *, step: int | None = None) -> Restored | None:
        """Restore the newest intact checkpoint, or the checkpoint of `step`.

        The contents are verified against the stored checksum and fingerprint. A damaged checkpoint is reported on stdout
        and in `Restored.damaged`, and the one before it is tried.

        Args:
            abstract: {name: shape, dtype and sharding}. Arrays are restored to these shardings, which may differ from
                those at the save.
            step: Step to restore; None for the newest.

        Returns:
            The restored checkpoint, or None if there are no checkpoints.

        Raises:
            UserError: There is no checkpoint of `step`; every candidate is damaged; or an intact checkpoint belongs to
                another run: its names, shapes or dtypes differ from `abstract`, or it holds the distinct data positions
                of another number of processes.
        """
        self.wait()
        steps = self._common_steps()
        if step is not None and step not in steps:
            raise UserError(f"no checkpoint {step} in {self._directory}; available: {steps or 'none'}")
        candidates = steps[::-1] if step is None else [step]
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
            "Put back a copy of one, or remove the directory to start from step 0."
        )

    def identity(self) -> Json | None:
        """Return the identity in the newest checkpoint with a readable record, or None if there is none.

        No arrays are read, so a run can report settings that differ before names and shapes are compared.
        """
        self.wait()
        found = None
        if jax.process_index() == 0:
            records = (self._record(step) for step in reversed(self._steps()))
            found = next((record["identity"] for record in records if record is not None), None)
        return _gather(found)[0]

    def best_step(self) -> int | None:
        """Return the step with the highest score on disk, the earliest among equals, or None without scores."""
        self.wait()
        return _gather(self._best() if jax.process_index() == 0 else None)[0]

    def latest_step(self) -> int | None:
        """Return the newest step on disk that is not known to be damaged, or None."""
        self.wait()
        return max(self._intact(), default=None)

    def wait(self) -> None:
        """Wait for the running save and remove checkpoints beyond those to keep.

        Raises:
            OSError: The save failed.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error
        if jax.process_index() == 0:
            self._prune()

    def close(self) -> None:
        """Wait for the running save and release the threads of Orbax. Only `close` may be called afterwards."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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

    def _steps(self) -> list[int]:
        """List the complete checkpoints on disk, as this process sees them."""
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self._directory))

    def _common_steps(self) -> list[int]:
        """List the complete checkpoints as process 0 sees them, so that all processes try the same ones."""
        steps: list[int] = _gather(self._steps() if jax.process_index() == 0 else None)[0]
        return steps

    def _intact(self) -> list[int]:
        return [step for step in self._common_steps() if step not in self._damaged]

    def _record(self, step: int) -> Json | None:
        try:
            return _read_about(self._directory / str(step))
        except Exception:  # damaged; `restore` reports it
            return None

    def _best(self) -> int | None:
        scores = {}
        for step in self._steps():
            record = None if step in self._damaged else self._record(step)
            if record is not None and record["score"] is not None:
                scores[step] = record["score"]
        return max(scores, key=lambda step: (scores[step], -step), default=None)

    # Retention is not left to `ocp.CheckpointManager` (0.12.8): it drops the old steps from its list before the new save is
    # complete, so after a failed save it never removes them; it cleans up temporary directories only when it is constructed;
    # and it would have to be told which checkpoints are damaged and to read the scores from the records.
    def _prune(self) -> None:
        steps = self._steps()
        kept: set[int | None] = set([step for step in steps if step not in self._damaged][-self._keep :])
        if self._keep_best:
            kept.add(self._best())
        for step in steps:
            if step in kept:
                continue
            (self._directory / str(step)).rmtree()
            self._damaged.discard(step)

    def _remove_leftovers(self) -> None:
        """Remove the temporary directories of failed or killed saves. No save may be running."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for path in self._directory.iterdir():
                if _TEMPORARY in path.name:
                    path.rmtree()

    def _failed(self, step: int, error: Exception) -> OSError:
        return OSError(f"checkpoint {step} could not be written to {self._directory}: {_reason(error)}")


class _DamagedError(Exception):
    """A checkpoint cannot be read or differs from what was written."""


def _read_about(path: epath.Path) -> Json:
    about = ocp.JsonCheckpointHandler().restore(path / _ABOUT)
    if about["checksum"] != _checksum(about["content"]):
        raise OSError("checksum mismatch")
    return about["content"]


def _read_arrays(path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    # The handler, not the checkpointer, which would wait at a barrier that a failing process never reaches.
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
            "Use the settings of the run that wrote it, or another workdir."
        )


def _own(data_states: list[Json], path: epath.Path) -> Json:
    """Select the data position of this process. Identical positions are valid for any number of processes."""
    if len(data_states) == jax.process_count():
        return data_states[jax.process_index()]
    if all(state == data_states[0] for state in data_states):
        return data_states[0]
    raise UserError(
        f"{path} was written by {len(data_states)} processes with different positions in the data, but this run has "
        f"{jax.process_count()}; resume with {len(data_states)} processes"
    )


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(content: Json) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on_every_process(what: str, read: Callable[[], T]) -> T:
    """Call `read` on every process and return its result.

    Raises:
        _DamagedError: It failed on any process; raised on all of them, so that they stay in step.
    """
    results, problem = [], ""
    with warnings.catch_warnings():
        # When one array cannot be read, Orbax abandons the pending reads of the others, which Python warns about.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            results.append(read())
        except Exception as error:
            problem = _reason(error)
        if problem:
            gc.collect()  # collect the abandoned reads while the warning is filtered
    if problems := [problem for problem in _gather(problem) if problem]:
        raise _DamagedError(f"{what}: {problems[0]}")
    return results[0]


def _gather(value: Any) -> list[Any]:
    """Gather a JSON value from every process, ordered by process index."""
    text = json.dumps(value)
    if jax.process_count() == 1:
        return [json.loads(text)]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([own.size]))[:, 0]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _reason(error: BaseException) -> str:
    """Describe the root cause of an error in one short line."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"
