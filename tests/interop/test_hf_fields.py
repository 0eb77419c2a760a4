"""The table of the fields of config.json that transformers reads equals what its classes read."""

import dataclasses
import importlib
import inspect
import re
from types import ModuleType

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig, cache_utils, masking_utils
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

from peftjax.models import FAMILIES, hf_fields


def attributes(module: ModuleType) -> set[str]:
    """The attributes of a configuration that the code of a module reads."""
    source = inspect.getsource(module)
    direct, guarded = r"\bconfig\.([a-z]\w+)", r'(?:get|has)attr\([\w.]*config, "(\w+)"'
    return {*re.findall(direct, source), *re.findall(guarded, source)}


def arguments(cls: type) -> set[str]:
    """The arguments that a configuration class reads beside its fields."""
    source = inspect.getsource(cls)
    patterns = (r'kwargs\.(?:pop|get)\("(\w+)"', r'"(\w+)" in kwargs', r'(?:get|has)attr\(self, "(\w+)"')
    return {name for pattern in patterns for name in re.findall(pattern, source)}


def settable(cls: type, names: set[str]) -> set[str]:
    """Without private names, methods and properties, which no config.json can replace."""
    fixed = set()
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        constant = isinstance(value, property) and value.fset is None
        if constant or callable(value) or isinstance(value, classmethod | staticmethod):
            fixed.add(name)
    return {name for name in names - fixed if not name.startswith("_")}


def test_the_fields_that_all_models_read() -> None:
    found = attributes(masking_utils) | attributes(cache_utils) | {"per_layer_config"}
    assert "per_layer_config" in arguments(PreTrainedConfig)
    assert settable(PreTrainedConfig, found) == hf_fields.SHARED


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_the_fields_of_a_model_type_are_those_that_its_classes_read(kind: str) -> None:
    cls = CONFIG_MAPPING[kind]
    model = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
    declared = {field.name for field in dataclasses.fields(cls)} - {
        f.name for f in dataclasses.fields(PreTrainedConfig)
    }
    found = declared | set(cls.attribute_map) | arguments(cls) | attributes(model)
    if "rope_parameters" in found:
        found |= arguments(RotaryEmbeddingConfigMixin)
    assert settable(cls, found) - hf_fields.SHARED == hf_fields.OWN[kind]
