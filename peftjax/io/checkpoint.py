"""Checkpoints of exactly what is trained: written in the background, complete or absent, checked bit for bit when read.

A checkpoint is a directory named by its step, written by orbax under a temporary name and renamed when complete:

    <step>/state/            the arrays
    <step>/about/metadata    one JSON object: score, identity, data state of every process, the names, shapes and dtypes
                             of the arrays, their fingerprint, and a checksum of this object itself
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

from peftjax.core.fingerprint import fingerprint

Json = dict[str, Any]
T = TypeVar("T")

_STATE, _ABOUT = "state", "about"
_TEMPORARY = ocp.path.atomicity_types.TMP_DIR_SUFFIX


@dataclass(frozen=True)
class Restored:
    """A checkpoint as read back. `damaged` holds one sentence for each newer checkpoint that had to be passed over."""

    step: int
    state: dict[str, jax.Array]
    data_state: Json
    identity: Json
    damaged: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and with `keep_best` also the one with the highest score.

    Every process of a run makes the same calls in the same order. A save that fails in the background raises `OSError`
    at the next call of any method.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int, keep_best: bool) -> None:
        """
        Args:
            directory: local or gs:// directory; made at the first save.
            keep: how many of the newest to keep, at least 1; there is one more from the end of a save to the next call.
            keep_best: keep the checkpoint of the highest score (the first of equals) however old it is.
        """
        if keep < 1:
            raise ValueError(f"checkpoint.keep is {keep}; at least 1 checkpoint must be kept")
        self._directory = epath.Path(directory).resolve()
        self._keep, self._keep_best = keep, keep_best
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._saving: int | None = None
        self._damaged: set[int] = set()  # known from `restore`; on disk until a newer checkpoint is complete

    def save(
        self,
        step: int,
        state: Mapping[str, jax.Array],
        data_state: Mapping[str, Any],
        *,
        score: float | None = None,
        identity: Mapping[str, Any],
    ) -> None:
        """Starts writing a checkpoint; the arrays may be donated and the data state changed as soon as it returns.

        Args:
            step: the number of training steps behind this state.
            state: {name: array}, any dtype that orbax stores (int4 and PRNG keys too; not empty arrays).
            data_state: JSON; this process's own position in the data, which comes back to the same process.
            score: the higher the better (so minus a loss); None or not finite: never the best.
            identity: JSON; what this run is (base fingerprint, configuration ...), for the caller to compare at resume.

        Raises:
            ValueError: there is an intact checkpoint of this step.
            OSError: the save before this one failed, or this one cannot be started.
        """
        self.wait()
        if step in self._intact():
            raise ValueError(f"{self._directory / str(step)} exists already; a checkpoint is written once")
        content = {
            "score": None if score is None or not math.isfinite(score) else float(score),
            "identity": dict(identity),
            "data_states": _gather(dict(data_state)),
            "leaves": {name: _describe(leaf) for name, leaf in state.items()},
            "fingerprint": fingerprint(dict(state)),
        }
        content = json.loads(json.dumps(content))  # a copy nobody else changes while it is written
        items = ocp.args.Composite(
            **{
                _STATE: ocp.args.StandardSave(dict(state)),
                _ABOUT: ocp.args.JsonSave({"content": content, "checksum": _checksum(content)}),
            }
        )
        try:
            self._remove_leftovers()
            # force: a damaged checkpoint of this step, or on gs:// an unfinished one, is replaced.
            self._checkpointer.save(self._directory / str(step), args=items, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._saving = step
        self._damaged.discard(step)

    def restore(self, abstract: Mapping[str, jax.ShapeDtypeStruct], *, step: int | None = None) -> Restored | None:
        """Reads the newest intact checkpoint, or that of `step`; None if there is no checkpoint at all.

        Everything read is compared with the checksums written with it. A damaged checkpoint is reported (printed, and
        in `Restored.damaged`) and the one before it is used.

        Args:
            abstract: {name: shape, dtype and sharding}; each array is read onto that sharding, whichever it had before.

        Raises:
            ValueError: every checkpoint (or that of `step`) is damaged; or one is intact but has other names, shapes or
                dtypes than `abstract`, or the data positions of another number of processes: it belongs to another run.
        """
        self.wait()
        steps = self._common_steps()
        if step is not None and step not in steps:
            raise ValueError(f"there is no checkpoint {step} in {self._directory}; there are {steps or 'none'}")
        candidates = steps[::-1] if step is None else [step]
        messages: list[str] = []
        for candidate in candidates:
            try:
                return self._read(candidate, abstract, tuple(messages))
            except _DamagedError as damage:
                self._damaged.add(candidate)
                older = [step for step in candidates if step < candidate]
                then = f"; going back to checkpoint {older[0]}" if older else ""
                messages.append(f"checkpoint {candidate} is damaged ({damage}){then}")
                if jax.process_index() == 0:
                    print(messages[-1], flush=True)
        if not messages:
            return None
        raise ValueError(
            f"no checkpoint in {self._directory} can be used: {'; '.join(messages)}. "
            "Put back a copy of one, or remove the directory to start from step 0."
        )

    def identity(self) -> Json | None:
        """What the newest checkpoint whose record is readable says it belongs to; None if there is none.

        Reads no array, so a run can say which of its settings differ before it compares names and shapes.
        """
        self.wait()
        found = None
        if jax.process_index() == 0:
            records = (self._record(step) for step in reversed(self._steps()))
            found = next((record["identity"] for record in records if record is not None), None)
        return _gather(found)[0]

    def best_step(self) -> int | None:
        """The step of the highest score among the checkpoints on disk (the first of equals); None without scores."""
        self.wait()
        return _gather(self._best() if jax.process_index() == 0 else None)[0]

    def latest_step(self) -> int | None:
        """The newest step on disk that is not known to be damaged."""
        self.wait()
        return max(self._intact(), default=None)

    def wait(self) -> None:
        """Returns when nothing is being written any more, and removes the checkpoints that are no longer to be kept.

        Raises:
            OSError: the last save failed.
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
        """Waits, and frees orbax's threads. Nothing else may be called afterwards but `close` itself."""
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
            raise _DamagedError("arrays: not the ones that were saved")
        return Restored(step, state, data_state, content["identity"], damaged)

    def _steps(self) -> list[int]:
        """The complete checkpoints, as this process sees the directory."""
        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self._directory))

    def _common_steps(self) -> list[int]:
        """The complete checkpoints as process 0 sees them, so that all processes go through the same ones."""
        steps: list[int] = _gather(self._steps() if jax.process_index() == 0 else None)[0]
        return steps

    def _intact(self) -> list[int]:
        return [step for step in self._common_steps() if step not in self._damaged]

    def _record(self, step: int) -> Json | None:
        try:
            return _read_about(self._directory / str(step))
        except Exception:  # damaged: `restore` is the one to report it
            return None

    def _best(self) -> int | None:
        scores = {}
        for step in self._steps():
            record = None if step in self._damaged else self._record(step)
            if record is not None and record["score"] is not None:
                scores[step] = record["score"]
        return max(scores, key=lambda step: (scores[step], -step), default=None)

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
        """Removes what a run that was killed in the middle of a save left behind; nothing else is being written now."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for path in self._directory.iterdir():
                if _TEMPORARY in path.name:
                    path.rmtree()

    def _failed(self, step: int, error: Exception) -> OSError:
        return OSError(f"checkpoint {step} could not be written to {self._directory}: {_reason(error)}")


class _DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was written."""


def _read_about(path: epath.Path) -> Json:
    about = ocp.JsonCheckpointHandler().restore(path / _ABOUT)
    if about["checksum"] != _checksum(about["content"]):
        raise ValueError("not the one that was saved")
    return about["content"]


def _read_arrays(path: epath.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    # The handler and not the checkpointer: that one waits for the other processes, in vain if one of them fails.
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
        raise ValueError(
            f"{path} is of another model, method or optimizer; what differs:\n  " + "\n  ".join(differences) + "\n"
            "Train with the settings it was made with, or in another working directory."
        )


def _own(data_states: list[Json], path: epath.Path) -> Json:
    """This process's position in the data. Positions that are all the same serve any number of processes."""
    if len(data_states) == jax.process_count():
        return data_states[jax.process_index()]
    if all(state == data_states[0] for state in data_states):
        return data_states[0]
    raise ValueError(
        f"{path} was written by {len(data_states)} processes, each with its own position in the data, and this run has "
        f"{jax.process_count()}. Resume it with {len(data_states)}."
    )


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _checksum(content: Json) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _on_every_process(what: str, read: Callable[[], T]) -> T:
    """What `read` returns; if it fails on any process, damage on all of them, so that they stay together."""
    results, problem = [], ""
    with warnings.catch_warnings():
        # When one array cannot be read, orbax drops its reads of the others, and Python warns of that.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            results.append(read())
        except Exception as error:
            problem = _reason(error)
        if problem:
            gc.collect()  # here, and not at some later moment when it is warned of
    if problems := [problem for problem in _gather(problem) if problem]:
        raise _DamagedError(f"{what}: {problems[0]}")
    return results[0]


def _gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in the order of the processes."""
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
    """The first line of what went wrong at the root of an error, short enough for a sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"
