"""The whole configuration: its sections, loading it from a file, and comparing it with an earlier run's.

A config file is Python with `get_config() -> ConfigDict`, usually `peftjax.core.config.defaults()` and a few changes; or
YAML or JSON with the fields that differ from the defaults. `load` reads it, applies `--config.a.b=value` overrides, and
returns a `Config`, whose fields are checked and typed.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from peftjax import methods
from peftjax.adapters.method import Method
from peftjax.core import config as core_config
from peftjax.core import config_file, config_values
from peftjax.core.config import Field, Schema, field, flat_fields, section
from peftjax.core.config_values import ConfigSource
from peftjax.core.errors import UserError, shown
from peftjax.data.config import DataConfig
from peftjax.sharding import MeshConfig
from peftjax.tasks import TASKS, TaskConfig
from peftjax.tasks.model import ModelSection
from peftjax.trackers import LogConfig
from peftjax.training.optim import OptimConfig
from peftjax.training.sections import CheckpointConfig, EvalConfig, TrainConfig

METHOD_NAME = Field("lora", "PEFT method; the other fields of this section are the options of that method")
START_FROM = Field(
    "", "Directory of an adapter to start from; options left at their defaults take its values; empty: none"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    seed: int = field(0, "Random seed of initial values, dropout and data order", low=0, high=2**63 - 1)
    model: ModelSection = section(ModelSection)
    task: TaskConfig = section(TaskConfig)
    method: Method = dataclasses.field(
        default_factory=methods.Lora, metadata={"fields": {"name": METHOD_NAME, "start_from": START_FROM}}
    )
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    eval: EvalConfig = section(EvalConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    mesh: MeshConfig = section(MeshConfig)
    start_from: str = dataclasses.field(default="", metadata={"fields": {}})  # method.start_from

    def __post_init__(self) -> None:
        if methods.METHODS.get(name := self.method.method) is not (kind := type(self.method)):
            raise UserError(
                f"method.name={name!r} is not registered for {kind.__name__}; give {kind.__name__}.method its "
                f"own name, and register the class: peftjax.methods.METHODS[{kind.__name__}.method] = {kind.__name__}"
            )
        if self.optim.warmup_steps > self.train.steps and not self.train.epochs:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be at most train.steps={self.train.steps}; shorten the "
                "warmup, or set optim.warmup_fraction, which scales with the run"
            )
        if self.model.attention == "cudnn" and self.data.pack:
            raise UserError(
                "model.attention='cudnn' does not support packed sequences; set data.pack=False or model.attention='auto'"
            )
        for name, value in (("exact_match", self.eval.exact_match), ("samples", self.eval.samples)):
            if value and not TASKS[self.task.kind].generates:
                raise UserError(
                    f"eval.{name}={value}: task.kind={self.task.kind!r} does not generate text; set it to 0"
                )
            if value and not self.data.eval:
                raise UserError(
                    f"eval.{name}={value} answers prompts of data.eval, which names no source; set data.eval, or eval.{name}=0"
                )
        if self.model.new_head and TASKS[self.task.kind].head is None:
            raise UserError(
                f"model.new_head=True: a model for task.kind={self.task.kind!r} has no task head to replace; set it to False"
            )


SCHEMA = Schema(core_config.fields_of(Config), methods.method_defaults)
core_config.declare(SCHEMA)


def load(path: str | Path, overrides: Iterable[str] = (), origins: Mapping[str, str] | None = None) -> Config:
    """The config of a file, completed by the defaults and overridden.

    Args:
        path: A Python file with a function `get_config()` (in "FILE.py:TEXT", the text is its argument), or a YAML or
            JSON file with the same sections and fields, such as the config.json of a run.
        overrides: Strings "--config.optim.learning_rate=1e-3"; see `config_values.override`.
        origins: Where some of the overrides were given, for messages.

    Raises:
        UserError: The file fails, or a field is unknown, of the wrong type or out of range.
    """
    given, source = config_file.read(path)
    overrides, origins = list(overrides), origins or {}
    of_file = config_values.complete(given, SCHEMA, source)
    values = config_values.override({**of_file}, overrides, SCHEMA, origins)
    where = {name: source.of(name) for name in given if _was_set(name, of_file) and values.get(name) == of_file[name]}
    where |= {item.removeprefix("--config.").partition("=")[0]: origins.get(item, item) for item in overrides}
    return _make(values, str(path), where)


def _was_set(name: str, values: Mapping[str, Any]) -> bool:
    """Whether a file set a field; one at its default counts as not set, since `defaults()` has all fields."""
    return name not in SCHEMA.fields or values[name] != SCHEMA.fields[name].default


def validate(config: ConfigDict | Mapping[str, Any], source: str = "config") -> Config:
    """The config with the given values, which may leave out fields and sections. `source` is named in messages.

    Raises:
        UserError: A field is unknown, of the wrong type or out of range.
    """
    return _make(config_values.complete(flat_fields(config), SCHEMA, ConfigSource(source)), source)


def changed(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config with other values of some fields.

    Args:
        config: The config; it is not modified.
        fields: New values by dotted name, such as {"model.remat": "block"}. As on the command line, another
            "method.name" first replaces the whole section by the defaults of that method. A mapping by the name of a
            section, such as {"mesh": {"fsdp": 2}}, replaces the section.

    Raises:
        UserError: As `validate`.
    """
    values = to_dict(config)
    for name in core_config.replaced_by(fields, SCHEMA.fields):
        head, _, leaf = name.partition(".")
        values[head][leaf] = SCHEMA.fields[name].default
    for name, value in sorted(fields.items(), key=lambda item: item[0] != "method.name"):
        head, _, leaf = str(name).partition(".")
        if name == "method.name" and value != config.method.method:
            values["method"] = {"name": value}
        elif leaf and isinstance(values.get(head), Mapping):
            values[head] = values[head] | {leaf: value}
        else:
            values[name] = value
    return validate(values)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, which `validate` turns back into an equal one."""
    sections = [each.name for each in dataclasses.fields(config) if "section" in each.metadata]
    values = {name: dataclasses.asdict(getattr(config, name)) for name in sections}
    return {"seed": config.seed, "method": _method_values(config.method, config.start_from)} | values


def to_json(config: Config) -> str:
    """The config as JSON text."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def differences(here: Config, there: Mapping[str, Any]) -> list[str]:
    """One line for every field in which a config and the stored values of another differ.

    For example "optim.learning_rate: 0.001 here, 0.002 there". The stored values may be from an older version, which
    did what the defaults of newer fields do.
    """
    a = flat_fields(to_dict(here))
    b = {name: config_values.as_tuples(value) for name, value in _normalized(there).items()}
    return [
        f"{name}: {_shown(a, name)} here, {_shown(b, name)} there"
        for name in a | b
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


def _shown(values: Mapping[str, Any], name: str) -> str:
    """A value in a message; a long text, such as a template, is cut off."""
    if name not in values:
        return "absent"
    return shown(values[name]) if isinstance(values[name], str) else repr(values[name])


def _normalized(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values, flat and complete; the method's options as its class has them ("q_proj,v_proj" as a tuple)."""
    defaults = {name: value for name, value in to_dict(Config()).items() if name not in ("seed", "method")}
    stored = {**stored, **{name: section | stored.get(name, {}) for name, section in defaults.items()}}
    try:
        method = methods.from_config({name: config_values.as_tuples(value) for name, value in stored["method"].items()})
    except (KeyError, UserError, TypeError):
        return flat_fields(stored)
    return flat_fields({**stored, "method": _method_values(method, stored["method"].get("start_from", ""))})


def _method_values(method: Method, start_from: str) -> dict[str, Any]:
    """The values of the section `method`."""
    own = {each.name: getattr(method, each.name) for each in dataclasses.fields(method)}
    return {"name": method.method, "start_from": start_from} | own


def _make(values: Mapping[str, Any], source: str, where: Mapping[str, str] = MappingProxyType({})) -> Config:
    """The Config with complete values.

    A message names the places `where` its fields were set, or `source` if these are unknown.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, leaf = name.rpartition(".")
        sections.setdefault(head, {})[leaf] = value
    try:
        made = {
            each.name: each.metadata["section"](**sections[each.name])
            for each in dataclasses.fields(Config)
            if "section" in each.metadata
        }
        method, start_from = methods.from_config(sections["method"]), sections["method"]["start_from"]
        return Config(**sections[""], method=method, start_from=start_from, **made)
    except UserError as error:
        named = [where[name] for name in re.findall(r"\w+\.\w+", str(error)) if name in where]
        raise UserError(f"{' and '.join(dict.fromkeys(named)) or source}: {error}") from None
