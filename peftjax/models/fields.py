"""The fields of a Hugging Face config.json, each taken by its name; one that nobody takes is refused."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peftjax.core.paths import suggest
from peftjax.nn.feedforward import ACTIVATIONS

# Fields that say nothing about the computation of logits.
HARMLESS = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "_name_or_path", "tokenizer_class",
    "_attn_implementation_autoset", "keys_to_ignore_at_inference", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "problem_type", "torchscript",
    "chunk_size_feed_forward", "max_length", "temperature", "top_k", "top_p", "do_sample", "unsloth_version",
    "unsloth_fixed", "_commit_hash", "peftjax_version", "_num_labels", "gradient_checkpointing",
})  # fmt: skip


class Fields:
    """What a config.json says. A family takes the fields that it honours; `done` refuses what is left.

    defaults: what transformers fills in for a field that is left out; harmless: the fields that say nothing about the
    logits here.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] = MappingProxyType({}),
        harmless: frozenset[str] = HARMLESS,
    ) -> None:
        self.config, self.kind = config, str(config["model_type"])
        given = {name: value for name, value in config.items() if value is not None and name not in harmless}
        self._left = dict(defaults) | given

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a field, which must be there where there is no default."""
        value = self._left.pop(name, default)
        if value is None:
            raise ValueError(f"config.json: field {name!r} is missing.{suggest(name, self.config)}")
        return value

    def maybe(self, name: str) -> Any:
        """The value of a field, or None where it is null or left out."""
        return self._left.pop(name, None)

    def nullable(self, name: str, default: Any) -> Any:
        """The value of a field in which null is a value of its own: `default` where it is left out."""
        self._left.pop(name, None)
        return self.config.get(name, default)

    def only(self, name: str, supported: Any) -> None:
        """Refuse any value of a field but one, which is also what a missing field means."""
        if (value := self._left.pop(name, supported)) != supported:
            raise ValueError(
                f"config.json: {name}={value!r} is not supported for model_type {self.kind!r}, only {supported!r}"
            )

    def no_dropout(self, *names: str) -> None:
        """Refuse dropout in the base."""
        for name in names:
            if self._left.pop(name, 0.0) != 0.0:
                raise ValueError(f"config.json: {name} is not supported; it matters in training only: set it to 0.0")

    def activation(self, name: str, default: str) -> str:
        """The value of a field that names an activation of `ACTIVATIONS`."""
        if (value := self.take(name, default)) not in ACTIVATIONS:
            raise ValueError(f"config.json: {name} {value!r} is not known; supported: {sorted(ACTIVATIONS)}")
        return value

    def done(self) -> None:
        """Refuse the fields that were not taken."""
        if self._left:
            raise ValueError(
                f"config.json: {', '.join(sorted(self._left))}: not known for model_type {self.kind!r}, so the model "
                "might compute something else; take the field out of config.json if it does not matter"
            )
