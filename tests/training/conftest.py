"""Shared by the tests of training."""

import pytest

from peftjax.report import page, sweep_page


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without charts, which would take a fifth of the time of a small run."""
    monkeypatch.setattr(page, "make_charts", lambda *_: [])
    monkeypatch.setattr(sweep_page, "make_figures", lambda *_: [])
