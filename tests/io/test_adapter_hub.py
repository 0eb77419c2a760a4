"""Adapter directories of AdapterHub, read and written; tests/interop has the library itself read and write them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tests.tiny as tiny
from peftjax import adapters, methods
from peftjax.core.errors import UserError
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_method import read_method
from peftjax.io.adapter_save import save_adapter
from peftjax.io.model_card import CARD
from peftjax.methods.bottleneck import Bottleneck

E, L = 32, 3  # embed, layers
CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
PLACE = "model.layers.{}.output_adapters.adapters.default."


def saved(path: Path, method: Bottleneck | None = None) -> Path:
    model = adapters.attach(tiny.model(), method or methods.Pfeiffer(), rngs=nnx.Rngs(1))
    return save_adapter(tiny.randomize(model), path / "adapter")


def rewrite(path: Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    """Change a directory's tensors, or fields of its config: None takes one out."""
    if tensors is not None:
        save_file(tensors, path / WEIGHTS)
    config = json.loads((path / CONFIG).read_text()) | fields
    (path / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def non_linearity(model: Any) -> str:
    return adapters.attached(model)["default"].non_linearity


def test_the_directory_holds_the_keys_shapes_and_fields_of_the_format(tmp_path: Path) -> None:
    path = saved(tmp_path, methods.Pfeiffer(norm_before=True, norm_after=True, learned_scale="scalar", leave_out=(1,)))
    assert sorted(file.name for file in path.iterdir()) == [CARD, WEIGHTS, CONFIG]
    shapes = {
        "adapter_norm_before.weight": (E,),  # the same tensor as the next; the library has it twice
        "adapter_norm_before.bias": (E,),
        "adapter_down.0.weight": (E,),
        "adapter_down.0.bias": (E,),
        "adapter_down.1.weight": (2, E),
        "adapter_down.1.bias": (2,),
        "adapter_up.weight": (E, 2),
        "adapter_up.bias": (E,),
        "adapter_norm_after.weight": (E,),
        "adapter_norm_after.bias": (E,),
        "scaling": (1,),
    }
    expected = {PLACE.format(layer) + leaf: shape for layer in (0, 2) for leaf, shape in shapes.items()}
    assert {key: value.shape for key, value in load_file(path / WEIGHTS).items()} == expected
    config = json.loads((path / CONFIG).read_text())
    assert config.pop("config") == {
        "adapter_residual_before_ln": False, "dropout": 0.0, "init_weights": "bert", "is_parallel": False,
        "leave_out": [1], "ln_after": True, "ln_before": True, "mh_adapter": False, "non_linearity": "relu",
        "original_ln_after": True, "original_ln_before": True, "output_adapter": True, "reduction_factor": 16.0,
        "residual_before_ln": True, "scaling": "learned",
    }  # fmt: skip
    assert config == {
        "hidden_size": E, "model_name": None, "model_type": "llama", "name": "default", "version": "adapters.1.3.0",
    }  # fmt: skip


@pytest.mark.parametrize("one", ["adapter_norm_before.", "adapter_down.0."])
def test_a_norm_stored_under_one_of_its_two_names_is_read(one: str, tmp_path: Path) -> None:
    path = saved(tmp_path, methods.Houlsby(norm_before=True))
    expected = load_adapter(tiny.model(), path)(tiny.tokens())
    rewrite(path, {key: value for key, value in load_file(path / WEIGHTS).items() if one not in key})
    np.testing.assert_array_equal(load_adapter(tiny.model(), path)(tiny.tokens()), expected)


def test_a_file_without_a_version_means_other_functions_by_gelu(tmp_path: Path) -> None:
    path = saved(tmp_path, methods.Pfeiffer(non_linearity="gelu"))
    assert non_linearity(load_adapter(tiny.model(), path)) == "gelu"
    assert non_linearity(load_adapter(tiny.model(), rewrite(path, version=None))) == "gelu_new"


def test_tensors_that_are_missing_unexpected_or_of_another_shape_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(path / WEIGHTS)
    up = tensors.pop(PLACE.format(1) + "adapter_up.bias")
    invertible = {"model.invertible_adapters.default.F.0.bias": np.zeros(2, np.float32)}
    rewrite(path, tensors | invertible)
    with pytest.raises(
        ValueError, match=r"adapter.safetensors .*: missing .*1.*adapter_up.bias; unexpected .*invertible"
    ):
        load_adapter(tiny.model(), path)
    rewrite(path, tensors | {PLACE.format(1) + "adapter_up.bias": up[:-1]})
    with pytest.raises(
        ValueError, match=r"adapter.safetensors: .*adapter_up.bias has shape \(31,\), but this model needs \(32,\)"
    ):
        load_adapter(tiny.model(), path)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / "adapter_interface.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_interface.json: adapters placed by a custom adapter interface"):
        load_adapter(tiny.model(), path)
    (path / "adapter_interface.json").unlink()
    (path / WEIGHTS).rename(path / "pytorch_adapter.bin")
    with pytest.raises(
        ValueError, match=r"holds no adapter.safetensors but pytorch_adapter.bin, a pickle\. .* use_safetensors"
    ):
        load_adapter(tiny.model(), path)
    (path / "pytorch_adapter.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter.safetensors; load it with adapters"):
        load_adapter(tiny.model(), path)
    rewrite(path, config="pfeiffer")
    for read in (read_method, lambda path: load_adapter(tiny.model(), path)):
        with pytest.raises(ValueError, match='config must be an object, not "pfeiffer"'):
            read(path)


def test_a_users_own_network_has_no_place_for_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a model from load_model; Linear is an adopted network"):
        load_adapter(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), saved(tmp_path))
