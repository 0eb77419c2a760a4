"""What libraries print about an error goes to debug.log in the workdir."""

import _thread
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftjax.core import debug_log


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `divert` changes is as before at the end."""
    monkeypatch.setattr(debug_log, "_log", debug_log._Log())
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    debug_log._log.open(Path(os.devnull))  # closes the file
    for name in debug_log._LOGGERS:
        logging.getLogger(name).removeFilter(debug_log._divert_record)


def from_foreign_thread(text: str) -> None:
    """Print from a thread that `threading` does not know."""
    done = threading.Lock()
    done.acquire()
    _thread.start_new_thread(lambda: (print(text, file=sys.stderr), done.release()), ())
    assert done.acquire(timeout=10)


@pytest.mark.usefixtures("restored")
def test_the_libraries_write_to_the_file_and_everything_else_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debug_log.divert()
    from_foreign_thread("too early")
    assert capsys.readouterr().err == "too early\n"
    debug_log.open_in(tmp_path, 0)
    assert not list(tmp_path.iterdir())  # no entry, no file

    async def read() -> None:
        raise KeyError("an abandoned read")

    from_foreign_thread("from tensorstore")
    logging.getLogger("absl").error("from %s", "orbax")
    sys.unraisablehook(type("Unraisable", (), {"object": (lost := read()), "exc_value": KeyError("abandoned")}))
    lost.close()
    print("from us", file=sys.stderr)
    assert capsys.readouterr().err == "from us\n"
    text = (tmp_path / "debug.log").read_text()
    for words in ("from tensorstore\n", "absl: from orbax\n", "KeyError: 'abandoned'\n"):
        assert words in text
    assert debug_log.record(OSError("full")) == f"; details in {tmp_path / 'debug.log'}"
    assert (tmp_path / "debug.log").read_text().endswith("OSError: full\n")
    debug_log.open_in(tmp_path / "gone", 1)
    assert debug_log.record(OSError("full")) == ""
    (tmp_path / "debug.2.log").symlink_to("/dev/full")  # it can be opened, as on a full disk
    debug_log.open_in(tmp_path, 2)
    assert debug_log.record(OSError("full")) == ""
    gc.collect()


ERRORS = """
import os, pathlib, resource, signal, sys
import jax, jax.numpy as jnp
from peftjax.core import debug_log
from peftjax.io.checkpoint import Checkpoints

workdir = pathlib.Path(sys.argv[1])
debug_log.divert()
debug_log.open_in(workdir, 0)
state = {f"{n}": jax.random.normal(jax.random.key(n), (128, 128)) for n in range(20)}
abstract = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}
with Checkpoints(workdir / "checkpoints", keep=3, keep_best=False) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, state, {}, identity={})
for file in (workdir / "checkpoints" / "2" / "state").rglob("d/*"):
    os.truncate(file, 0)
with Checkpoints(workdir / "checkpoints", keep=3, keep_best=False) as checkpoints:
    assert checkpoints.restore(abstract).step == 1
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    most = (workdir / "debug.log").stat().st_size + 2**17  # room for the log, not for 1.3 MB of arrays
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    checkpoints.save(3, state, {}, identity={})
    try:
        checkpoints.wait()
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_truncated_checkpoint_and_a_full_disk_are_one_line_each(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ERRORS, tmp_path], capture_output=True, text=True, check=True, env=os.environ
    )
    assert result.stderr == ""
    damaged, full = result.stdout.splitlines()
    details = f"; details in {tmp_path / 'debug.log'}"
    assert damaged.startswith("checkpoint 2 is damaged (arrays: ")
    assert damaged.endswith(f"{details}); falling back to checkpoint 1")
    assert full.startswith("checkpoint 3 could not be written to ")
    assert full.endswith(details)
    assert "File too large" in full
    assert (tmp_path / "debug.log").read_text().count("Traceback") > 1
