"""What every model family provides: a configuration, a forward pass, and the names Hugging Face uses for its parts."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.nn.attention import Attention
from peftjax.nn.embedding import Embedding
from peftjax.nn.feedforward import ACTIVATIONS, FeedForward
from peftjax.nn.linear import Linear
from peftjax.quant.matmul import matmul


class ComputeOptions(TypedDict, total=False):
    """The options of a configuration that config.json does not decide; see `ModelConfig`."""

    dtype: str
    param_dtype: str
    remat: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and options shared by all families.

    Attributes:
        model: Class of the model.
        embed: Width of the residual stream, D.
        mlp: Hidden width of the feed-forward layers, F.
        layers: Number of blocks, L; of the encoder for an encoder-decoder.
        heads: Number of query heads, N.
        kv_heads: Number of key and value heads, K.
        head_dim: Width of one head, H.
        max_positions: Longest sequence, virtual tokens included.
        norm_eps: Epsilon of the normalization layers.
        activation: Activation of the feed-forward layers, a key of `nn.feedforward.ACTIVATIONS`.
        init_stddev: Standard deviation of random weights.
        hf: The config.json this was read from, as JSON.
        whole: The config.json of the multimodal model to which this text model belongs, as JSON; empty if there is none.
        dtype: Compute dtype.
        param_dtype: Dtype of the parameters; defaults to `dtype`.
        remat: Rematerialization in the backward pass, as in `nn.stack.scan_stack`.
    """

    model: Callable[[Any, nnx.Rngs], "Model"]
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    init_stddev: float
    hf: str
    whole: str = ""
    dtype: str = "float32"
    param_dtype: str = ""
    remat: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "param_dtype", self.param_dtype or self.dtype)

    def make(self, rngs: nnx.Rngs) -> "Model":
        """Build the model with random weights."""
        return self.model(self, rngs)

    def abstract(self) -> "Model":
        """Build the model with `jax.ShapeDtypeStruct` in place of arrays."""
        return nnx.merge(*_abstract(self), copy=True)

    def to_hf(self) -> dict[str, Any]:
        """Return the config.json of a directory that transformers can load."""
        fields = json.loads(self.hf)
        fields.pop("torch_dtype", None)
        return fields | {"dtype": self.param_dtype}

    def weights(self, rngs: nnx.Rngs, factor: float = 1.0) -> dict[str, Any]:
        """Return the arguments that layers with random weights share; `factor` multiplies their standard deviation."""
        return {"stddev": factor * self.init_stddev, "dtype": jnp.dtype(self.param_dtype), "rngs": rngs}

    def make_table(self, rows: int, rngs: nnx.Rngs) -> Embedding:
        """Build an embedding table [rows, D]."""
        dtypes = {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
        return Embedding(rows, self.embed, stddev=self.init_stddev, rngs=rngs, **dtypes)

    def make_attention(self, rngs: nnx.Rngs, kind: type[Attention] = Attention, **options: Any) -> Attention:
        """Build an attention layer, with further options of `Attention`."""
        return kind(self.embed, self.heads, self.kv_heads, self.head_dim, **self.weights(rngs), **options)

    def make_feedforward(self, rngs: nnx.Rngs, kind: type[FeedForward] = FeedForward, **options: Any) -> FeedForward:
        """Build a feed-forward layer, with further options of `FeedForward`."""
        return kind(self.embed, self.mlp, activation=ACTIVATIONS[self.activation], **self.weights(rngs), **options)


def no_mesh() -> contextlib.AbstractContextManager[None]:
    """A context without the current mesh, in which `nnx.eval_shape` would turn a quantized kernel into a plain array."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


@functools.lru_cache
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    with no_mesh():
        return nnx.split(nnx.eval_shape(lambda: config.make(nnx.Rngs(0))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(ModelConfig):
    """Adds what models with a vocabulary head share.

    Attributes:
        vocab: Vocabulary size, V.
        tied: Whether the head shares the embedding table.
        tied_if_equal: Two checkpoint tensors that decide `tied` in place of config.json: the head is tied unless both
            are stored and differ. None where config.json decides.
    """

    vocab: int
    tied: bool
    tied_if_equal: ClassVar[tuple[str, str] | None] = None

    def make_head(self, rngs: nnx.Rngs) -> Linear:
        """Build the vocabulary head [D, V]."""
        return Linear(self.embed, self.vocab, axes=("embed", "vocab"), tied=self.tied, **self.weights(rngs))


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a model was loaded from, and the options of `load_model`.

    It is part of a model's graph definition. All origins are equal, so that models from different directories share their
    compiled programs.

    Attributes:
        path: The directory or hub id.
        options: The options, by the name of their field in the section `model` of a config.
        seconds: Loading time in seconds, without the download.
        drawn: Paths of the parameters that the checkpoint lacks, such as a new head's. They were drawn from the seed.
    """

    path: str
    options: Mapping[str, Any]
    seconds: float
    drawn: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)


class Model(nnx.Module):
    """A model that reads and writes Hugging Face checkpoints.

    The `hf_*` attributes translate between our module paths and the names in Hugging Face checkpoints. In the name of a
    stacked module, `{}` stands for the layer's number in the model, from `layer_numbers`.

    Attributes:
        config: Sizes and options.
        origin: Where it was loaded from; None if it was not loaded.
        output_layers: Paths of the output layers. The target "all-linear" leaves them out, and they are not quantized.
        task_head: Paths of the task head's layers, which every method trains in full.
        chooses_attention: Whether model.attention chooses the implementation of its attention.
        mixes_adapters: Whether the rows of a batch may use different adapters; see `peftjax.rows`.
        hf_tied: {tensor: the tensor it shares}. A checkpoint may hold either of the two, or both if they are equal.
        hf_dense: Name endings of other modules that transformers does not quantize.
        hf_experts: The names of a single expert's layers in checkpoints, by the last part of the name of the parameter that
            holds all experts. An empty tuple if checkpoints contain that parameter itself.
    """

    config: ModelConfig
    origin: Origin | None = None
    __call__: Callable[..., Any]  # each kind of model has its own inputs
    output_layers: ClassVar[tuple[str, ...]] = ()
    task_head: ClassVar[tuple[str, ...]] = ()
    chooses_attention: ClassVar[bool] = False
    mixes_adapters: ClassVar[bool] = True
    hf_tied: ClassVar[Mapping[str, str]] = MappingProxyType({})
    hf_dense: ClassVar[tuple[str, ...]] = ()
    hf_experts: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    @property
    def virtual(self) -> int:
        """The number of positions that active soft prompts and prefixes take before the first token."""
        return 0

    @property
    def embedding_rows(self) -> int | None:
        """The number of rows of the embedding table of tokens; None for a model that reads no tokens."""
        return None

    def check_length(self, length: int) -> None:
        """Check that a model with a table of positions has enough of them.

        Raises:
            UserError: `length` tokens and the virtual ones before them are more than `max_positions`.
        """
        if length + self.virtual > self.config.max_positions:
            virtual = f" minus its {self.virtual} virtual tokens" if self.virtual else ""
            raise UserError(
                f"{length} tokens exceed the model's {self.config.max_positions} positions{virtual}; shorten the text"
            )

    @property
    def hf_modules(self) -> Mapping[str, str]:
        """The names of our modules in the transformers class, by path."""
        raise NotImplementedError

    @property
    def hf_renamed(self) -> Mapping[str, str]:
        """The modules whose names in checkpoint files differ from those in the transformers class, by path."""
        return MappingProxyType({})

    @property
    def partial_stacks(self) -> Mapping[str, tuple[int, ...]]:
        """The numbers of the layers that are in a stack, by its path, for stacks that do not have all layers."""
        return MappingProxyType({})

    def layer_numbers(self, path: str, depth: int) -> tuple[int, ...]:
        """Return the numbers in the model of the `depth` layers of the stack that the module at `path` is part of."""
        return self.partial_stacks.get(path.partition(".")[0], tuple(range(depth)))

    @property
    def hf_part(self) -> bool:
        """Whether this model is only a part of the transformers class; the other parts are not loaded."""
        return bool(self.config.whole)

    @property
    def hf_ignored(self) -> tuple[str, ...]:
        """Regular expressions for checkpoint tensors that this model does not use."""
        return ()

    @property
    def hf_fresh(self) -> tuple[str, ...]:
        """Top-level modules that a checkpoint may lack entirely; they are then initialized at random."""
        return ()

    @property
    def hf_task(self) -> str | None:
        """The task_type in Hugging Face PEFT's adapter_config.json; None if PEFT has none for it."""
        return None

    def hf_stored(self, name: str) -> str:
        """Return the canonical name of a checkpoint tensor for which checkpoints use several names."""
        return name


# The state after prompts: hidden states [B, T, D], the last of which predict the first new token; the key/value cache; and a
# function (token [B, 1], its index, cache) -> (hidden states, cache) that reads a new token.
PromptState = tuple[jax.Array, Any, Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]]


class LanguageModel(Model):
    """A model with a vocabulary head, which may share the embedding table.

    Attributes:
        embed: Token embedding, table [V, D].
        head: Linear layer [D, V]. A tied head has no kernel of its own.
    """

    config: LanguageModelConfig
    embed: Embedding
    head: Linear
    output_layers: ClassVar[tuple[str, ...]] = ("head",)

    @property
    def embedding_rows(self) -> int:
        return self.embed.in_features

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding table."""
        return self.head.kernel is None

    def tied_kernel(self) -> jax.Array:
        """Return the kernel [D, V] of a tied head: the transposed embedding table."""
        return self.embed.embedding.get_value().T

    def untie(self) -> None:
        """Give the head its own kernel, a copy of the embedding table."""
        self.head.kernel = nnx.data(nnx.Param(jnp.array(self.tied_kernel()), axes=self.head.axes))
        self.config = dataclasses.replace(self.config, tied=False)

    def tie(self) -> None:
        """Drop the head's own kernel; it shares the embedding table again."""
        self.head.kernel = nnx.data(None)
        self.config = dataclasses.replace(self.config, tied=True)

    def read_prompts(self, tokens: jax.Array, mask: jax.Array, new: int) -> PromptState:
        """Read prompts, int [B, W] padded on the left, with a cache that has room for `new` tokens after them."""
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply the head: [B, T, D] -> [B, T, V]."""
        if not self.tied:
            return self.head(hidden)
        if hidden.dtype != jnp.bfloat16 or self.head.adapters.active:
            return self.head(hidden, kernel=self.tied_kernel())
        # XLA's CPU backend multiplies with a transposed bfloat16 table in float32, which takes twice as long.
        gather = partial(sharding.gathered, axes=self.embed.axes)
        return matmul(hidden, self.embed.embedding.get_value(), gather, transposed=True)
