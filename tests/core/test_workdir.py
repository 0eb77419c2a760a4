"""A run writes only into its own directory, and only one process does."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftjax.core import workdir as workdirs
from peftjax.core.errors import UserError
from peftjax.core.workdir import MARK, check, claim
from tests.runs import files

RUN_CONFIG = json.dumps({name: {} for name in ("model", "method", "data", "optim", "train", "checkpoint", "task")})


def write(root: Path, *names: str, text: str = "mine") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


OURS: dict[str, Callable[[Path], object]] = {
    "new": lambda place: None,
    "empty": lambda place: place.mkdir(),
    "marked": lambda place: write(place, MARK, "anything", text=""),
    "a run before marks": lambda place: (write(place, "config.json", text=RUN_CONFIG), write(place, "notes.txt")),
    "killed before its config.json": lambda place: write(place, "metrics.jsonl", "events.out.tfevents.1", text=""),
    "its config.json lost": lambda place: write(place, "checkpoints/7/about/metadata"),
    "a sweep": lambda place: write(place, "sweep.json", "rank=4/adapter/adapter_config.json"),
    "a log and a new volume's folder": lambda place: write(place, "train.log", "lost+found/part"),
    "an unfinished sweep": lambda place: write(place, "rank=4/config.json", "rank=8/config.json", text=RUN_CONFIG),
}
FOREIGN = {
    "a model": ("config.json", "model.safetensors"),
    "notes": ("thesis.tex",),
    "an adapter": ("adapter/adapter_config.json",),
    "a hidden file": (".gitignore",),
    "a folder with a model": ("llama/config.json",),
}


@pytest.mark.parametrize("kind", OURS)
def test_a_directory_that_is_new_empty_or_of_a_run_is_ours(kind: str, tmp_path: Path) -> None:
    OURS[kind](tmp_path / "run")
    check(tmp_path / "run")
    existed = (tmp_path / "run").exists() and any((tmp_path / "run").iterdir())
    with claim(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / MARK).read_text()
    assert (tmp_path / "run" / MARK).exists() == existed
    assert (tmp_path / "run").exists() == (kind != "new")


@pytest.mark.parametrize("kind", FOREIGN)
def test_any_other_directory_is_refused_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "place", *FOREIGN[kind], text='{"model_type": "llama"}')
    before = files(tmp_path)
    name = FOREIGN[kind][0].split("/")[0]
    with (
        pytest.raises(UserError, match=rf"--workdir=.*place holds other files \({name}.*\) and no run"),
        claim(tmp_path / "place"),
    ):
        pytest.fail("claimed")
    assert files(tmp_path) == before


@pytest.mark.parametrize("workdir", [Path("gs://bucket/run"), Path("s3://bucket/run").absolute()])
def test_the_address_of_a_bucket_is_refused(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"(gs|s3):// is not supported; choose a local directory"), claim(workdir):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_written_names_the_file_and_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(mark: Path, *, shared: bool) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(mark))

    monkeypatch.setattr(workdirs, "_try_lock", full)
    message = rf"--workdir=.*: cannot write to .*{MARK}: No space left on device; make it writable, free some space, or"
    with pytest.raises(UserError, match=message), claim(tmp_path):
        pytest.fail("claimed")


def test_the_directory_of_the_base_model_is_refused_with_those_inside_and_around_it(tmp_path: Path) -> None:
    model = write(tmp_path / "zoo" / "model", "config.json")
    (model / "empty").mkdir()
    (tmp_path / "link").symlink_to(model)
    for place, words in (
        (model, "is the directory"), (tmp_path / "link", "is the directory"), (model / "empty", "is inside the directory"),
        (model / "runs" / "a", "is inside the directory"), (tmp_path / "zoo", "contains the directory"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"--workdir=\S+ {words} of the base model, model.path="):
            check(place, str(model))
    check(tmp_path / "zoo" / "model-run", str(model))
    check(tmp_path / "run", "organization/name")


def test_a_numbered_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run = write(
        tmp_path / "run", MARK, "checkpoints/10/about/metadata", "checkpoints/20/state/d/0", "checkpoints/notes/a"
    )
    write(run, "checkpoints/10/.nfs0001")
    check(run)  # 20 is damaged, but a checkpoint
    write(run, "checkpoints/2024/photo.jpg")
    with pytest.raises(UserError, match=r"checkpoints/2024 is not a checkpoint of this run .* move it out of"):
        check(run)


def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from peftjax.core.workdir import claim
with claim(Path({str(tmp_path / "run")!r})):
    Path({str(tmp_path / "run" / "config.json")!r}).write_text("")
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        before = files(tmp_path)
        said = rf"run is in use by process {child.pid} on {os.uname().nodename}; wait"
        with pytest.raises(UserError, match=said), claim(tmp_path / "run"):
            pytest.fail("claimed")
        assert files(tmp_path) == before
        child.kill()
    with (
        claim(tmp_path / "run"),
        pytest.raises(UserError, match=rf"in use by process {os.getpid()} on"),
        claim(tmp_path / "run"),
    ):
        pytest.fail("claimed twice")
    assert (tmp_path / "run" / MARK).read_text().count("\n") == 1  # nobody holds it


def test_a_holder_on_another_host_is_waited_for_because_that_host_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, MARK, "config.json", text="A note.\n17 elsewhere\n")
    monkeypatch.setattr(workdirs, "LEASE", 0.2)
    with (tmp_path / MARK).open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said = "in use by process 17 on elsewhere; wait"
        with pytest.warns(UserWarning, match=said), pytest.raises(UserError, match=said), claim(tmp_path):
            pytest.fail("claimed")
        monkeypatch.setattr(workdirs.time, "sleep", lambda seconds: fcntl.flock(held, fcntl.LOCK_UN))  # the server does
        with pytest.warns(UserWarning, match="waiting"), claim(tmp_path):
            assert str(os.getpid()) in (tmp_path / MARK).read_text()


def test_without_locks_the_run_warns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdirs.fcntl, "flock", refuse)
    with (
        pytest.warns(UserWarning, match=r"this file system has no locks \(No locks available\)"),
        claim(tmp_path / "run"),
    ):
        assert (tmp_path / "run" / MARK).exists()


def test_processes_that_share_a_workdir_keep_others_out_and_take_turns(tmp_path: Path) -> None:
    place = tmp_path / "sweep"
    with claim(place, shared=True):
        with claim(place, shared=True), pytest.raises(UserError, match="is in use by process"), claim(place):
            pytest.fail("claimed")
        assert (place / MARK).exists()  # the first one still uses it
        with workdirs.turn(place):
            other = os.open(place / workdirs.TURN, os.O_RDWR)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    with claim(place), pytest.raises(UserError, match="is in use"), claim(place, shared=True):
        pytest.fail("claimed")
