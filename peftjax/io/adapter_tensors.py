"""The tensors of an adapter directory: their keys, and where their values are in the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from peftjax.adapters.adapter import HfLeaf, MethodAdapter
from peftjax.adapters.joint import adapter_parts
from peftjax.adapters.registry import attached
from peftjax.adapters.single_experts import SingleExperts
from peftjax.adapters.sites import head_sites
from peftjax.adapters.soft_prompt import SoftPrompt
from peftjax.io import adapter_hub
from peftjax.methods.bottleneck import Bottleneck
from peftjax.models.base import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."  # peft wraps the model, but keeps a soft prompt beside it


@dataclasses.dataclass(frozen=True)
class Layout:
    """The keys of an adapter file.

    Attributes:
        weights: Name of the file.
        prefix: What precedes a module's name in a key.
        infix: What follows a module's name in a key.
    """

    weights: str
    prefix: str
    infix: str

    def key(self, module: str, suffix: str) -> str:
        """Return the key of one tensor of a module's adapter."""
        return f"{self.prefix}{module}{self.infix}{suffix}".removesuffix(".")

    def head_key(self, module: str, suffix: str) -> str:
        """Return the key of one tensor of a task head."""
        return f"{self.prefix}{module}.{suffix}"


def layout(model: nnx.Module, name: str) -> Layout:
    """Return the keys for adapter `name`: AdapterHub's for a bottleneck adapter, else PEFT's."""
    method = attached(model)[name]
    if isinstance(method, Bottleneck):
        return Layout(adapter_hub.WEIGHTS, "", f".adapters.{name}.")
    return Layout(WEIGHTS, PROMPT_PREFIX if isinstance(method, SoftPrompt) else PREFIX, ".")


@dataclasses.dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter file.

    Attributes:
        key: Its key in the file.
        adapter: The adapter that holds its value.
        layer: Its layer of the variable; None: the whole variable.
        leaf: The variable, and how the file stores it.
    """

    key: str
    adapter: MethodAdapter
    layer: int | None
    leaf: HfLeaf

    @property
    def variable(self) -> nnx.Variable:
        """The variable that holds the value."""
        variable: nnx.Variable = vars(self.adapter)[self.leaf.leaf]
        return variable

    def of_layer(self, value: Any) -> Any:
        """Return this tensor's layer of the variable's value, a view of an array of NumPy."""
        return value if self.layer is None else value[self.layer, ...]


def tensors_of(model: nnx.Module, name: str, *, exported: bool = True) -> list[AdapterTensor]:
    """Return the tensors that the files of adapter `name` hold.

    These are what `save_adapter` writes, or if not `exported`, what peft writes, which may change the base.
    """
    found: dict[str, AdapterTensor] = {}
    keys = layout(model, name)
    heads = [site.path for site in head_sites(model)]
    modules = _modules(model, name)
    for site, adapter in adapter_parts(model, name):
        key_of = keys.head_key if site.path in heads else keys.key
        written = adapter.exported() if exported else adapter
        for key, leaf in written.hf_shared().items():
            found.setdefault(key, AdapterTensor(key, written, None, leaf))  # the same in every layer that shares it
        for layer, hf in zip(site.layers, site.names, strict=True):
            for suffix, leaf in written.hf_leaves(layer).items():
                key = key_of(modules.get(hf, hf), suffix)
                found[key] = AdapterTensor(key, written, layer, leaf)
    return list(found.values())


def _modules(model: nnx.Module, name: str) -> dict[str, str]:
    """The modules of peft that hold the adapters of experts, by the experts' name.

    If the layers of single experts have their own adapters, this is the module of all experts. For a LoRA, peft wraps
    that module once for each adapted parameter, the first one innermost.
    """
    found: dict[str, str] = {}
    order = list(model.hf_experts) if isinstance(model, Model) else []
    names = set()
    for site, adapter in adapter_parts(model, name):
        if isinstance(adapter, SingleExperts):
            of_layers = zip(site.layers, site.names, strict=True)
            found |= {hf: hf.rpartition(".")[0] for layer, hf in of_layers if adapter.hf_leaves(layer)}
        elif adapter.wraps_experts:
            names |= {hf for layer, hf in zip(site.layers, site.names, strict=True) if adapter.hf_leaves(layer)}
    for hf in names:
        container, _, last = hf.rpartition(".")
        outer = sum(f"{container}.{other}" in names for other in order[order.index(last) + 1 :])
        found[hf] = container + ".base_layer" * outer
    return found


def adapter_tensors(
    model: nnx.Module, name: str = "default", read: Callable[[jax.Array], Any] = lambda value: value
) -> dict[str, Any]:
    """Return the arrays that the files of adapter `name` hold, by key.

    `read` is applied once to the value of each variable, before it is cut into tensors. On the host, cutting needs no compiled
    programs.
    """
    tensors = tensors_of(model, name)
    values = {id(tensor.variable): tensor.variable for tensor in tensors}
    arrays = {key: read(variable.get_value()) for key, variable in values.items()}
    return {tensor.key: tensor.leaf.write(tensor.of_layer(arrays[id(tensor.variable)])) for tensor in tensors}
