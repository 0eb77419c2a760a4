"""Output that nobody reads."""

import os

import pytest

from peftjax.core.output import say


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_lines_that_nobody_reads_are_dropped(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(f"sys.{stream}", pipe)
        say("one", error=stream == "stderr")
        assert os.read(reading, 99) == b"one\n"
        os.close(reading)
        say("two", error=stream == "stderr")
        say("three", error=stream == "stderr")
