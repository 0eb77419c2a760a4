"""Runs that learned nothing, or start from a base that does not compute finite numbers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from peftjax import train
from peftjax.core.errors import NotFiniteError
from peftjax.tasks import model as model_section
from peftjax.training import config as configs
from peftjax.training.outcome import concern
from tests.test_train import config


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


def test_a_base_that_gives_nan_is_not_blamed_on_the_learning_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = model_section.load_model

    def broken(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        model.norm.scale.set_value(jnp.full_like(model.norm.scale.get_value(), jnp.nan))
        return model

    monkeypatch.setattr(model_section, "load_model", broken)
    with pytest.raises(
        NotFiniteError, match="step 0: eval_loss is nan before any training, so the base model gives it"
    ):
        train.train(configs.validate(config(tmp_path, eval__exact_match=0, eval__samples=0)), tmp_path / "run")
