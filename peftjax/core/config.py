"""The configuration: every field with its default, its meaning and the values it can take, declared once in FIELDS.

A config file is Python with `get_config() -> ConfigDict`, usually `defaults()` and a few changes. `load` runs it, fills
in the fields it leaves out, applies `--config.a.b=value` overrides and returns a locked, valid config. Anything that
FIELDS does not know or allow is a `UserError` that names the field, its value, where it was set and what is near.

The fields of the section `method` belong to the method's dataclass, on a floor above: `load` and `validate` are given
them as `method_defaults`, a function from the name of a method to {field: default} (`peftjax.methods.method_defaults`).
"""

import ast
import dataclasses
import importlib.util
import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest

MethodDefaults = Callable[[str], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field. Its type is that of `default`; a tuple's elements are strings, a default of None is an optional str.

    choices: all values it can take, empty for any. low, high: the bounds of a number, inclusive.
    of_method: a method's field, whose own dataclass checks it further. There a str or a tuple may stand for each other
    (one pattern, several names), a dict for a tuple of pairs, and anything for None.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    of_method: bool = False


FIELDS: dict[str, Field] = {
    "seed": Field(0, "of every random draw: initial values, dropout, order of the data", low=0),
    "model.path": Field("embedded", 'Hugging Face directory or hub id; "embedded" is the small base in the package'),
    "model.revision": Field(None, "branch, tag or commit of a hub id; none: the default branch"),
    "model.dtype": Field("float32", "in which it computes", ("float32", "bfloat16")),
    "model.param_dtype": Field("", "in which the base is kept; empty: model.dtype", ("", "float32", "bfloat16")),
    "model.quantize": Field(
        "", "format of the frozen kernels; empty: not quantized", ("", "nf4", "nf4_single", "int8")
    ),
    "model.skip_quantize": Field((), "names of modules that stay in param_dtype, beside the head"),
    "model.remat": Field(
        "none",
        "what the backward pass computes again: all but linear layers, a block, or that with its input in host memory",
        ("none", "dots", "block", "offload"),
    ),
    "model.attention": Field(
        "xla",
        "what computes causal attention in training; cudnn (NVIDIA GPUs) and splash (TPUs) hold no scores in memory",
        ("xla", "cudnn", "splash"),
    ),
    "model.new_head": Field(False, "put a new head on an encoder in place of the one that its checkpoint has"),
    "model.init": Field("pretrained", "random: only config.json and the tokenizer are read", ("pretrained", "random")),
    "task.kind": Field(
        "causal_lm",
        "what is learnt: to go on with a text, to answer one (T5), or to tell the class or the number of a text (or a "
        "pair), the class of each word, or that of an image",
        ("causal_lm", "seq2seq", "classification", "regression", "token_classification", "image_classification"),
    ),
    "task.labels": Field((), "names of the classes, in their order; empty: those of the checkpoint's own head"),
    "task.multi_label": Field(False, "a text may have several classes at once, or none; for classification"),
    "method.name": Field("lora", "of the PEFT method; the section's other fields are that method's own"),
    "data.train": Field(
        (), "sources: tfds:NAME/SPLIT, FILE.jsonl, FILE.jsonl.gz, FILE.parquet or images:DIR, each with @WEIGHT or not"
    ),
    "data.eval": Field((), "held-out sources, written the same way"),
    "data.tfds_data_dir": Field("", "where TFDS keeps its data; empty: its own default"),
    "data.format": Field(
        "text",
        "of a record, for causal_lm: one text, prompt and completion, or messages",
        ("text", "completion", "chat"),
    ),
    "data.text_field": Field("text", "field with the text, for format text"),
    "data.prompt_field": Field("prompt", "field that {prompt} stands for in a template"),
    "data.completion_field": Field("completion", "field that {completion} stands for in a template"),
    "data.messages_field": Field("messages", "field with the list of messages, for format chat"),
    "data.prompt_template": Field(
        "{prompt}",
        "str.format over the record's fields: the prompt, or the text that is read (seq2seq, classification)",
    ),
    "data.completion_template": Field(
        "{completion}", "the same: what is learnt to be written, for format completion and for seq2seq"
    ),
    "data.pair_template": Field("", "the same: the second text of a pair; empty: there is none"),
    "data.label_field": Field(
        "label", "field with the class (its number or its name), the number, or the words' classes"
    ),
    "data.words_field": Field("words", "field with a text's words, for token_classification"),
    "data.image_field": Field("image", "field with an image, for image_classification"),
    "data.max_length": Field(512, "length of a sequence, tokens", low=2),
    "data.max_target_length": Field(128, "length of what seq2seq writes, tokens", low=2),
    "data.too_long": Field("truncate", "what happens to a record longer than that", ("truncate", "drop", "error")),
    "data.pack": Field(False, "several records in one sequence, none of which sees another"),
    "data.shuffle": Field(True, "another order of the records every epoch"),
    "data.workers": Field(0, "threads that read ahead; 0: the training loop reads", low=0),
    "optim.name": Field("adamw", "of the optimizer", ("adamw", "adafactor", "lion", "sgd")),
    "optim.learning_rate": Field(1e-4, "the highest of the schedule", low=0),
    "optim.schedule": Field("cosine", "of the learning rate after the warmup", ("constant", "linear", "cosine")),
    "optim.warmup_steps": Field(0, "steps over which the learning rate rises from 0", low=0),
    "optim.final_fraction": Field(0.0, "of the learning rate that is left after the last step", low=0, high=1),
    "optim.weight_decay": Field(0.0, "decoupled, times the learning rate; not for norms and biases", low=0),
    "optim.b1": Field(0.9, "decay of the first moment (adamw, lion)", low=0, high=1),
    "optim.b2": Field(0.999, "decay of the second moment (adamw); of the momentum (lion)", low=0, high=1),
    "optim.eps": Field(1e-8, "added to the root of the second moment (adamw)", low=0),
    "optim.momentum": Field(0.9, "of sgd", low=0, high=1),
    "optim.momentum_dtype": Field(
        "float32", "in which m_t is kept, the first moment (adamw, lion, sgd)", ("float32", "bfloat16")
    ),
    "optim.clip_norm": Field(1.0, "largest global norm of the gradient; 0: any", low=0),
    "train.steps": Field(1000, "updates in all", low=1),
    "train.batch_size": Field(8, "sequences a step, over all devices and microbatches", low=1),
    "train.accumulate": Field(1, "microbatches a step, run one after the other", low=1),
    "train.loss_chunk": Field(128, "positions of a sequence whose logits exist at one time", low=1),
    "train.log_every": Field(10, "steps between two lines of metrics", low=1),
    "train.eval_every": Field(0, "steps between two evaluations; 0: only after the last step", low=0),
    "train.eval_batches": Field(0, "batches an evaluation; 0: all held-out records", low=0),
    "eval.exact_match": Field(0, "held-out prompts answered by generation and scored; 0: no score", low=0),
    "eval.metrics": Field(("exact_match",), "scores of these answers: exact_match, bleu, rouge_l"),
    "eval.max_new_tokens": Field(64, "longest generated answer, tokens", low=1),
    "eval.samples": Field(
        0, "generated answers that are printed and reported; the first scored ones, if there are any", low=0
    ),
    "checkpoint.every": Field(100, "steps between two checkpoints", low=1),
    "checkpoint.keep": Field(2, "newest checkpoints to keep", low=1),
    "checkpoint.keep_best": Field(True, "keep the one with the lowest evaluation loss too"),
    "checkpoint.adapter": Field(False, "write adapter/ with every checkpoint, not only at the end"),
    "mesh.data": Field(1, "devices that split the batch; -1: all that are left", low=-1),
    "mesh.fsdp": Field(1, "devices that split the batch and the weights; -1: all that are left", low=-1),
    "mesh.sequence": Field(
        1, "devices that split the length of sequences and the weights; -1: all that are left", low=-1
    ),
    "mesh.tensor": Field(1, "devices that split heads and features; -1: all that are left", low=-1),
}


def defaults() -> ConfigDict:
    """Every field with its default, for a config file to change. Not locked: `load` checks what becomes of it."""
    return _nested({name: field.default for name, field in FIELDS.items()}, type_safe=False)


def load(
    path: str | Path, overrides: Iterable[str] = (), *, method_defaults: MethodDefaults | None = None
) -> ConfigDict:
    """The config of a Python file, completed, overridden, checked and locked.

    Args:
      path: a Python file with a function `get_config()`; of "FILE.py:TEXT", the text is its argument.
      overrides: strings "--config.optim.learning_rate=1e-3". The text is read as the field's type: true or false, an
        int, a float, a str as it stands, a tuple as comma-separated elements or a Python literal; "none" for None.
        Another method.name replaces the section `method` by that method's defaults before the others apply.

    Raises:
      UserError: the file fails, or a field is unknown, of the wrong type or out of its range.
    """
    values = _complete(_flat(_run(path)), method_defaults, str(path))
    parsed = [_split_override(item) for item in overrides]
    for name, text, source in sorted(parsed, key=lambda override: override[0] != "method.name"):
        if name == "method.name" and text != values[name]:
            rest = {key: value for key, value in values.items() if not key.startswith("method.")}
            values = _complete(rest | {name: text}, method_defaults, source)
        known = _known(values, method_defaults, source)
        if name not in known:
            raise _unknown(name, known, source)
        values[name] = _checked(name, _parse(text, known[name]), known[name], source)
    return _finished(values, str(path))


def validate(
    config: ConfigDict | Mapping[str, Any],
    *,
    method_defaults: MethodDefaults | None = None,
    source: str = "config",
) -> ConfigDict:
    """The config with the fields it left out, checked and locked; the argument stays as it is.

    Without `method_defaults` the method's own fields are taken as they are. `source` is named in messages.

    Raises:
      UserError: a field is unknown, of the wrong type or out of its range.
    """
    return _finished(_complete(_flat(config), method_defaults, source), source)


def to_json(config: ConfigDict) -> str:
    """The config as JSON text that `from_json` reads back equal."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote, locked; not validated, since another version's fields may be in it.

    Raises:
      UserError: it is no JSON object.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"the stored config is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"the stored config is not a JSON object but {type(values).__name__}")
    return _nested({name: _tuples(value) for name, value in _flat(values).items()}).lock()


def differences(here: ConfigDict, there: ConfigDict) -> list[str]:
    """One line for every field in which two configs differ: "optim.learning_rate: 0.001 here, 0.002 there"."""
    a, b = _flat(here), _flat(there)
    return [
        f"{name}: {repr(a[name]) if name in a else 'absent'} here, {repr(b[name]) if name in b else 'absent'} there"
        for name in a | b
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


def describe() -> str:
    """All fields with their defaults and meanings, a section at a time, for --help."""
    lines, section = ["config fields (--config.SECTION.FIELD=VALUE):"], ""
    for name, field in FIELDS.items():
        if (head := name.rpartition(".")[0]) != section:
            section = head
            lines.append("")
        choices = f" ({' | '.join(map(repr, field.choices))})" if field.choices else ""
        lines.append(f"  {name}={field.default!r}{choices}\n      {field.help}")
    return "\n".join(lines)


def _run(given: str | Path) -> ConfigDict | Mapping[str, Any]:
    """What the file's `get_config()` returns."""
    file, colon, argument = str(given).rpartition(".py:")
    path = Path(file + ".py" if colon else given)
    if not path.is_file():
        near = suggest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(f"--config={path}: there is no such file.{near}")
    spec = importlib.util.spec_from_file_location(f"peftjax_config_{path.stem}", path.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: a config is a Python file, its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError("a config file needs a function get_config() that returns a ConfigDict")
        config = get_config(argument) if colon else get_config()
        if not isinstance(config, ConfigDict | Mapping):
            raise UserError(f"get_config() must return a ConfigDict, it returned {config!r}")
    except Exception as error:  # the file may fail in any way; the user needs the place and the reason
        if isinstance(error, SyntaxError):
            line = error.lineno
        else:
            own = [
                frame.lineno
                for frame in traceback.extract_tb(error.__traceback__)
                if frame.filename == str(path.absolute())
            ]
            line = own[-1] if own else None
        place = f"{path}, line {line}" if line else str(path)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{place}: {kind}{' '.join(str(error).split())}") from error
    return config


def _flat(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """{"section.field": value}; a config has one level of sections."""
    flat: dict[str, Any] = {}
    for name, value in (config.to_dict() if isinstance(config, ConfigDict) else config).items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _nested(values: Mapping[str, Any], type_safe: bool = True) -> ConfigDict:
    """The opposite of `_flat`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    return ConfigDict(nested, type_safe=type_safe)


def _known(values: Mapping[str, Any], method_defaults: MethodDefaults | None, source: str) -> dict[str, Field]:
    """The fields a config with this method.name can have."""
    if method_defaults is None:
        own = {name: None for name in values if name.startswith("method.")}
    else:
        field = FIELDS["method.name"]
        method = _checked("method.name", values.get("method.name", field.default), field, source)
        try:
            own = {f"method.{name}": value for name, value in method_defaults(method).items()}
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    return FIELDS | {name: Field(default, "", of_method=True) for name, default in own.items() if name not in FIELDS}


def _complete(values: Mapping[str, Any], method_defaults: MethodDefaults | None, source: str) -> dict[str, Any]:
    """All known fields: those in `values`, checked, and the defaults of the others."""
    known = _known(values, method_defaults, source)
    for name in values:
        if name not in known:
            raise _unknown(name, known, source)
    return {
        name: _checked(name, values[name], field, source) if name in values else field.default
        for name, field in known.items()
    }


def _split_override(item: str) -> tuple[str, str, str]:
    """(field, text, the override for messages) of "--config.a.b=text"."""
    name, equals, text = item.removeprefix("--config.").partition("=")
    if not equals:
        raise UserError(f"{item}: an override has a value, --config.{name}=VALUE")
    return name, text, item


def _parse(text: str, field: Field) -> Any:
    """The text of an override as the field's type; where it cannot be read so, as it stands: `_checked` refuses it."""
    default = field.default
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            return text
    literal = _literal(text)
    if isinstance(default, tuple):
        if isinstance(literal, tuple | list | dict):
            return literal
        if field.of_method and _is_pattern(text):
            return text
        elements = [element.strip() for element in text.split(",") if element.strip()]
        return tuple(_literal(element) if field.of_method else element for element in elements)
    if default is None:
        return None if text.lower() in ("none", "") else literal if field.of_method else text
    return literal if field.of_method and isinstance(literal, tuple | list) else text


def _literal(text: str) -> Any:
    """The Python literal that the text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*+?()[]{}|^$\\")


def _checked(name: str, value: Any, field: Field, source: str) -> Any:
    """The value in the field's type (an int where a float belongs becomes one, a list a tuple), if it is allowed."""
    value = _tuples(value)
    kind = type(field.default)
    if field.of_method and isinstance(value, Mapping) and kind is tuple:
        value = tuple(value.items())
    if kind is float and type(value) is int:
        value = float(value)
    if not _fits(value, field):
        raise UserError(f"{source}: {name} must be {_expected(field)}, it is {value!r} ({type(value).__name__})")
    if field.choices and value not in field.choices:
        allowed = ", ".join(map(repr, field.choices))
        raise UserError(f"{source}: {name} is {value!r}; it can be {allowed}.{suggest(value, field.choices)}")
    if isinstance(value, int | float) and not (field.low <= value <= field.high and math.isfinite(value)):
        raise UserError(f"{source}: {name} is {value}; it must be {_bounds(field)}")
    if name.startswith("mesh.") and value == 0:
        raise UserError(f"{source}: {name} is 0; it must be a number of devices, or -1 for all that are left")
    return value


def _fits(value: Any, field: Field) -> bool:
    default = field.default
    if default is None:
        return field.of_method or value is None or isinstance(value, str)
    if field.of_method and isinstance(default, str | tuple):
        return isinstance(value, str | tuple)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(element, str) for element in value)
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def _expected(field: Field) -> str:
    if field.of_method and isinstance(field.default, str | tuple):
        return "a string or a tuple"
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string"}
    names |= {tuple: 'a tuple of strings, such as ("a", "b")', type(None): "a string or None"}
    return names.get(type(field.default), type(field.default).__name__)


def _bounds(field: Field) -> str:
    if math.isinf(field.low) and math.isinf(field.high):
        return "finite"
    return f"at least {field.low}" + ("" if math.isinf(field.high) else f" and at most {field.high}")


def _finished(values: dict[str, Any], source: str) -> ConfigDict:
    """The locked config, once the fields fit each other."""
    size, parts = values["train.batch_size"], values["train.accumulate"]
    if size % parts:
        raise UserError(
            f"{source}: train.batch_size is {size}; it must be a multiple of train.accumulate, which is {parts}"
        )
    rest = [name for name in values if name.startswith("mesh.") and values[name] == -1]
    if len(rest) > 1:
        raise UserError(f"{source}: {' and '.join(rest)} are -1 (all devices that are left); only one of them can be")
    return _nested(values).lock()


def _unknown(name: str, known: Mapping[str, Field], source: str) -> UserError:
    section, _, leaf = name.rpartition(".")
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key in known if "." in key))
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    if name in sections:
        inner = [key for key in known if key.startswith(name + ".")]
        return UserError(f"{source}: {name} is a section; set one of its fields: {', '.join(inner)}")
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    if elsewhere:
        hint = f" Did you mean {' or '.join(map(repr, elsewhere))}?"
    elif section in sections or not section:
        hint = suggest(leaf, [key.rpartition(".")[2] for key in siblings] + ([] if section else sections))
        hint = hint or f" There are: {', '.join(siblings + ([] if section else sections))}"
    else:
        hint = suggest(name, known) or f" Sections: {', '.join(sections)}"
    return UserError(f"{source}: unknown field {name}.{hint}")


def _tuples(value: Any) -> Any:
    """Lists as tuples, also inside of one."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
