"""The files of a multimodal checkpoint of which only the text model is loaded."""

import collections
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from peftjax.core.errors import UserError
from peftjax.io.adapter_keys import bare_key
from peftjax.io.json_files import read_json
from peftjax.io.safetensors_files import StoredTensor, read_tensors
from peftjax.models.base import Model
from peftjax.models.multimodal import OTHERS, other_part, text_name


def text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the text model by the names they have in a checkpoint of the text model alone."""
    return {ours: tensor for name, tensor in tensors.items() if (ours := text_name(name)) is not None}


def warn_of_the_rest(tensors: Mapping[str, StoredTensor], directory: Path) -> None:
    """Warn that the other parts of a multimodal checkpoint are not loaded, and name them."""
    if others := [name for name in tensors if text_name(name) is None]:
        warnings.warn(f"{directory}: loading the text model only, without {_parts(others)}", stacklevel=3)


def in_other_parts(keys: Iterable[str]) -> list[str]:
    """Return the keys of an adapter file that belong to the parts of a multimodal model other than its text model."""
    return sorted(key for key in keys if bare_key(key).split(".")[0] in OTHERS)


def warn_of_adapters(keys: Iterable[str], file: Path) -> None:
    """Warn that these tensors of an adapter file are not loaded, and name their parts."""
    warnings.warn(
        f"{file}: loading the adapters of the text model only, not of {_parts(map(bare_key, keys))}; save_adapter does not write "
        "these",
        stacklevel=4,
    )


def _parts(names: Iterable[str]) -> str:
    """The parts that tensors outside the text model belong to, with the number of tensors of each."""
    parts = collections.Counter(other_part(name) for name in names)
    return ", ".join(f"{part} ({count} tensor{'s' * (count > 1)})" for part, count in sorted(parts.items()))


class Surroundings:
    """The checkpoint that a text model was loaded from: what `save_model` copies, and the names it writes.

    Attributes:
        others: The tensors outside the text model, by name.

    Raises:
        UserError: There is no source, or it is another model.
    """

    def __init__(self, model: Model, source: Path | None) -> None:
        kind = model.config.to_hf()["model_type"]
        if source is None:
            raise UserError(
                f"save_model: this is the text model of a {kind} model; pass source=DIR, the directory it was loaded from, "
                "from which the other parts are copied"
            )
        if read_json(source / "config.json").get("model_type") != kind:
            raise UserError(f"save_model: source={source} is not the {kind} model that this text model was loaded from")
        stored = read_tensors(source)
        self.others = {name: tensor for name, tensor in stored.items() if text_name(name) is None}
        self._stored = {ours: name for name in stored if (ours := text_name(name)) is not None}
        table = self._stored["model.embed_tokens.weight"].removesuffix("embed_tokens.weight")
        head = "language_model.lm_head." if table == "language_model.model." else "lm_head."
        self._prefixes = {"model.": table, "lm_head.": head}

    def stored_name(self, name: str) -> str:
        """Return the name that the source uses for a tensor of the text model."""
        prefix = next(prefix for prefix in self._prefixes if name.startswith(prefix))
        return self._stored.get(name, self._prefixes[prefix] + name.removeprefix(prefix))
