"""The fields of a Hugging Face config.json, read by name; a field that is not read is an error or a warning."""

import warnings
from collections.abc import Mapping
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.models import hf_fields
from peftjax.nn.feedforward import ACTIVATIONS

# Fields that do not affect the logits, unless a family takes them.
HARMLESS = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "_name_or_path", "tokenizer_class",
    "_attn_implementation_autoset", "keys_to_ignore_at_inference", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "torchscript",
    "chunk_size_feed_forward", "max_length", "temperature", "top_k", "top_p", "do_sample", "unsloth_version",
    "unsloth_fixed", "_commit_hash", "peftjax_version", "_num_labels", "gradient_checkpointing", "_attn_implementation",
})  # fmt: skip


class Fields:
    """The fields of a config.json. A family takes those it supports, and `done` deals with the rest.

    Args:
        config: The config.json.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.kind = config, str(config["model_type"])
        self._left = {name: value for name, value in config.items() if value is not None}

    def assume(self, **defaults: Any) -> None:
        """Use defaults of transformers for omitted fields."""
        self._left = defaults | self._left

    def skip(self, *names: str) -> None:
        """Leave out fields that do not affect the logits of this family."""
        for name in names:
            self._left.pop(name, None)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give fields the names by which they are taken, {name in config.json: name}."""
        self.config, self._left = (
            {names.get(name, name): value for name, value in fields.items()} for fields in (self.config, self._left)
        )

    def take(self, name: str, default: Any = None) -> Any:
        """Return the value of a field; without a default it is required."""
        value = self._left.pop(name, default)
        if value is None:
            raise UserError(f"config.json: field {name!r} is missing.{suggest(name, self.config)}")
        return value

    def maybe(self, name: str) -> Any:
        """Return the value of a field, or None if it is null or omitted."""
        return self._left.pop(name, None)

    def nullable(self, name: str, default: Any) -> Any:
        """Return the value of a field for which null has a meaning; `default` if it is omitted."""
        value = self._left.pop(name, default)
        return self.config.get(name, value)

    def only(self, name: str, supported: Any) -> None:
        """Reject any value of a field but one, which is also the meaning of an omitted field."""
        if (value := self._left.pop(name, supported)) != supported:
            raise UserError(
                f"config.json: {name}={value!r} is not supported for model_type {self.kind!r}, only {supported!r}"
            )

    def implied(self, name: str, computed: Any) -> None:
        """Accept a field whose value matches what is computed anyway; any other value is left to `done`."""
        if self._left.get(name) == computed:
            del self._left[name]

    def no_dropout(self, *names: str) -> None:
        """Reject dropout in the base model."""
        for name in names:
            if (value := self._left.pop(name, 0.0)) != 0.0:
                raise UserError(
                    f"config.json: {name}={value} is not supported; it only affects training: set it to 0.0"
                )

    def activation(self, name: str, default: str) -> str:
        """Return the value of a field that names one of `ACTIVATIONS`."""
        if (value := self.take(name, default)) not in ACTIVATIONS:
            raise UserError(f"config.json: unknown {name} {value!r}; supported: {', '.join(sorted(ACTIVATIONS))}")
        return value

    def done(self) -> None:
        """Deal with the fields that were not taken: reject those that transformers reads, and warn of the others."""
        left = sorted(self._left.keys() - HARMLESS)
        read = [name for name in left if hf_fields.reads(self.kind, name)]
        if read:
            raise UserError(
                f"config.json: {', '.join(f'{name}={self._left[name]!r}' for name in read)}: transformers reads this for "
                f"model_type {self.kind!r} and peftjax does not, so the logits could differ; remove the field from "
                "config.json if the checkpoint was trained without it"
            )
        if left:
            warnings.warn(
                f"config.json: ignoring {', '.join(left)}, as transformers does for model_type {self.kind!r}",
                stacklevel=2,
            )
