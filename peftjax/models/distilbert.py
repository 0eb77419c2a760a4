"""DistilBERT: BERT with half of the layers and without token types (Sanh et al. 2019, arXiv:1910.01108, section 3)."""

from typing import ClassVar, Unpack

import jax
from flax import nnx

from peftjax.models.bert import Bert
from peftjax.models.encoder import linear, read_sizes
from peftjax.models.fields import Fields
from peftjax.models.text_encoder import TextEncoderConfig, TextOptions, read_text_head


class DistilBert(Bert):
    """BERT's blocks without a pooler; the head for sequences is relu(x W + b) W_out + b_out."""

    output_layers: ClassVar = ("pre_classifier", "classifier")
    task_head: ClassVar = output_layers
    head_modules: ClassVar = output_layers
    pooled_heads: ClassVar = ()

    def make_head(self, rngs: nnx.Rngs) -> None:
        if self.config.head == "sequence_classification":
            self.pre_classifier = linear(self.config, self.config.embed, rngs)
        super().make_head(rngs)

    def pool(self, states: jax.Array, valid: jax.Array) -> jax.Array:
        return jax.nn.relu(self.pre_classifier(super().pool(states, valid)))

    # --- Hugging Face: names of our modules, and config.json ---

    hf_root = "distilbert"
    hf_heads: ClassVar = {"pre_classifier": "pre_classifier", "classifier": "classifier"}
    hf_pretraining: ClassVar = (r"vocab_(transform|layer_norm|projector)\..*",)


DistilBert.hf_base = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "blocks.attention": "transformer.layer.{}.attention",
    "blocks.attention.query": "transformer.layer.{}.attention.q_lin",
    "blocks.attention.key": "transformer.layer.{}.attention.k_lin",
    "blocks.attention.value": "transformer.layer.{}.attention.v_lin",
    "blocks.attention.out": "transformer.layer.{}.attention.out_lin",
    "blocks.attention_residual": "transformer.layer.{}.attention_adapters",  # where AdapterHub puts its adapters
    "blocks.attention_residual.norm": "transformer.layer.{}.sa_layer_norm",
    "blocks.feedforward.up": "transformer.layer.{}.ffn.lin1",
    "blocks.feedforward.down": "transformer.layer.{}.ffn.lin2",
    "blocks.feedforward_residual": "transformer.layer.{}.output_adapters",
    "blocks.feedforward_residual.norm": "transformer.layer.{}.output_layer_norm",
}
# The names of BERT's fields.
_NAMES = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
}


def from_hf(fields: Fields, **options: Unpack[TextOptions]) -> TextEncoderConfig:
    """Read a config.json of model_type distilbert, with DistilBERT's names of the fields or BERT's."""
    chosen = read_text_head(fields, options, "DistilBert")
    fields.rename(_NAMES | {"intermediate_size": "intermediate_size"})  # which transformers does not read
    # Dropout of question answering, initialization of the position table, and two fields of the first checkpoints.
    fields.skip("qa_dropout", "sinusoidal_pos_embds", "tie_weights_", "output_past")
    positions, dropout = fields.take("max_position_embeddings", 512), fields.take("dropout", 0.1)
    sequences = fields.take("seq_classif_dropout", 0.2)
    return TextEncoderConfig(
        model=DistilBert,
        **read_sizes(fields, _NAMES),
        vocab=fields.take("vocab_size"),
        positions=positions,
        max_positions=positions,
        token_types=0,
        norm_eps=1e-12,
        activation=fields.activation("activation", "gelu"),
        dropout=dropout,
        attention_dropout=fields.take("attention_dropout", 0.1),
        head_dropout=sequences if chosen["head"] == "sequence_classification" else dropout,
        **chosen,
    )
