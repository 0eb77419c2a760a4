"""Adapters of PEFT that are LoRAs in another form, as LoRAs with the same outputs; |.| are norms, s is LoRA's scale.

GraLoRA  x W + s [x_1 .. x_N] A B, where each pair of the N blocks of inputs and outputs has an A and a B of rank r / N: a LoRA of
         rank N r, mostly zeros, beside a plain one of rank hybrid_r (Jung et al. 2025, arXiv:2505.20355)
DeLoRA   x W + x diag(|W_i|) A diag(lambda / (r |A_j| |B_j|)) B. The file holds the norms |W_i| of the inputs' weights (Bini et al.
         2025, arXiv:2503.18225)
KaSA     x (W - W_r) + s x A diag(d) B, where W_r has the r smallest singular values of W: a LoRA of rank 2r. W_r is recomputed
         from the base (Wang et al. 2024, arXiv:2412.06071)
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from peftjax.adapters.method import Method
from peftjax.adapters.provenance import formats
from peftjax.adapters.sites import Site
from peftjax.core.errors import UserError
from peftjax.io.adapter_copies import base_value
from peftjax.io.adapter_keys import bare_key
from peftjax.io.adapter_tensors import CONFIG
from peftjax.methods.lora.lora import Lora

CONVERTED = ("DELORA", "GRALORA")  # besides KaSA, which is an option of LORA
# The fields that these types share with LORA, and their own with the values that peft assumes where they are missing.
SHARED = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "r",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out",
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "GRALORA": {"alpha": 64, "gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0, "init_weights": True},
    "DELORA": {
        "delora_lambda": 15, "lambda_pattern": {}, "module_dropout": 0.0, "rank_pattern": {}, "init_weights": True,
    },
}  # fmt: skip
INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # of init_lora_weights: those that do not change the base


def lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of adapter_config.json for a plain LoRA; unchanged if the adapter is none of the above.

    Raises:
        UserError: A field is not one of peft's, or has a value of another type.
    """
    kind = config.get("peft_type")
    if kind == "LORA" and _is_kasa(config):
        return _of_kasa(config)
    if kind not in CONVERTED:
        return dict(config)
    own = OWN[kind]
    for key, value in config.items():
        if key not in own and key not in SHARED and value not in (None, False, "", [], {}):
            raise UserError(f"{CONFIG}: {key}={value!r} is not supported for {kind}")
    values = own | {key: value for key, value in config.items() if key in own and value is not None}
    shared = {key: value for key, value in config.items() if key in SHARED}
    if isinstance(bias := shared.get("bias"), str) and bias.endswith("_only"):
        shared["bias"] = "lora_only"
    shared["peft_type"] = "LORA"
    if kind == "DELORA":
        rank = _integer("r", config.get("r", 8))
        table, dropout = values["rank_pattern"], values["module_dropout"]
        return shared | {
            "r": rank, "lora_alpha": rank, "rank_pattern": table, "alpha_pattern": table, "lora_dropout": dropout,
        }  # fmt: skip
    given, hybrid = _integer("r", config.get("r", 32)), _integer("hybrid_r", values["hybrid_r"])
    rank = given * _integer("gralora_k", values["gralora_k"]) + hybrid
    alpha = _number("alpha", values["alpha"]) * rank / max(given + hybrid, 1)
    return shared | {"r": rank, "lora_alpha": alpha, "lora_dropout": values["gralora_dropout"]}


def lora_tensors(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], path: Path) -> Mapping[str, np.ndarray]:
    """Convert the tensors of a GraLoRA or DeLoRA to a LoRA with `lora_config(config)`; other adapters are unchanged.

    Raises:
        UserError: The tensors do not fit the config.
    """
    kind = config.get("peft_type")
    if kind not in CONVERTED:
        return tensors
    name, convert = {"GRALORA": ("gralora", _gralora), "DELORA": ("delora", _delora)}[kind]
    rank = lora_config(config)["r"]
    warnings.warn(
        f"{path / CONFIG}: peft_type {kind!r} is read as a LoRA with the same outputs{f', of rank {rank}' * (kind == 'GRALORA')}; "
        "save_adapter writes a LoRA",
        stacklevel=4,
    )
    found = {key: tensor for key, tensor in tensors.items() if f".{name}_" not in key}
    for key in tensors:
        module = key.removesuffix(f".{name}_A")
        if module == key:
            continue
        own = {
            other.removeprefix(f"{module}.{name}_"): tensor.astype(np.float32)
            for other, tensor in tensors.items()
            if other.startswith(f"{module}.{name}_")
        }
        try:
            found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = convert(own, config)
        except (KeyError, ValueError) as error:
            shapes = {end: tensor.shape for end, tensor in own.items()}
            raise UserError(f"{path}: the tensors of {module}, {shapes}, do not match {kind}") from error
    return found


def with_truncated_base(
    method: Method, model: nnx.Module, tensors: dict[str, np.ndarray], config: Mapping[str, Any], path: Path
) -> dict[str, np.ndarray]:
    """Convert the tensors of a KaSA to a LoRA with `lora_config(config)`; other adapters are unchanged.

    If the base is sharded across processes, every process must call this function: they gather its kernels together.

    Raises:
        UserError: A tensor is missing, or the base that the adapter was trained on cannot be recomputed from this one.
    """
    if config.get("peft_type") != "LORA" or not _is_kasa(config):
        return tensors
    assert isinstance(method, Lora)
    warnings.warn(
        f"{path / CONFIG}: kasa_config removes the smallest singular values of the base's kernels, which is recomputed in float32 "
        "from this model's, as in peft; save_adapter writes a plain LoRA of twice the rank",
        stacklevel=4,
    )
    if kinds := set(formats(model).values()):
        raise UserError(
            f"{path / CONFIG}: kasa_config changes the kernels of the base, and the change cannot be recomputed from "
            f"{', '.join(sorted(kinds))} kernels; load the base without quantize=, call load_adapter and save_adapter, and load "
            "that plain LoRA on the quantized base"
        )
    keys, made = {bare_key(key): key for key in tensors}, dict(tensors)
    for site, hf, number, scale in _layers(method, model):
        try:
            a, b, diag = (keys[bare_key(f"{hf}.{end}")] for end in ("lora_A.weight", "lora_B.weight", "lora_diag"))
        except KeyError as error:
            raise UserError(f"{path}: kasa_config needs {error.args[0]}, which is missing") from None
        if "kernel" not in site.parameters:
            raise UserError(
                f"{path / CONFIG}: kasa_config is not supported for {hf}, whose kernel is tied to the embedding: peft changes both"
            )
        if isinstance(site.parameters["kernel"].get_value(), jax.ShapeDtypeStruct):
            return tensors
        kernel = base_value(model, site, "kernel", number)
        assert kernel is not None
        kernel, rank = kernel.astype(np.float32), tensors[diag].size
        if rank >= min(kernel.shape) or not scale:
            raise UserError(
                f"{path / CONFIG}: kasa_config with rank {rank} and scale {scale:g} is not supported for {hf}, whose kernel is "
                f"{kernel.shape}: the rank must be smaller than its sides, and the scale must not be 0"
            )
        u, values, vt = np.linalg.svd(kernel, full_matrices=False)  # [out, k], [k], [k, in]
        dropped = u[:, -rank:] * values[-rank:]
        made[a] = np.concatenate([tensors[a].astype(np.float32), vt[-rank:]])
        scaled = tensors[b].astype(np.float32) * tensors[diag].astype(np.float32)
        made[b] = np.concatenate([scaled, -dropped / scale], axis=1)
        del made[diag]
        copy = keys.get(bare_key(f"{hf}.base_layer.weight"))  # peft writes one of the head
        if copy is not None and np.allclose(tensors[copy], kernel - dropped @ vt[-rank:], atol=1e-3 * values[0]):
            del made[copy]
    return made


def _layers(method: Lora, model: nnx.Module) -> list[tuple[Site, str, int | None, float]]:
    """The adapted layers: their site, name, index in the stack and scale."""
    found = []
    for site, mask in method.chosen(model):
        ranks = method.ranks(site, mask)
        scales = method.alphas(site) / np.maximum(np.sqrt(ranks) if method.rslora else ranks, 1)
        layers = zip(site.names, site.layers, mask, scales, strict=True)
        found += [(site, hf, layer, float(scale)) for hf, layer, used, scale in layers if used]
    return found


def _is_kasa(config: Mapping[str, Any]) -> bool:
    """Whether a LORA is a KaSA that can be read. In peft it excludes the other variants; `Lora` then rejects kasa_config."""
    others = ("use_dora", "use_bdlora", "velora_config", "monteclora_config", "arrow_config", "alora_invocation_tokens")
    plain = config.get("init_lora_weights") in INITS and not any(config.get(other) for other in others)
    return config.get("kasa_config") not in (None, False) and plain


def _of_kasa(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LoRA of twice the rank and the same scale."""
    times = math.sqrt(2) if config.get("use_rslora") else 2
    new = dict(config) | {"kasa_config": None, "r": 2 * _integer("r", config.get("r", 8))}
    new["lora_alpha"] = times * _number("lora_alpha", config.get("lora_alpha", 8))
    if ranks := config.get("rank_pattern"):
        new["rank_pattern"] = {key: 2 * _integer("rank_pattern", rank) for key, rank in ranks.items()}
    if alphas := config.get("alpha_pattern"):
        new["alpha_pattern"] = {key: times * _number("alpha_pattern", alpha) for key, alpha in alphas.items()}
    return new


def _gralora(own: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A [R, in] and B [out, R] of a LoRA, from A [N, in/N, r] and B [N, r, out/N]."""
    a, b = own["A"], own["B"]
    blocks, inputs, rank = a.shape
    split = a.reshape(blocks, inputs, blocks, rank // blocks)  # block of inputs, input, block of outputs, rank
    one = np.eye(blocks, dtype=np.float32)
    whole_a = np.einsum("nijs,nm->nijms", split, one).reshape(blocks * inputs, blocks * rank)
    whole_b = np.einsum("jro,jm->jrmo", b, one).reshape(blocks * rank, -1)
    plain_a, plain_b = own.get("A_general.weight"), own.get("B_general.weight")
    if plain_a is None or plain_b is None:
        return whole_a.T, whole_b.T
    return np.concatenate([whole_a.T, plain_a]), np.concatenate([whole_b.T, plain_b], axis=1)


def _delora(own: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of a LoRA of scale 1."""
    a, b = own["A"], own["B"]
    norms = (np.maximum(np.linalg.norm(factor, axis=axis), 1e-4) for factor, axis in ((a, 1), (b, 0)))
    return a * own["w_norm"], b * (own["lambda"] / len(a) / math.prod(norms))


def _integer(field: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{CONFIG}: {field} must be a number of ranks or blocks, got {value!r}")
    return value


def _number(field: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{CONFIG}: {field} must be a number, got {value!r}")
    return value
