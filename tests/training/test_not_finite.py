"""Runs that start from a base that does not compute finite numbers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from peftjax.core.errors import NotFiniteError
from peftjax.tasks import model as model_section
from peftjax.train import train
from peftjax.training import config as configs
from tests.test_train import config


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
        NotFiniteError, match="step 0: eval_loss is nan before any training, so the cause is the base model"
    ):
        train(configs.validate(config(tmp_path, eval__exact_match=0, eval__samples=0)), tmp_path / "run")
