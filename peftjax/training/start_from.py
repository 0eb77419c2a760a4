"""method.start_from: a run that continues the training of an adapter from a directory.

The method's options and its initial values come from the adapter. The optimizer state is new. The run keeps a copy of
the adapter in its workdir, from which a resumed run takes the options and the arrays that are not trained, such as
LoRA-FA's A. The directory itself is read once.
"""

import dataclasses
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from peftjax import methods
from peftjax.adapters import detach, provenance
from peftjax.adapters.adapter import MethodAdapter
from peftjax.adapters.attach import attach_unchecked
from peftjax.adapters.method import Method
from peftjax.adapters.options import unusual
from peftjax.adapters.registry import BaseName, attached
from peftjax.adapters.sites import adapters_named, head_sites
from peftjax.core import variables
from peftjax.core.config_values import as_tuples
from peftjax.core.errors import UserError
from peftjax.core.files import scratch_beside, sync_directory, sync_files
from peftjax.core.home import expand
from peftjax.core.variables import DropoutKey
from peftjax.io.adapter_keys import has_single_experts
from peftjax.io.adapter_load import load_adapter, method_for
from peftjax.io.adapter_method import read_method
from peftjax.io.adapter_tensors import WEIGHTS
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_config import read_fields
from peftjax.io.hf_files import find_model
from peftjax.io.model_card import hub_id
from peftjax.io.safetensors_files import read_header
from peftjax.models import from_hf_config
from peftjax.models.base import Model
from peftjax.tasks.model import ModelSection
from peftjax.training.config import Config

KEPT = "start_from"  # the copy in the workdir
_SOURCE = "start_from"  # the name of the loaded adapter while its values are copied


def resolve_options(config: Config, workdir: Path, checkpoints: Checkpoints) -> tuple[Config, Path | None]:
    """The config with the method's options resolved, and the directory of the adapter to start from (method.start_from).

    Returns:
        The config, in which an option that was left at its default has the adapter's value, and the directory: the copy
        in the workdir if the run resumes from a checkpoint, None if there is no method.start_from.

    Raises:
        UserError: The directory does not hold an adapter, or an option differs from the adapter's.
    """
    if config.start_from and (identity := checkpoints.identity()) is not None:
        return with_stored_options(config, identity["config"]), workdir / KEPT
    return with_options(config), expand(config.start_from) if config.start_from else None


def with_options(config: Config) -> Config:
    """The config, in which an option that was left at its default has the value of the adapter of method.start_from.

    Raises:
        UserError: The directory does not hold an adapter, an option differs from the adapter's, or the adapter has a
            value that a new adapter may not have.
    """
    if not config.start_from:
        return config
    theirs = _method(expand(config.start_from), config.model)
    method = _completed(config.method, theirs)
    _require_agreement(method, theirs, config.start_from)
    if found := [f"{name}={value!r}" for name, value in vars(method).items() if unusual(value)]:
        raise UserError(
            f"method.start_from={config.start_from}: the adapter has {', '.join(found)}. It can be loaded, but not trained "
            "further: method.dropout must be below 1 (set it in the config), and every alpha above 0"
        )
    return dataclasses.replace(config, method=method)


def with_stored_options(config: Config, stored: Mapping[str, Any]) -> Config:
    """The config, with the options that it leaves to the adapter of method.start_from taken from a stored config."""
    section = stored["method"]
    if not config.start_from or section.get("start_from") != config.start_from:
        return config
    theirs = methods.from_config({name: as_tuples(value) for name, value in section.items()})
    return dataclasses.replace(config, method=_completed(config.method, theirs))


def describe_start(config: Config) -> str:
    """The message of a new run: the adapter, and the method's options that are not at their defaults."""
    values = [
        (field.name, getattr(config.method, field.name), field.default) for field in dataclasses.fields(config.method)
    ]
    options = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
    return (
        f"starting from the adapter in {config.start_from} with a new optimizer state; {options or 'default options'}"
    )


def keep(config: Config, workdir: Path) -> None:
    """Copy the adapter of method.start_from into the workdir. One process calls this, before the first step."""
    source, kept = expand(config.start_from), workdir / KEPT
    if source.resolve() == kept.resolve():
        return
    with scratch_beside(kept) as scratch:
        for file in source.iterdir():  # the directory may hold more, such as the checkpoints of a trainer
            if file.is_file() and file.suffix in (".json", ".safetensors"):
                shutil.copyfile(file, scratch / file.name)
        sync_files(scratch)
        shutil.rmtree(kept, ignore_errors=True)
        scratch.rename(kept)
    sync_directory(workdir)


def attach_trained(model: Model, method: Method, path: Path, rngs: nnx.Rngs) -> Method:
    """Attach the adapter in a directory for further training, with the training options of `method`.

    Returns:
        The attached method.

    Raises:
        UserError: As `load_adapter`; or the method's options give the adapter other parameters than the directory has.
    """
    load_adapter(model, path, name=_SOURCE)
    options = {name: getattr(method, name) for name in _options(method) & method.training_options}
    method = dataclasses.replace(attached(model)[_SOURCE], **options)
    attach_unchecked(model, method, "default", rngs=rngs)
    sources = {site.path: adapter for site, adapter in adapters_named(model, _SOURCE)}
    heads = {site.path for site in head_sites(model)}
    for site, adapter in adapters_named(model, "default"):
        if site.path in sources:
            _copy(sources[site.path], adapter, f"{path}: the adapter of {site.names[0]}")
        else:
            assert site.path in heads  # the directory has no task head: the base's is the initial one
    provenance.remember_base(model, "default", provenance.base_name(model, _SOURCE))
    detach(model, _SOURCE)
    return method


def recorded_base(model: Model, config: Config) -> BaseName:
    """The name of the base to record with the trained adapter.

    It is model.path; if that is a local directory and the adapter of method.start_from names a base on the hub, that name.
    """
    given, theirs = BaseName(config.model.path, config.model.revision), provenance.base_name(model, "default")
    return theirs if theirs and hub_id(theirs.name) and not hub_id(given.name) else given


def _copy(source: MethodAdapter, adapter: MethodAdapter, what: str) -> None:
    """Copy the arrays of one adapter to another with the same parameters."""
    theirs, ours = (
        {path: leaf for path, leaf in variables.flat(each)[1].items() if not isinstance(leaf, DropoutKey)}
        for each in (source, adapter)
    )
    shapes = [{path: tuple(leaf.shape) for path, leaf in leaves.items()} for leaves in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"{what} has the parameters {shapes[0]}, but with the options of the config it has {shapes[1]}; remove all "
            "method options except start_from from the config"
        )
    for path, leaf in ours.items():
        leaf.set_value(jnp.asarray(theirs[path].get_value(), leaf.get_value().dtype))


def _method(path: Path, base: ModelSection) -> Method:
    """The method of an adapter directory. If its file has modules of single experts, in the base's names of all experts."""
    method = read_method(path)
    if not (path / WEIGHTS).is_file() or not has_single_experts(read_header(path / WEIGHTS)):
        return method
    directory = find_model(base.path, base.revision, files=("config.json",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load_adapter gives them
        return method_for(path, from_hf_config(read_fields(directory)[0]).abstract())


def _options(method: Method) -> set[str]:
    return {field.name for field in dataclasses.fields(method)}


def _completed(method: Method, theirs: Method) -> Method:
    """The method, with the value of `theirs` for each option at its default."""
    if type(method) is not type(theirs):
        return theirs if method == methods.Lora() else method  # the default of the whole section
    left = [field.name for field in dataclasses.fields(method) if getattr(method, field.name) == field.default]
    return dataclasses.replace(method, **{name: getattr(theirs, name) for name in left})


def _require_agreement(method: Method, theirs: Method, path: str) -> None:
    """Raises a UserError if the options, except those that only affect training, differ from an adapter's."""
    if type(method) is not type(theirs):
        raise UserError(
            f"method.start_from={path} holds an adapter of the method {theirs.method!r}, but method.name={method.method!r}; "
            f"set method.name={theirs.method!r}"
        )
    differ = [
        f"method.{name}: {getattr(method, name)!r} in the config, {getattr(theirs, name)!r} in the adapter"
        for name in sorted(_options(method) - method.training_options)
        if _unordered(getattr(method, name)) != _unordered(getattr(theirs, name))
    ]
    if differ:
        raise UserError(
            f"method.start_from={path} holds an adapter with other options ({'; '.join(differ)}); remove these options "
            "from the config to use the adapter's"
        )


def _unordered(value: Any) -> Any:
    """A tuple as a set: the order of module names does not matter."""
    return frozenset(value) if isinstance(value, tuple) else value
