"""`peftjax.train`: the training of the train command, from Python."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optax
from ml_collections import ConfigDict

from peftjax.adapters.method import Method
from peftjax.adapters.registry import Registry, registry_of
from peftjax.core import distributed
from peftjax.core import workdir as workdirs
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.home import expand
from peftjax.data.source_strings import absolute
from peftjax.data.tokenizer import load_tokenizer
from peftjax.models.base import Model, Origin
from peftjax.training import config as configs
from peftjax.training import optim
from peftjax.training.config import Config
from peftjax.training.hooks import Hooks, Trained

Records = Iterable[Mapping[str, Any]]
Data = str | Path | Sequence[str | Path] | Records


def train(
    model: str | Path | Model | None,
    method: Method | Config | ConfigDict | Mapping[str, Any],
    data: Data | None = None,
    *,
    workdir: str | Path,
    eval_data: Data | None = None,
    config: Mapping[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
    on_evaluate: Callable[[Model, int], Mapping[str, float]] | None = None,
) -> Trained:
    """Train a model with a PEFT method, as the train command does.

    The run logs, evaluates, saves checkpoints and writes the adapter and a report into `workdir`. Calling this function
    again with the same arguments resumes an interrupted run. `peftjax evaluate` and `peftjax generate` work with its
    workdir.

    Args:
        model: The base model: a directory, a hub id, "embedded" for the bundled model, or a model from `load_model`, to
            which the method is attached in place. None: the model of the config.
        method: The method, such as `peftjax.Lora(rank=16)`, or a whole config.
        data: The training data: one or several sources in the notation of `data.train`, such as "train.jsonl", or
            the records themselves, which are written to train.jsonl in the workdir. None: the data of the config.
        workdir: Directory for everything that the run writes.
        eval_data: The held-out data, in the same forms.
        config: Values of config fields by name, as on the command line: {"train.steps": 100, "data.format": "chat"}.
        optimizer: An optax optimizer with its learning rate, which replaces the section `optim` of the config, and may be
            given there instead. It receives gradients and parameters in float32, as a dict from paths to arrays.
        on_metrics: Called with each line of metrics.jsonl, a dict with "step", "kind" ("train" or "eval") and the metrics;
            in a run of several processes, by process 0 only.
        on_evaluate: Called with the model and the number of completed steps at each evaluation, on every process.
            The scores that it returns (on process 0, if there are several) are logged and reported with the others.

    Returns:
        The trained model with its adapter, its scores, and the directory of the adapter.

    Raises:
        UserError: The arguments, the model and the data do not fit together, or `workdir` holds another run.
        NotFiniteError: The loss or the gradient is not finite.

    Examples:
        >>> import peftjax
        >>> records = [{"text": "one two three"}, {"text": "two three four"}] * 8
        >>> fields = {"train.steps": 2, "train.batch_size": 4, "data.max_length": 16}
        >>> method = peftjax.Lora(rank=4)
        >>> trained = peftjax.train("embedded", method, records, workdir="run", config=fields)
        ... # doctest: +ELLIPSIS
        embedded: ...
        >>> trained.path.name
        'adapter'
    """
    from peftjax.train import train as run  # imports orbax

    if not isinstance(config or {}, Mapping):
        raise UserError(f"train: config must be a mapping such as {{'train.steps': 100}}, not {config!r}")
    if optimizer is not None and not _is_optimizer(optimizer):
        raise UserError(f"train: optimizer must be an optax optimizer such as optax.adamw(1e-4), not {optimizer!r}")
    for name, callback in (("on_metrics", on_metrics), ("on_evaluate", on_evaluate)):
        if callback is not None and not callable(callback):
            raise UserError(f"train: {name} must be a function, not {callback!r}")
    if not isinstance(workdir, str | Path):
        raise UserError(f"train: workdir must be the path of a directory, not {workdir!r}")
    directory = expand(workdir).absolute()  # the run can be read from another directory
    fields = dict(config or {})
    if isinstance(method, ConfigDict | Mapping):
        method = dict(method)
        optimizer = _take_optimizer(method, optimizer)
    optimizer = _take_optimizer(fields, optimizer)
    if isinstance(model, Model):
        fields = _model_fields(model, fields) | fields
    elif model is not None:
        fields["model.path"] = str(model)
    for name, given in (("train", data), ("eval", eval_data)):
        if given is not None:
            fields[f"data.{name}"] = _sources(given, directory, name)
    if optimizer is not None:
        fields["optim.name"] = optim.CUSTOM
    loaded = model if isinstance(model, Model) else None
    return run(_config(method, fields), directory, Hooks(loaded, optimizer, on_metrics, on_evaluate))


def _is_optimizer(value: Any) -> bool:
    return hasattr(value, "init") and hasattr(value, "update")


def _take_optimizer(
    fields: dict[str, Any], optimizer: optax.GradientTransformation | None
) -> optax.GradientTransformation | None:
    """The optimizer: the given one, or an optax optimizer in place of the section `optim`, which is removed."""
    if not _is_optimizer(fields.get("optim")):
        return optimizer
    if optimizer is not None:
        raise UserError("train: two optimizers are given; remove optimizer=, or the optimizer in config.optim")
    taken: optax.GradientTransformation = fields.pop("optim")
    return taken


def _config(method: Method | Config | ConfigDict | Mapping[str, Any], fields: Mapping[str, Any]) -> Config:
    """The config of a method or a config, with other values of some fields."""
    if isinstance(method, Method):
        return configs.changed(Config(method=method), fields)
    if isinstance(method, Config):
        return configs.changed(method, fields)
    if isinstance(method, ConfigDict | Mapping):
        return configs.changed(configs.validate(method), fields)
    raise UserError(f"train: method must be a method such as peftjax.Lora(rank=16), or a config, not {method!r}")


def _model_fields(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the section `model` for a model that is loaded already."""
    if model.origin is None:
        raise UserError(
            "train: this model was not loaded with peftjax.load_model; give the directory of its files instead"
        )
    if (registry := registry_of(model)) != Registry():
        names = [name for name, _ in registry.methods]
        raise UserError(f"train: the model already has adapters: {names}; detach them, or load the base again")
    options = {**model.origin.options, "resize_embeddings": _adds_rows(model, model.origin)}
    fields = {"model.path": model.origin.path} | {f"model.{name}": value for name, value in options.items()}
    if differ := [name for name, value in fields.items() if given.get(name, value) != value]:
        raise UserError(
            f"train: {', '.join(differ)} cannot change for a loaded model; pass the model's directory instead, or set these "
            "options in load_model"
        )
    return fields


def _adds_rows(model: Model, origin: Origin) -> bool:
    """Whether the model has rows for the added tokens of its tokenizer, which is what model.resize_embeddings=True means.

    Raises:
        UserError: It was given another number of rows, which no config describes.
    """
    rows, there = origin.options["resize_embeddings"], model.embedding_rows
    if rows is None or there != rows:  # there were more already
        return False
    if (tokens := load_tokenizer(origin.path, origin.options["revision"]).vocab_size) != rows:
        raise UserError(
            f"train: the model was loaded with resize_embeddings={rows}, but its tokenizer has {tokens} tokens, and a "
            f"run can only add rows for these; load it with resize_embeddings={tokens}, or save it with peftjax.save_model and "
            "load that directory"
        )
    return True


def _sources(data: Data, directory: Path, name: str) -> tuple[str, ...]:
    """The sources of data, in the notation of the config. Records are written to a file in the workdir."""
    if isinstance(data, str | Path):
        return (absolute(str(data)),)
    if type(data).__name__ == "DataFrame":  # of any library; iterating over it yields the names of its columns
        raise UserError(f"train: the {name} data is a DataFrame; give its records: df.to_dict('records')")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UserError(f"train: the {name} data must be a list of records, or names of files, not {repr(data)[:60]}")
    items = list(data)
    if items and all(isinstance(item, str | Path) for item in items):
        return tuple(absolute(str(item)) for item in items)
    lines = "".join(_line(item, f"{name} record {index}") for index, item in enumerate(items))
    path = directory / f"{name}.jsonl"
    with workdirs.claim(directory):
        distributed.on_first(lambda: _write(path, lines))
    return (str(path),)


def _line(record: Any, name: str) -> str:
    """A record as a line of JSON."""
    if not isinstance(record, Mapping):
        raise UserError(f"train: {name} must be a dict, not {record!r}; or pass file names")
    try:
        return json.dumps(dict(record)) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"train: {name} cannot be written as JSON: {error}") from None


def _write(path: Path, lines: str) -> None:
    """Write the records, unless the run in the workdir has other ones. Records of a call that was refused are replaced."""
    if path.exists() and path.read_text(encoding="utf-8") == lines:
        return
    if path.exists() and workdirs.is_run(path.parent):
        raise UserError(f"{path} holds other records, from an earlier run; choose another workdir, or delete this one")
    write_atomically(path, lines)
