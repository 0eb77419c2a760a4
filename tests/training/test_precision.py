"""model.dtype="auto"."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import pytest

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.tasks.model import ModelSection, compute_dtype, load_base
from peftjax.training import config as configs
from peftjax.training import precision
from peftjax.training.config import Config
from peftjax.training.resume import check_workdir, open_checkpoints
from tests import tiny

BF16 = {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("fields", "on_accelerators"),
    [
        (BF16, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"model_type": "llava", "text_config": BF16}, "bfloat16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"torch_dtype": "float16"}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_on_accelerators_for_checkpoints_in_bfloat16(fields: Any, on_accelerators: str) -> None:
    auto = partial(compute_dtype, ModelSection(), fields)
    assert [auto(platform) for platform in ("tpu", "gpu", "cuda")] == [on_accelerators] * 3
    assert auto("cpu") == auto() == "float32"
    assert compute_dtype(ModelSection(dtype="bfloat16"), {}) == "bfloat16"


def resolved(platform: str, **fields: Any) -> tuple[str, str]:
    one = precision.resolve_dtype(configs.changed(Config(), fields), BF16, platform).model
    return one.dtype, one.param_dtype


def test_an_explicit_dtype_wins_and_full_fine_tuning_keeps_float32_parameters() -> None:
    assert resolved("gpu") == ("bfloat16", "")
    assert resolved("gpu", **{"model.dtype": "float32"}) == ("float32", "")
    assert resolved("gpu", **{"method.name": "full"}) == ("bfloat16", "float32")
    assert resolved("gpu", **{"method.name": "full", "model.param_dtype": "bfloat16"}) == ("bfloat16", "bfloat16")
    assert resolved("gpu", **{"method.name": "full", "model.dtype": "bfloat16"}) == ("bfloat16", "")
    assert resolved("cpu", **{"method.name": "full"}) == ("float32", "")


def test_a_base_is_loaded_in_the_dtype_of_its_checkpoint_where_it_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.directory(tmp_path / "model")
    stored = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stored | BF16))
    load = lambda: load_base(Config().model, directory, sharding.make_mesh(), 0).config  # noqa: E731
    assert load().dtype == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert load().dtype == load().param_dtype == "bfloat16"


def test_a_resumed_run_keeps_the_dtype_in_which_it_started(tmp_path: Path) -> None:
    started = configs.to_dict(configs.changed(Config(), {"model.dtype": "bfloat16", "model.attention": "xla"}))
    assert precision.with_stored_dtype(Config(), started).model.dtype == "bfloat16"
    assert precision.with_stored_dtype(Config(), started).model.attention == "xla"  # the default of older runs
    (tmp_path / "adapter").mkdir()  # of a run whose checkpoints are gone, which is compared with config.json
    (tmp_path / "config.json").write_text(json.dumps(started))
    with open_checkpoints(Config(), tmp_path) as checkpoints:
        check_workdir(Config(), tmp_path, checkpoints)
        with pytest.raises(UserError, match="holds the result of a run"):
            check_workdir(configs.changed(Config(), {"model.dtype": "float32"}), tmp_path, checkpoints)
