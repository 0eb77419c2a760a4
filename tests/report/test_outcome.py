"""Runs that learned nothing."""

from typing import Any

from peftjax.report.outcome import concern


def line(kind: str, step: int, **numbers: float) -> dict[str, Any]:
    return {"kind": kind, "step": step} | numbers


def test_a_run_that_learned_nothing_is_named() -> None:
    first, last = line("train", 1, loss=2.0, grad_norm=1.0), line("train", 9, loss=3.0, grad_norm=1.0)
    assert "loss rose from 2 to 3; lower optim.learning_rate" in concern([first, last])
    assert concern([last, first]) == ""
    assert concern([first]) == concern([]) == ""
    better = [line("eval", 0, eval_loss=2.0), line("eval", 9, eval_loss=1.0)]
    assert concern([first, *better, last]) == ""  # the loss of a batch is noisier
    assert "eval_loss rose from 1 to 2" in concern([*better[::-1], last, first])
    assert "the gradient norm of step 9 is exactly 0" in concern([first, last | {"grad_norm": 0.0}])
