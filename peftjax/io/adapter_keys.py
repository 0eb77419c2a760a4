"""Keys of adapter files that were not written by peft's `save_pretrained`."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

# What compiled, distributed, multimodal and unwrapped models add to a key, peft's own prefix, and the adapter's name,
# which is there if a state dict was saved without peft.
WRAPPERS = {
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "model", "language_model",
    "default",
}  # fmt: skip


def respelled(tensors: Mapping[str, T], expected: Iterable[str]) -> tuple[dict[str, T], dict[str, str]]:
    """Rename tensors whose keys differ from expected ones only by wrappers, where that is unambiguous.

    Returns:
        The tensors, and {expected key: key in the file} of those that were renamed.
    """
    expected = set(expected)
    wanted = _by_bare_key(expected - tensors.keys())
    given = _by_bare_key(tensors.keys() - expected)
    new = {
        given[bare][0]: keys[0]
        for bare, keys in sorted(wanted.items())
        if len(keys) == 1 and len(given.get(bare, ())) == 1
    }
    renamed = {key: old for old, key in new.items() if not old.endswith("lora_magnitude_vector.weight")}
    return {new.get(key, key): value for key, value in tensors.items()}, renamed


def bare_key(key: str) -> str:
    """Return a key, or the name of a module, without wrappers."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    # peft has held this vector in a module since 0.10; a state dict that it did not write has the module's name
    return ".".join(parts).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _by_bare_key(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(bare_key(key), []).append(key)
    return found


def has_single_experts(keys: Iterable[str]) -> bool:
    """Whether these keys of an adapter file belong to modules of single experts."""
    return any(re.search(r"\.experts\.\d+\.", key) for key in keys)
