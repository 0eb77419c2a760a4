"""The model card of an adapter: a README.md with the metadata that the Hugging Face hub reads, and how to load it."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftjax.adapters.method import Method
from peftjax.io import adapter_hub
from peftjax.io.adapter_method import read_method
from peftjax.io.adapter_tensors import CONFIG, WEIGHTS
from peftjax.io.hf_files import read_header, read_json

CARD = "README.md"
REPOSITORY = "ORG/NAME"  # stands for the repository in the text of a card, until the adapter is uploaded
_LOCAL = "path/to/base-model"
# The hub's name of the task, and the class of transformers, by PEFT's task_type.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
    "IMAGE_CLS": ("image-classification", "AutoModelForImageClassification"),  # PEFT has no task_type for it
}


@dataclasses.dataclass(frozen=True)
class Training:
    """What a card says about the training.

    Attributes:
      task: A key of `_TASKS`.
      head: The options of `load_model` for the task head.
      facts: Further rows of the table, by name.
      scores: Rows of the table of scores: the metric, and its values before and after the training; nan if unknown.
      data: What the scores were measured on.
    """

    task: str
    head: Mapping[str, Any]
    facts: Mapping[str, str]
    scores: Sequence[tuple[str, float, float]] = ()
    data: str = ""


def make_card(directory: Path, training: Training | None = None) -> str:
    """The text of README.md for the adapter in a directory.

    Args:
      directory: The directory of the adapter, in the format of PEFT or of AdapterHub.
      training: Information about the training that is not in the files.

    Raises:
      UserError: The directory does not hold an adapter that can be read.
    """
    from huggingface_hub import ModelCardData

    config, method, hub = read_json(directory / CONFIG), read_method(directory), adapter_hub.is_hub(directory)
    base = config.get("model_name" if hub else "base_model_name_or_path") or ""
    task = training.task if training else config.get("task_type")
    tag, auto_class = _TASKS.get(task or "", (None, "AutoModel"))
    tags = [method.method, "peftjax"] + ([] if hub else ["transformers"])
    if hub_id := _hub_id(base):
        tags.insert(0, f"base_model:adapter:{hub_id}")
    data = ModelCardData(
        base_model=hub_id,
        library_name="adapter-transformers" if hub else "peft",
        pipeline_tag=tag,
        tags=tags,
    )
    rows = {
        "Base model": f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else _shown_base(base),
        "Method": f"`{method.method}`",
        "Options": ", ".join(f"`{name}={value!r}`" for name, value in _options(method).items()) or "defaults",
        **(training.facts if training else {"Parameters": f"{_parameters(directory, hub):,}"}),
    }
    title = f"# {type(method).__name__} adapter for {hub_id or _shown_base(base)}"
    head = training.head if training else {}
    parts = [
        title,
        _table(("", ""), list(rows.items())),
        *([_scores(training)] if training and training.scores else []),
        _usage(hub_id, base, auto_class, head, hub),
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _hub_id(base: str) -> str | None:
    """The base's id on the hub; None if it is a local directory or the bundled model."""
    word = r"[A-Za-z0-9_][\w.-]*"
    local = base == "embedded" or Path(base).expanduser().exists()
    return None if local or not re.fullmatch(rf"{word}(/{word})?", base) else base


def _shown_base(base: str) -> str:
    """A base that is not on the hub, without local parent directories."""
    if base == "embedded":
        return "the model bundled with peftjax"
    return f"`{Path(base).name}`" if base else "an unknown base model"


def _options(method: Method) -> dict[str, Any]:
    """The options that are not at their defaults; rank and alpha in any case."""
    values = {field.name: (getattr(method, field.name), field.default) for field in dataclasses.fields(method)}
    return {name: value for name, (value, default) in values.items() if value != default or name in ("rank", "alpha")}


def _parameters(directory: Path, hub: bool) -> int:
    """The number of elements of the tensors in the files."""
    names = (adapter_hub.WEIGHTS, adapter_hub.HEAD) if hub else (WEIGHTS,)
    files = [directory / name for name in names if (directory / name).is_file()]
    return sum(math.prod(tensor.shape) for file in files for tensor in read_header(file).values())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _scores(training: Training) -> str:
    shown = [
        [name, *("" if math.isnan(value) else f"{value:.4g}" for value in pair)] for name, *pair in training.scores
    ]
    return f"## Scores\n\nMeasured on {training.data}.\n\n" + _table(("Metric", "Before training", "After"), shown)


def _usage(hub_id: str | None, base: str, auto_class: str, head: Mapping[str, Any], hub: bool) -> str:
    """How to load the adapter in Hugging Face's library and in peftjax."""
    theirs, ours = hub_id or _LOCAL, "embedded" if base == "embedded" else hub_id or _LOCAL
    given = {name: value for name, value in head.items() if value not in (None, False)}
    labels = given.get("labels")
    count = f", num_labels={labels if isinstance(labels, int) else len(labels)}" if labels else ""
    options = "".join(f", {name}={value!r}" for name, value in given.items())
    library = "adapters" if hub else "peft"
    load = (
        "adapters.init(model)\nmodel.set_active_adapters(model.load_adapter(adapter))"
        if hub
        else "model = peft.PeftModel.from_pretrained(model, adapter)"
    )
    note = f" `{_LOCAL}` stands for the directory of the base model." if _LOCAL in (theirs, ours) else ""
    return f"""## How to load it

Download the adapter, or set `adapter` to a directory that contains it.{note}

```python
from huggingface_hub import snapshot_download

adapter = snapshot_download("{REPOSITORY}")
```

With {"AdapterHub's adapters" if hub else "Hugging Face PEFT"}:

```python
import {library}
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{theirs}"{count})
{load}
```

With peftjax:

```python
import peftjax

model = peftjax.load_model("{ours}"{options})
peftjax.load_adapter(model, adapter)
```"""
