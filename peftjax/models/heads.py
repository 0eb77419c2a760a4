"""The head of an encoder: the one of its checkpoint or the one that is asked for, and its labels."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peftjax.core.paths import suggest

PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
OTHER = "other"  # what the checkpoint's head is called where a new one takes its place
INSTEAD = "or put a new one in its place by new_head (model.new_head)"
# Fields of config.json about a head's outputs.
LABELS = frozenset({"id2label", "label2id", "num_labels", "_num_labels", "problem_type"})


@dataclasses.dataclass(frozen=True)
class Head:
    """What a model ends in. name: "none" or a kind of head; stored: the one that the checkpoint has; config: the
    config.json that says so, with the labels that were asked for."""

    name: str
    stored: str
    labels: tuple[str, ...]
    problem_type: str | None
    config: dict[str, Any]


class EncoderConfig:
    """What the configs of encoders have in common."""

    embed: int
    heads: int
    head: str
    param_dtype: str
    hf: str

    @property
    def architectures(self) -> Mapping[str, str]:
        """As for `read_head`."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed // self.heads

    @property
    def kv_heads(self) -> int:
        """Each query head has keys of its own."""
        return self.heads

    def to_hf(self) -> dict[str, Any]:
        """config.json for a directory that transformers loads."""
        fields = json.loads(self.hf)
        fields.pop("torch_dtype", None)
        architecture = next(name for name, head in self.architectures.items() if head == self.head)
        return fields | {"dtype": self.param_dtype, "architectures": [architecture]}


def read_head(
    config: dict[str, Any],
    architectures: Mapping[str, str],
    heads: Sequence[str],
    head: str | None = None,
    labels: int | Sequence[str] | None = None,
    problem_type: str | None = None,
    new_head: bool = False,
) -> Head:
    """The head that a config.json names in `architectures`, or else `head`, one of `heads`, with `labels` outputs, or one
    for each name in `labels`.

    architectures: the class that wrote a checkpoint -> its head, the first one where none is named. problem_type: one of
    `PROBLEMS`, where config.json does not say. new_head: the checkpoint's own is none of ours, whatever it is.

    Raises:
        ValueError: a class or a head that is not known, a number of labels that cannot be, or labels or a problem other
            than those of the checkpoint's own head.
    """
    stored = _stored(config, architectures)
    head = stored if head is None else head
    stored = OTHER if new_head and stored != "none" else stored
    if head not in heads:
        raise ValueError(f"head={head!r} is none of {', '.join(heads)}.{suggest(head, heads)}")
    if stored not in (head, "none"):  # then these are another head's
        config = {key: value for key, value in config.items() if key not in LABELS}
    if head != "none":
        names = _labels(config, head, stored, labels)
    elif labels is None:
        names = ()
    else:
        raise ValueError(
            f"labels={labels} goes with head={' or '.join(repr(name) for name in heads if name != 'none')}"
        )
    if names != _named(config) and head != "none":
        config = {key: value for key, value in config.items() if key not in ("num_labels", "_num_labels")} | {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    for problem in (config.get("problem_type"), problem_type):
        if problem not in (None, *PROBLEMS):
            raise ValueError(f"config.json: problem_type={problem!r} is none of {', '.join(PROBLEMS)}")
    if problem_type is not None:
        if config.get("problem_type") not in (None, problem_type):
            raise ValueError(
                f"the checkpoint's head is for {config['problem_type']}, not for {problem_type}; take another checkpoint, "
                f"{INSTEAD}"
            )
        config = config | {"problem_type": problem_type}
    return Head(head, stored, names, config.get("problem_type"), config)


def _stored(config: dict[str, Any], architectures: Mapping[str, str]) -> str:
    name = (config.get("architectures") or [next(iter(architectures))])[0]
    if name not in architectures:
        raise ValueError(
            f"config.json: architectures: {name!r} is not supported.{suggest(name, architectures)} "
            f"Supported: {', '.join(architectures)}"
        )
    return architectures[name]


def _named(config: dict[str, Any]) -> tuple[str, ...]:
    """The labels of config.json in their order; none if it names none."""
    named = config.get("id2label") or {}
    return tuple(str(named[key]) for key in sorted(named, key=int))


def stored_labels(config: dict[str, Any]) -> tuple[str, ...]:
    """The labels of the head that a config.json describes; transformers writes none where there are two without a name."""
    count = config.get("num_labels") or config.get("_num_labels") or 2
    return _named(config) or _numbered(count)


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{number}" for number in range(count))


def _labels(config: dict[str, Any], head: str, stored: str, given: int | Sequence[str] | None) -> tuple[str, ...]:
    named = _named(config)
    labels = given if given is None or isinstance(given, int) else len(given)
    known = len(named) or config.get("num_labels") or config.get("_num_labels")
    if head == stored:
        known = len(stored_labels(config))
        if labels not in (None, known):
            raise ValueError(
                f"labels={labels}, but the checkpoint's head has {known}; leave labels out to use it, {INSTEAD}"
            )
    labels = known if labels is None else labels
    if labels is None or labels < 1:
        raise ValueError(f"labels={labels}: say how many labels the new head has, at least 1 (regression: 1)")
    if given is not None and not isinstance(given, int):
        meant = head == stored and not all(name.startswith("LABEL_") for name in named)
        if meant and named != tuple(given):
            raise ValueError(
                f"labels={tuple(given)}, but those of the checkpoint's head are {named}; use these, {INSTEAD}"
            )
        return tuple(given)
    return named if len(named) == labels else _numbered(labels)
