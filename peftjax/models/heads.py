"""The task head of an encoder: the checkpoint's own or a new one, and its labels."""

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.models.fields import Fields

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
OTHER = "other"  # the checkpoint's head where a new one replaces it
REPLACE = "or replace it with new_head (model.new_head)"
# Fields of config.json that describe a head's outputs.
LABELS = frozenset({"id2label", "label2id", "num_labels", "_num_labels", "problem_type"})


class HeadOptions(TypedDict, total=False):
    """The options of a task head that a user chooses.

    Attributes:
        head: Kind of head; default: the checkpoint's.
        labels: Number of outputs, or their names; default: those in config.json.
        problem_type: One of `PROBLEMS`, if config.json does not specify it.
        new_head: Replace the checkpoint's own head with a new one.
    """

    head: str | None
    labels: int | Sequence[str] | None
    problem_type: str | None
    new_head: bool


def read_head(
    fields: Fields, options: Mapping[str, Any], architectures: Mapping[str, str], heads: Sequence[str]
) -> dict[str, Any]:
    """Decide on a model's task head.

    Args:
        fields: The fields of config.json. Those that only a head reads are skipped.
        options: `HeadOptions`, and other options, which are returned.
        architectures: {transformers class: its head}. The first one is the default, and the first one with a head is written.
        heads: The kinds of head the family has.

    Returns:
        The options of `EncoderConfig` that describe the head, among them `hf`, the config.json with its labels; and the other
        options.

    Raises:
        UserError: An unknown class or kind of head, an impossible number of labels, or labels or a problem type that
            contradict the checkpoint's own head.
    """
    fields.skip(*LABELS, "tie_word_embeddings", "finetuning_task")
    rest = dict(options)
    head, labels, problem_type, new_head = (rest.pop(name, None) for name in HeadOptions.__annotations__)
    config, stored = fields.config, _stored(fields.config, architectures, head)
    head = stored if head is None else head
    stored = OTHER if new_head and stored != "none" else stored
    if head not in heads:
        raise UserError(f"head={head!r} is not one of {', '.join(heads)}.{suggest(head, heads)}")
    if stored not in (head, "none"):  # config.json describes another head's labels
        config = {key: value for key, value in config.items() if key not in LABELS}
    if head != "none":
        names = _labels(config, head, stored, labels)
    elif labels is None:
        names = ()
    else:
        raise UserError(f"labels={labels} needs head={' or '.join(repr(name) for name in heads if name != 'none')}")
    if names != _named(config) and head != "none":
        config = {key: value for key, value in config.items() if key not in ("num_labels", "_num_labels")} | {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    for where, problem in (("config.json: ", config.get("problem_type")), ("", problem_type)):
        if problem not in (None, *PROBLEMS):
            raise UserError(f"{where}problem_type={problem!r} is not one of {', '.join(PROBLEMS)}")
    if problem_type is not None:
        if config.get("problem_type") not in (None, problem_type):
            raise UserError(
                f"the checkpoint's head is for {config['problem_type']}, not for {problem_type}; use another checkpoint, {REPLACE}"
            )
        config = config | {"problem_type": problem_type}
    architecture = next(name for name, kind in architectures.items() if kind == head)
    return rest | {
        "architecture": architecture,
        "head": head,
        "stored_head": stored,
        "labels": names,
        "problem_type": config.get("problem_type"),
        "hf": json.dumps(config),
    }


def stored_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """Return the labels of the head described by a config.json; transformers omits two unnamed labels."""
    count = config.get("num_labels") or config.get("_num_labels") or 2
    return _named(config) or _numbered(count)


def _stored(config: dict[str, Any], architectures: Mapping[str, str], head: str | None) -> str:
    """The kind of head in the checkpoint; `OTHER` if it is of an unsupported kind, and `head` is used in its place."""
    name = (config.get("architectures") or [next(iter(architectures))])[0]
    if name in architectures:
        return architectures[name]
    if head is None:
        raise UserError(
            f"config.json: architectures: {name!r} is not supported.{suggest(name, architectures)} "
            f"Supported: {', '.join(architectures)}; to load it without its own head, pass head= to load_model"
        )
    warnings.warn(f"config.json: architectures: the head of {name} is not supported and is left out", stacklevel=2)
    return OTHER


def _named(config: dict[str, Any]) -> tuple[str, ...]:
    """The labels in config.json, in order; empty if it has none."""
    named = config.get("id2label") or {}
    try:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    except ValueError:
        raise UserError(
            f"config.json: the keys of id2label must be the numbers of the labels, not {[*named]}"
        ) from None


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def _labels(config: dict[str, Any], head: str, stored: str, given: int | Sequence[str] | None) -> tuple[str, ...]:
    named = _named(config)
    labels = given if given is None or isinstance(given, int) else len(given)
    known = len(named) or config.get("num_labels") or config.get("_num_labels")
    if head == stored:
        known = len(stored_labels(config))
        if labels not in (None, known):
            raise UserError(
                f"labels={labels}, but the checkpoint's head has {known}; leave labels out to use it, {REPLACE}"
            )
    labels = known if labels is None else labels
    if labels is None or labels < 1:
        raise UserError(f"labels={labels}: give the number of labels of the new head, at least 1 (regression: 1)")
    if given is not None and not isinstance(given, int):
        named_on_purpose = head == stored and not all(name.startswith("LABEL_") for name in named)
        if named_on_purpose and named != tuple(given):
            raise UserError(f"labels={tuple(given)}, but the checkpoint's head has {named}; use those, {REPLACE}")
        return tuple(given)
    return named if len(named) == labels else _numbered(labels)
