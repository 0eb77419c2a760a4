"""The workdir of a run: its mark and its lock.

A run writes only into a directory that is new, empty, or marked as a workdir. The mark is a file that is also the lock of
the process that uses the directory:

    .peftjax    a line of text; while a run is using the directory, a second line with its process ID and host

The jobs that train the parts of a sweep share its directory. They take turns to write its results (`turn`).
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from peftjax.core import debug_log, distributed
from peftjax.core.errors import UserError
from peftjax.core.home import expand
from peftjax.core.listing import enumerate_some

MARK = ".peftjax"
TURN = ".peftjax-turn"  # the lock of the job that writes shared files
LEASE = 120.0  # seconds after which a file server has released the locks of a host that is gone; NFSv4: 90 by default
_NOTE = "This directory belongs to a run of peftjax. This file is its lock: do not delete it while the run is active.\n"
_SECTIONS = {"model", "method", "data", "optim", "train", "checkpoint"}  # in the config.json of every version
# What the directory of a checkpoint holds.
_STEP = {"state", "about", "_CHECKPOINT_METADATA", "descriptor", "commit_success.txt"}
_SCHEMES = ("gs:", "s3:", "hdfs:", "http:", "https:", "file:")  # Path collapses the slashes that follow
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def check(workdir: Path, base: str = "") -> None:
    """Check that a run of the base model `base`, a directory or a hub id, may write into `workdir`. Nothing is changed.

    Raises:
        UserError: The directory cannot be written; it is the directory of the base model, inside it, or around it; it holds
            files, and no run has written there; or its checkpoints/ holds a numbered directory that is not a checkpoint.
    """
    if scheme := next((part for part in workdir.parts if part in _SCHEMES), None):
        raise UserError(
            f"--workdir={workdir}: {scheme}// is not supported; choose a local directory, or one where the bucket is mounted"
        )
    here = workdir.absolute()
    place = next(path for path in (here, *here.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is not writable" if place.is_dir() else "is a file"
        raise UserError(f"--workdir={workdir}: {place} {why}; choose a directory that can be created or written to")
    if base and (model := expand(base)).is_dir():
        mine, theirs = workdir.resolve(), model.resolve()
        around = mine in theirs.parents and not _is_ours(workdir)
        where = "is" if mine == theirs else "is inside" if theirs in mine.parents else "contains" if around else ""
        if where:
            raise UserError(
                f"--workdir={workdir} {where} the directory of the base model, model.path={base}; choose another workdir"
            )
    if not _is_ours(workdir):
        others = enumerate_some(sorted(path.name for path in workdir.iterdir() if not _is_harmless(path.name)), 3)
        raise UserError(
            f"--workdir={workdir} holds other files ({others}) and no run; choose a new or an empty directory"
        )
    if foreign := _foreign_steps(workdir / "checkpoints"):
        raise UserError(
            f"{foreign[0]} is not a checkpoint of this run and would be deleted as a damaged one; move it out of "
            f"{foreign[0].parent}"
        )


@contextlib.contextmanager
def claim(workdir: Path, base: str = "", *, shared: bool = False) -> Iterator[None]:
    """Mark a directory as a workdir and lock it for this run; process 0 does this for all processes.

    The kernel releases the lock when the process ends, however it ends. The lock also holds between hosts that share the
    directory over NFS. If the process that holds it is on another host, this function waits `LEASE` seconds, after which
    a file server has released the locks of a host that has disappeared. A directory that is still empty at the end is
    removed, if this function created it. A `shared` directory can be used by several processes that all ask for that.

    Raises:
        UserError: As `check`; or another process is using the directory, and at least one of the two does not share it.
    """

    def take() -> None:
        try:
            check(workdir, base)
            held.enter_context(_lock(workdir, shared=shared))
        except OSError as error:
            place = error.filename or workdir
            raise UserError(
                f"--workdir={workdir}: cannot write to {place}: {error.strerror or error}; make it writable, free some space, or "
                "choose another workdir"
            ) from None

    with contextlib.ExitStack() as held:
        distributed.on_first(take)
        debug_log.open_in(workdir, jax.process_index())
        yield


@contextlib.contextmanager
def turn(workdir: Path) -> Iterator[None]:
    """Wait until no other process is in a `with turn(workdir)` block of this directory.

    On a file system without locks, it does not wait.
    """
    descriptor = os.open(workdir / TURN, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(workdir: Path, *, shared: bool) -> Iterator[None]:
    """Create, mark and lock a directory.

    At the end, unless it is shared: if it has no other files, remove its mark, and the directory if this function created it.
    """
    here = workdir.absolute()
    created = [path for path in (here, *here.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    mark = workdir / MARK
    deadline = 0.0
    while (descriptor := _try_lock(mark, shared=shared)) is None:
        holder, host = _holder(mark)
        if not deadline:
            deadline = time.monotonic() + (LEASE if host not in ("", socket.gethostname()) else 0.0)
            if time.monotonic() < deadline:
                warnings.warn(
                    f"--workdir={workdir} is in use by {holder}; waiting up to {LEASE:.0f} s, in case that host is gone",
                    stacklevel=4,
                )
        if time.monotonic() >= deadline:
            raise UserError(
                f"--workdir={workdir} is in use by {holder}; wait until it has ended, or choose another workdir"
            )
        time.sleep(min(1.0, LEASE))
    try:
        _write(descriptor, f"{_NOTE}{os.getpid()} {socket.gethostname()}\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the disk is full, or the directory was removed
                if not shared and [path.name for path in workdir.iterdir()] == [MARK]:
                    mark.unlink()
                    for path in created:
                        path.rmdir()
                else:
                    _write(descriptor, _NOTE)
    finally:
        os.close(descriptor)


def _write(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _try_lock(mark: Path, *, shared: bool) -> int | None:
    """The descriptor of the locked file, or None if another process has locked it.

    flock, not lockf: a lock of lockf would be lost when any other descriptor of the file is closed in this process. On
    Linux, NFS turns flock into the same lock on the server.
    """
    while True:
        descriptor = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            warnings.warn(
                f"--workdir={mark.parent}: this file system has no locks ({error.strerror}); make sure that no other "
                "process uses the directory",
                stacklevel=2,
            )
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), mark.stat()):
                return descriptor
        os.close(descriptor)  # its holder removed the file in the meantime


def _holder(mark: Path) -> tuple[str, str]:
    """A description of the process that holds the lock, and its host ("" if unknown)."""
    with contextlib.suppress(OSError, ValueError):
        pid, host = mark.read_text(encoding="utf-8", errors="replace").splitlines()[-1].split()
        return f"process {int(pid)} on {host}", host
    return "another process", ""


def _is_ours(workdir: Path) -> bool:
    """Whether a directory is new, empty, or a workdir; also one that was written before there were marks."""
    if not workdir.exists() or (workdir / MARK).is_file():
        return True
    paths = [path for path in workdir.iterdir() if not _is_harmless(path.name)]
    names = {path.name for path in paths}
    return (
        all(name == "metrics.jsonl" or name.startswith("events.") for name in names)  # killed before its config.json
        or "sweep.json" in names
        or is_run(workdir)
        or all(is_run(path) for path in paths)  # an unfinished sweep
    )


def _is_harmless(name: str) -> bool:
    """Whether a name belongs to a log, or to a file that file systems and file managers create: no run replaces these."""
    return name.endswith((".log", ".out", ".err")) or name.startswith(".nfs") or name in ("lost+found", ".DS_Store")


def is_run(directory: Path) -> bool:
    """Whether a run has written its config.json or a checkpoint into a directory."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and all(isinstance(config.get(name), dict) for name in _SECTIONS):
            return True
    return any(directory.glob("checkpoints/*/about/metadata"))


def _foreign_steps(checkpoints: Path) -> list[Path]:
    """The numbered directories that hold anything but the parts of a checkpoint."""
    if not checkpoints.is_dir():
        return []
    steps = [path for path in checkpoints.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(path for path in steps if not {part.name for part in path.iterdir() if part.name[0] != "."} <= _STEP)
