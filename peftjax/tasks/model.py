"""The section `model` of the configuration, and the base model that it describes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from peftjax.core.config import field
from peftjax.io.json_files import read_json
from peftjax.io.load import load_model
from peftjax.io.random_model import make_random
from peftjax.models.base import Model


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """Which base model is loaded, in which formats, and how it computes."""

    path: str = field("embedded", 'Hugging Face directory or hub id; "embedded" for the bundled model')
    revision: str | None = field(None, "Branch, tag or commit of a hub id; none: the default branch")
    dtype: str = field(
        "auto",
        "Compute dtype; auto: bfloat16 on TPUs and GPUs if that is the dtype in the model's config.json, otherwise float32",
        choices=("auto", "float32", "bfloat16"),
    )
    param_dtype: str = field(
        "",
        "Dtype of the base parameters; empty: model.dtype, or float32 in full fine-tuning with dtype auto",
        choices=("", "float32", "bfloat16"),
    )
    quantize: str = field(
        "",
        "Quantization format of the frozen weights (nf4_single: NF4 without double quantization); empty: not quantized",
        choices=("", "nf4", "nf4_single", "int8"),
    )
    skip_quantize: tuple[str, ...] = field((), "Names of modules that are not quantized, besides the head")
    remat: str = field(
        "none",
        "What the backward pass recomputes: only norms, activation functions and attention weights (none), everything except "
        "linear layers (dots), each block from its input (block), or the same with the input in host memory (offload)",
        choices=("none", "dots", "block", "offload"),
    )
    attention: str = field(
        "auto",
        "Implementation of causal attention in training: blockwise, splash (TPUs), cudnn and triton (NVIDIA GPUs) do not "
        "keep attention scores in memory; auto: chosen by platform and batch",
        choices=("auto", "xla", "blockwise", "splash", "cudnn", "triton"),
    )
    resize_embeddings: bool = field(
        False, "Add embedding rows, each the mean of the existing ones, for tokens of the tokenizer that have none"
    )
    new_head: bool = field(False, "Replace the checkpoint's task head with a newly initialized one")
    init: str = field(
        "pretrained",
        "Initial weights: those of the checkpoint, or random ones (only config.json and the tokenizer are read)",
        choices=("pretrained", "random"),
    )


def compute_dtype(config: ModelSection, hf_config: Mapping[str, Any], platform: str | None = None) -> str:
    """The compute dtype. "auto" is bfloat16 on accelerators if the checkpoint has that dtype, otherwise float32.

    On CPUs it is float32, because only some of them have bfloat16 instructions.

    Args:
        config: The section `model`.
        hf_config: The fields of the model's config.json.
        platform: "cpu", or another one for an accelerator; default: JAX's.
    """
    if config.dtype != "auto":
        return config.dtype
    text = hf_config.get("text_config")  # of a multimodal model
    parts = [hf_config, *([text] if isinstance(text, Mapping) else [])]
    stored = next((part[name] for part in parts for name in ("dtype", "torch_dtype") if part.get(name)), None)
    accelerated = (platform or jax.default_backend()) != "cpu"
    return "bfloat16" if accelerated and stored == "bfloat16" else "float32"


def load_base(config: ModelSection, directory: Path, mesh: Mesh, seed: int, **options: Any) -> Model:
    """The base model in a directory without adapters, sharded over the mesh.

    Args:
        config: The section `model`.
        directory: Where the model is, which need not be config.path.
        mesh: The devices.
        seed: For a new head, or random weights.
        **options: `load_model`'s options for the vocabulary and the head.
    """
    make = make_random if config.init == "random" else load_model
    return make(
        directory,
        compute_dtype(config, read_json(directory / "config.json")),
        config.quantize or None,
        param_dtype=config.param_dtype or None,
        remat=config.remat,
        skip=config.skip_quantize,
        mesh=mesh,
        seed=seed,
        **options,
    )
