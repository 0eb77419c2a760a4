"""Prompt tuning: [p_1 ... p_P; E(x)], where the P vectors before the embedded tokens are all that is trained.

Lester et al. 2021 (arXiv:2104.08691), section 2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax.adapters.options import integers, one_of
from peftjax.adapters.sites import insert
from peftjax.adapters.soft_prompt import InputPrompt, PromptAdapter, SoftPrompt
from peftjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(InputPrompt):
    """Options of prompt tuning.

    Attributes:
        init (str, default "random"): Initial vectors: "random" (normal, standard deviation 1, as in peft), "vocabulary"
            (random rows of the embedding) or "text" (the embedded tokens of `text`, repeated or truncated to P).
        text (str, default ""): The text of init="text".
        text_ids (tuple of int, default none): The tokens of `text`. The train command sets them by the base's tokenizer;
            elsewhere `method.tokenized(tokenizer.encode)` does.
    """

    init: str = "random"
    text: str = ""
    text_ids: tuple[int, ...] = ()

    method: ClassVar[str] = "prompt"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    hf_ignored: ClassVar = SoftPrompt.hf_ignored | {
        "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    }  # fmt: skip
    hf_training: ClassVar = {"prompt_tuning_init": "RANDOM"}
    traced_options: ClassVar = InputPrompt.traced_options | {"init", "text", "text_ids"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replace(text_ids=integers("text_ids", self.text_ids))
        one_of(("random", "vocabulary", "text"), init=self.init)
        if (self.init == "text") != bool(self.text or self.text_ids):
            raise UserError(
                f"method.text={self.text!r} and method.init={self.init!r}: set method.text if, and only if, method.init='text'"
            )

    def tokenized(self, encode: Callable[[str], list[int]]) -> Self:
        return dataclasses.replace(self, text_ids=tuple(encode(self.text))) if self.text else self

    def attach(self, model: nnx.Module, name: str, rngs: nnx.Rngs) -> None:
        site = self.site(model)
        insert(site, name, PromptAdapter(self._initial(site.module, rngs), self.tokens))

    def _initial(self, embedding: Any, rngs: nnx.Rngs) -> jax.Array:
        """The initial vectors, float32 [P or 2 P, D]."""
        if self.init == "random":
            return jax.random.normal(rngs.params(), (self.vectors, embedding.out_features), jnp.float32)
        if self.init == "vocabulary":
            ids = jax.random.randint(rngs.params(), (self.vectors,), 0, embedding.in_features)
        elif self.text_ids:
            if beyond := [token for token in self.text_ids if not 0 <= token < embedding.in_features]:
                raise UserError(
                    f"method.text_ids: {beyond[0]} is not a token of this model; its ids are 0 to {embedding.in_features - 1}"
                )
            ids = jnp.resize(jnp.array(self.text_ids), (self.vectors,))
        else:
            raise UserError("method.text has no tokens yet: call method.tokenized(tokenizer.encode) before attach")
        return embedding.embedding.get_value()[ids].astype(jnp.float32)
