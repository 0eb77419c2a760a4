"""Match the tensors of a checkpoint to the parameters of a model, before any is read."""

import dataclasses
import re
import warnings
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np

from peftjax.core.errors import UserError
from peftjax.core.listing import enumerate_some
from peftjax.core.paths import suggest
from peftjax.io.bitsandbytes import Packed, Stored
from peftjax.io.entries import Entry, is_linear
from peftjax.io.json_files import read_json
from peftjax.io.safetensors_files import FLOATS
from peftjax.models.base import LanguageModel, LanguageModelConfig, Model, ModelConfig


def tied_as_stored(config: ModelConfig, stored: Mapping[str, Stored]) -> ModelConfig:
    """Return the configuration with `tied` decided by the tensors, for a family that has `tied_if_equal`.

    The text model of a multimodal checkpoint is tied if its config.json says so and the tensors do not differ.
    """
    if not isinstance(config, LanguageModelConfig):
        return config
    of_whole = ("lm_head.weight", "model.embed_tokens.weight") if config.whole and config.tied else None
    if (names := of_whole or config.tied_if_equal) is None:
        return config
    one, other = (stored.get(name) for name in names)
    return dataclasses.replace(config, tied=one is None or other is None or _equal(one, other))


def match(model: Model, table: Sequence[Entry], stored: Mapping[str, Stored], directory: Path) -> dict[str, Stored]:
    """Return the tensors of a checkpoint by the keys of the table, without reading them.

    Raises:
        UserError: Tensors are missing, or of a wrong shape or dtype; one message names them all, and those that are unexpected.
            Unexpected tensors alone are a warning, as in transformers, unless they may be the scales of quantized ones.
    """
    known = {key for entry in table for key in entry.keys} | model.hf_tied.keys()
    found = {
        name: tensor for name, tensor in _renamed(model, stored, known, directory).items() if not _ignored(model, name)
    }
    present = {_part(entry) for entry in table if any(key in found for key in entry.keys)}
    fresh = set(model.hf_fresh) - present  # the modules that the checkpoint may lack, and does
    expected = {key: entry for entry in table if _part(entry) not in fresh for key in entry.keys}
    tied = {other: key for other, key in model.hf_tied.items() if other not in expected and other in found}
    twins: dict[str, Stored] = {}
    for other, key in tied.items():
        twins[other] = found.pop(other)
        found.setdefault(key, twins[other])
    missing = [key for key in expected if key not in found]
    unexpected = sorted(name for name in found if name not in expected)
    # Suggestions for all could take minutes.
    unexpected[:20] = [f"{name}{suggest(name, missing)}" for name in unexpected[:20]]
    shapes: list[str] = []
    dtypes: list[str] = []
    for packed in (tensor for tensor in found.values() if isinstance(tensor, Packed)):
        for problem, faults in zip((missing, unexpected, shapes), packed.faults(), strict=True):
            problem += faults
    for key in (key for key in expected if key in found):
        tensor, entry = found[key], expected[key]
        needed = entry.packed_shape if isinstance(tensor, Packed) and is_linear(model, entry) else entry.stored_shape
        if tensor.shape != needed:
            shapes.append(f"{key} is stored as {list(tensor.shape)}, but config.json asks for {list(needed)}")
        if tensor.dtype not in FLOATS:
            dtypes.append(f"{key} is stored as {tensor.dtype}, but must be a float of 8 to 64 bits")
    problems = {"missing": missing, "unexpected": unexpected, "of a wrong shape": shapes, "of a wrong dtype": dtypes}
    if unexpected and not (missing or shapes or dtypes or any(_quantized(found[key]) for key in expected)):
        warnings.warn(
            f"{directory}: ignoring tensors that its model_type does not have, as transformers does: "
            f"{enumerate_some(unexpected, 5)}",
            stacklevel=3,
        )
    elif any(problems.values()):
        lines = [f"  {len(names)} {what}: {enumerate_some(names)}" for what, names in problems.items() if names]
        advice = "Check that config.json and the weights belong together, and that the weights are of the whole model"
        if isinstance(model, LanguageModel) and missing == [f"{model.hf_modules['head']}.weight"]:
            advice = (
                "A classifier, or a model that was saved without its language modeling head, cannot be loaded; use the model that "
                "it was made from. If the head is the embedding, set tie_word_embeddings to true in config.json"
            )
        raise UserError(
            f"{directory}: the stored tensors do not match its config.json (model_type "
            f"{read_json(directory / 'config.json').get('model_type')!r}):\n" + "\n".join([*lines, advice])
        )
    for other, key in tied.items():
        if found[key] is not twins[other] and not _equal(found[key], twins[other]):
            raise UserError(
                f"{directory}: config.json ties {other} to {key}, but both are stored and differ; "
                "to keep both, set tie_word_embeddings to false; to keep one, remove the other from the file"
            )
    return found


def _renamed(model: Model, stored: Mapping[str, Stored], known: Container[str], directory: Path) -> dict[str, Stored]:
    """The tensors by our keys; checkpoints may use several names for one tensor (`Model.hf_stored`)."""
    renamed: dict[str, Stored] = {}
    for name, tensor in stored.items():
        ours = model.hf_stored(name)
        # Messages name an unexpected tensor as the file does.
        key = ours if ours in known or _ignored(model, ours) else name
        if (other := renamed.setdefault(key, tensor)) is not tensor:
            raise UserError(f"{directory}: {other.name} and {name} are the same tensor; remove one from the file")
    return renamed


def _part(entry: Entry) -> str:
    return entry.path.split(".")[0]


def _ignored(model: Model, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in model.hf_ignored)


def _quantized(tensor: Stored) -> bool:
    """Whether a tensor is in a format that stores scales as separate tensors."""
    return isinstance(tensor, Packed) or tensor.dtype.startswith("F8")


def _equal(one: Stored, other: Stored, rows: int = 1024) -> bool:
    """Whether two stored tensors are equal, compared some rows at a time."""
    if one.shape != other.shape or isinstance(one, Packed) or isinstance(other, Packed):
        return False
    chunks = (slice(start, min(start + rows, one.shape[0])) for start in range(0, one.shape[0], rows))
    first, second = one.open(), other.open()
    return all(np.array_equal(np.float64(first[chunk]), np.float64(second[chunk])) for chunk in chunks)
