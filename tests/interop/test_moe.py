"""Mixture-of-experts families compared with transformers and peft: logits in float32, files, generation, adapters."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import peftjax
from peftjax import adapters, sharding
from peftjax.core import variables
from peftjax.data.config import DataConfig
from peftjax.io.adapter_tensors import adapter_tensors
from peftjax.io.load import load_model
from peftjax.io.save import save_model
from peftjax.nn import routing
from peftjax.tasks import TaskConfig, make_task
from peftjax.training.step import Objective, accumulate, init_state, summary
from tests.interop import peers
from tests.interop.test_decoders import COMMON, WINDOW, check_like_transformers, their_logits, their_model, tokens
from tests.interop.test_llama import our_logits, spell

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings(*peers.THEIRS, "ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

MIXTRAL = COMMON | {"num_local_experts": 4}
GPT_OSS = MIXTRAL | {"intermediate_size": 64}  # whole blocks of MXFP4
QWEN = COMMON | {"num_experts": 6, "moe_intermediate_size": 12, "num_experts_per_tok": 3}

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LLAMA4 = MIXTRAL | {
    "num_hidden_layers": 4, "head_dim": 8, "intermediate_size_mlp": 24, "attention_chunk_size": WINDOW + 2,
    "no_rope_layer_interval": 2, "floor_scale": 4,
}  # fmt: skip

# The config of transformers, and fields that replace those of its config.json, for both libraries.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig(**MIXTRAL), {}),
    "mixtral-window": (transformers.MixtralConfig(**MIXTRAL, sliding_window=WINDOW, num_experts_per_tok=1), {}),
    "qwen2-moe": (transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=20), {}),
    "qwen2-moe-window": (
        transformers.Qwen2MoeConfig(
            **QWEN, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2, qkv_bias=False,
            norm_topk_prob=True, shared_expert_intermediate_size=20,
        ),
        {"layer_types": None},
    ),
    "qwen3-moe": (transformers.Qwen3MoeConfig(**QWEN, head_dim=16, norm_topk_prob=True), {}),
    "qwen3-moe-old": (  # as transformers 4 spells it
        transformers.Qwen3MoeConfig(**QWEN, head_dim=16, attention_bias=True),
        {"num_local_experts": None, "num_experts": 6, "router_aux_loss_coef": 0.01},
    ),
    "qwen2-moe-every-second": (
        transformers.Qwen2MoeConfig(
            **QWEN | {"num_hidden_layers": 5}, decoder_sparse_step=2, shared_expert_intermediate_size=20
        ),
        {},
    ),
    "qwen3-moe-some": (
        transformers.Qwen3MoeConfig(
            **QWEN | {"num_hidden_layers": 5}, head_dim=16, norm_topk_prob=True, mlp_only_layers=[0, 3], attention_bias=True
        ),
        {},
    ),
    "llama4": (transformers.Llama4TextConfig(**LLAMA4), {}),
    "llama4-dense": (
        transformers.Llama4TextConfig(
            **LLAMA4, interleave_moe_layer_step=2, num_experts_per_tok=2, attention_bias=True, use_qk_norm=False,
            attn_scale=0.5,
        ),
        {
            "moe_layers": None, "no_rope_layers": [], "layer_types": None, "rope_parameters": None,
            "rope_theta": 500.0, "rope_scaling": LLAMA3,
        },
    ),
    "gpt-oss": (
        transformers.GptOssConfig(
            **GPT_OSS, head_dim=8, num_experts_per_tok=2, sliding_window=WINDOW, swiglu_limit=1.0, swiglu_alpha=1.3
        ),
        {"rope_parameters": None, "layer_types": None, "experts_per_token": 2, "initial_context_length": 4096},
    ),
    "gpt-oss-unbiased": (
        transformers.GptOssConfig(
            **GPT_OSS, head_dim=16, attention_bias=False, tie_word_embeddings=True,
            layer_types=["full_attention"] * 3, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        ),
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each variant with random parameters, saved by transformers; made once."""
    folder = tmp_path_factory.mktemp("moe")

    def directory(name: str) -> Path:
        if not (folder / name).exists():
            config, spelled = VARIANTS[name]
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.3)
            model.save_pretrained(folder / name)
            spell(folder / name, **spelled)
        return folder / name

    return directory


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_files_and_generation_are_those_of_transformers(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    check_like_transformers(directories(name), tmp_path / "saved", 5e-5)
    stored, saved = (load_file(path / "model.safetensors") for path in (directories(name), tmp_path / "saved"))
    assert stored.keys() == saved.keys()  # a tensor for every expert, which transformers 4 can load too


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_fused_experts_load_as_those_in_tensors_of_their_own(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """One tensor for all experts of a layer, as a state dict of transformers 5 has them."""
    config = (directories(name) / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    state = {key: value.numpy() for key, value in their_model(directories(name)).state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(
        our_logits(load_model(tmp_path), tokens()), our_logits(load_model(directories(name)), tokens())
    )


def test_experts_in_mxfp4_are_decoded_exactly(directories: Callable[[str], Path], tmp_path: Path) -> None:
    """The published format of gpt-oss. NF4 is quantized from the decoded kernels."""
    stored = load_file(directories("gpt-oss") / "model.safetensors")
    rng, dense = np.random.default_rng(0), dict(stored)
    for name in [name for name in stored if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = stored[name].shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(122, 126, blocks.shape[:3], np.uint8)
        decoded = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
        dense[name] = decoded.contiguous().float().numpy()
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del stored[name]
    config = json.loads((directories("gpt-oss") / "config.json").read_text())
    for folder, tensors, fields in (
        ("packed", stored, {"quantization_config": {"quant_method": "mxfp4"}}),
        ("dense", dense, {}),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config | fields))
        save_file(tensors, tmp_path / folder / "model.safetensors", {"format": "pt"})
    expected = their_logits(their_model(tmp_path / "dense"))
    packed = load_model(tmp_path / "packed")
    assert np.abs(our_logits(packed, tokens()) - expected).max() < 5e-5 * np.abs(expected).max()
    save_model(packed, tmp_path / "saved")
    np.testing.assert_array_equal(their_logits(their_model(tmp_path / "saved")), expected)
    one, other = (load_model(tmp_path / name, quantize="nf4") for name in ("packed", "dense"))
    np.testing.assert_array_equal(our_logits(one, tokens()), our_logits(other, tokens()))


def test_the_load_balancing_loss_is_that_of_transformers() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2, 7, 5)).astype(np.float32)  # [L, B, T, E]
    mask = np.arange(7)[None] < np.array([[7], [4]])
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func
    by_layer = tuple(torch.tensor(layer.reshape(-1, 5)) for layer in logits)
    for kept in (None, mask):
        attention = None if kept is None else torch.tensor(kept.astype(np.int64))
        expected = theirs(by_layer, 5, 2, attention).item()
        ours = routing.load_balancing_loss(jnp.asarray(logits), 2, None if kept is None else jnp.asarray(kept))
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("variant", ["mixtral", "gpt-oss"])
def test_training_with_the_load_balancing_loss_is_that_of_transformers(
    variant: str, directories: Callable[[str], Path]
) -> None:
    """The sum to minimize, its parts and its gradients, of two microbatches with padding. Ours are their weighted mean."""
    path, coefficient, rng = directories(variant), 0.3, np.random.default_rng(0)
    tokens = rng.integers(1, 48, (2, 2, 12)).astype(np.int32)  # [microbatches, B, T]
    mask = np.arange(12)[None, None] < np.array([[12, 7], [9, 4]])[..., None]
    losses = mask & (np.arange(12) >= 2)  # no loss in the prompt, whose tokens the router counts
    theirs = peers.load_theirs(path)
    theirs.router_aux_loss_coef = coefficient
    totals: Any = {"loss": 0.0, "balance": 0.0, "tokens": losses[..., 1:].sum()}
    for ids, kept, counted in zip(tokens, mask, losses, strict=True):
        ids = torch.tensor(ids).long()
        labels = torch.where(torch.tensor(counted), ids, -100)
        out = theirs(ids, attention_mask=torch.tensor(kept).long(), labels=labels, output_router_logits=True)
        share = counted[:, 1:].sum() / totals["tokens"]
        (out.loss * share).backward()
        totals["loss"] += share * (out.loss - coefficient * out.aux_loss).item()
        totals["balance"] += share * coefficient * out.aux_loss.item()

    task = make_task(TaskConfig(router_aux_loss_coef=coefficient), DataConfig(max_length=12), path, loss_chunk=5)
    model = load_model(path)
    task.require(model, str(path))
    shifted = np.pad(losses[..., 1:], ((0, 0), (0, 0), (0, 1))).astype(np.float32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "loss_weights": shifted, "mask": mask}
    assert batch.keys() == task.row_shapes().keys()
    sharding.place(model, sharding.make_mesh())
    graph, trainable, frozen = variables.split_by_kind(model, nnx.Param)
    state = init_state(trainable, optax.identity(), seed=0)
    objective = Objective(graph, task.loss, balanced=True)
    gradients, sums = jax.jit(partial(accumulate, objective))(state, frozen, batch)
    measured = summary(gradients, sums)
    np.testing.assert_allclose(measured["loss"], totals["loss"], rtol=1e-5)
    np.testing.assert_allclose(measured["router_aux_loss"], totals["balance"], rtol=1e-5)
    for ours, name in (("router", "router" if variant == "gpt-oss" else "gate"), ("experts.down", "experts.down_proj")):
        found = np.asarray(gradients[f"blocks.feedforward.{ours}.kernel"])
        named = dict(theirs.named_parameters())
        suffix = "" if "experts" in name else ".weight"
        expected = np.stack([named[f"model.layers.{i}.mlp.{name}{suffix}"].grad.numpy() for i in range(len(found))])
        transposed = not ("experts" in name and variant == "gpt-oss")
        expected = expected.swapaxes(-1, -2) if transposed else expected
        np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())  # rounding depends on the CPU
    assert task.evaluate(model, {key: value[0] for key, value in batch.items()}).totals.balance is None


# --- Adapters ---


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS_OF_LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("qwen3-moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "gate-up": ("mixtral", {"target_modules": [], "target_parameters": EXPERTS[:1], "use_rslora": True}),
    "down-and-router": ("qwen2-moe", {"target_modules": [], "target_parameters": ["down_proj", "gate.weight"]}),
    "some-layers": (
        "mixtral",
        {"target_modules": r".*\.[qv]_proj", "target_parameters": [f"model.layers.1.{name}" for name in EXPERTS]},
    ),
    "gpt-oss": (
        "gpt-oss",
        {"target_modules": ["q_proj", "o_proj"], "target_parameters": [*EXPERTS, "router.weight"]},
    ),
    "layers-of-modules": (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "layers_to_transform": [1]},
    ),
    "excluded-modules": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "exclude_modules": r".*layers\.0.*"},
    ),
    "dense-layers": ("qwen3-moe-some", {"target_modules": ["o_proj", "mlp.down_proj"], "target_parameters": EXPERTS}),
    "names-of-transformers-4-dense": (
        "qwen3-moe-some",
        {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "every-second-layer-dense": (
        "qwen2-moe-every-second",
        {"target_modules": ["q_proj", "mlp.up_proj", "mlp.down_proj"], "rank_pattern": {"4.mlp.up_proj": 5}},
    ),
    "llama4": (
        "llama4",
        {"target_modules": ["q_proj", "shared_expert.up_proj"], "target_parameters": EXPERTS_OF_LLAMA4},
    ),
    "llama4-dense": ("llama4-dense", {"target_modules": ["o_proj", "feed_forward.up_proj"]}),
    "modules-named-as-experts": ("gpt-oss", {"target_modules": ["q_proj", "down_proj"]}),
    "modules-named-as-some-experts": (
        "llama4-dense",
        {"target_modules": r".*\.(q|down)_proj", "target_parameters": ["1.feed_forward.experts.down_proj"]},
    ),
    "names-of-transformers-4": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_go_to_peft_and_back(name: str, directories: Callable[[str], Path], tmp_path: Path) -> None:
    variant, options = ADAPTERS[name]
    theirs = peers.adapted(directories(variant), peft.LoraConfig(r=3, lora_alpha=6, **options))
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peers.logits(theirs)

    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))

    peftjax.save_adapter(ours, tmp_path / "ours")
    again = peers.load_into_theirs(directories(variant), tmp_path / "ours").eval()
    np.testing.assert_array_equal(peers.logits(again), expected)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        (
            "qwen2-moe",
            peft.IA3Config(target_modules=["k_proj", "gate_proj", "down_proj"], feedforward_modules=["down_proj"]),
        ),
        ("qwen2-moe", peft.LoHaConfig(r=2, target_modules=["q_proj", "down_proj"])),
        ("llama4", peft.VeraConfig(r=4, target_modules=r".*\.(v|up|down)_proj")),
    ],
    ids=["ia3", "loha", "vera"],
)
def test_targets_of_peft_are_no_experts_that_are_parameters(
    variant: str, config: peft.PeftConfig, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """With transformers 5, only the shared expert has modules of these names."""
    theirs = peers.adapted(directories(variant), config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), peers.logits(theirs))
    peftjax.save_adapter(ours, tmp_path / "ours")
    again = peers.load_into_theirs(directories(variant), tmp_path / "ours").eval()
    np.testing.assert_array_equal(peers.logits(again), peers.logits(theirs))


@pytest.mark.parametrize("method", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_in_the_chunks_of_llama4_as_in_peft(
    method: Any, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    theirs = peers.adapted(directories("llama4"), method(num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path)
    ours = peftjax.load_adapter(load_model(directories("llama4")), tmp_path)
    peers.assert_close(peers.logits(ours), peers.logits(theirs))


def test_all_linear_with_experts_goes_to_peft_and_merges(directories: Callable[[str], Path], tmp_path: Path) -> None:
    model = peers.attached(directories("qwen3-moe"), peftjax.Lora(rank=3, dropout=0.1))
    expected = peers.logits(model)
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = peers.load_into_theirs(directories("qwen3-moe"), tmp_path / "adapter").eval()
    peers.assert_close(peers.logits(theirs), expected)
    assert not any("mlp.gate" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    save_model(peftjax.merge(model), tmp_path / "merged")
    peers.assert_close(peers.logits(their_model(tmp_path / "merged")), expected)


class SingleExpert(torch.nn.Module):
    """An expert whose layers are modules."""

    def __init__(self, names: tuple[str, str, str], gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.names = names
        for name, weight in zip(names, (*gate_up.chunk(2), down), strict=True):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight.data = weight.clone()
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(torch.nn.functional.silu(gate(x)) * up(x))


class SingleExperts(torch.nn.ModuleList):
    """The experts of a layer, as in transformers 4."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        by_expert = torch.zeros(len(x), len(self), dtype=x.dtype).scatter(1, chosen, weights)
        return sum(by_expert[:, i, None] * expert(x) for i, expert in enumerate(self))


SINGLE = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2-moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3-moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def with_single_experts(path: Path, variant: str) -> Any:
    """Their model with the module names of transformers 4, and a model_type for which peft converts nothing."""
    model = peers.load_theirs(path)
    block, *names = SINGLE[variant]
    for layer in model.model.layers:
        moe = layer._modules.pop("mlp")
        moe.experts = SingleExperts(
            SingleExpert(tuple(names), *weights)
            for weights in zip(moe.experts.gate_up_proj.data, moe.experts.down_proj.data, strict=True)
        )
        object.__setattr__(layer, "mlp", moe)  # what forward calls
        layer._modules[block] = moe
    model.config.model_type = "transformers-4"
    return model


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        ("mixtral", "all"), ("mixtral", "some"), ("mixtral", "dora"), ("qwen2-moe", "all"), ("qwen3-moe", "all"),
        ("qwen3-moe", "some"), ("qwen3-moe", "some-dora"),
    ],
)  # fmt: skip
def test_adapters_of_single_experts_go_to_peft_and_back(
    variant: str, kind: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of every expert alike, or with other ranks and alphas for some, and none for others. Qwen2 has a shared expert too."""
    block, gate, up, down = SINGLE[variant]
    options: dict[str, Any] = {"target_modules": ["q_proj", gate, up, down], "use_dora": "dora" in kind}
    if "some" in kind:
        options |= {
            "target_modules": rf".*(\.q_proj|\.[02]\.{block}\.experts\.[13]\.({gate}|{down})|experts\.[13]\.{up})",
            "rank_pattern": {f"experts.3.{gate}": 4, rf"layers\.2.*\.{up}": 2, "q_proj": 5},
            "alpha_pattern": {f"experts.1.{up}": 2.0, down: 1.5},
            "use_rslora": True,
        }
    base = with_single_experts(directories(variant), variant)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **options)).eval()
    peers.shake({name: p for name, p in theirs.named_parameters() if p.requires_grad}, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peers.logits(theirs)

    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))

    peftjax.save_adapter(ours, tmp_path / "ours", single_experts=True)
    again = peers.load_into(with_single_experts(directories(variant), variant), tmp_path / "ours").eval()
    peers.assert_close(peers.logits(again), expected)
    given, written = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert {key: value.shape for key, value in given.items()} == {key: value.shape for key, value in written.items()}
    if "some" in kind:
        assert_padding_has_no_gradient(ours)
    else:  # in the same scale
        assert all((given[key] == written[key]).all() for key in given)
    peers.assert_close(peers.logits(peftjax.merge(ours)), expected)
    if kind == "all" and variant != "qwen2-moe":  # whose shared expert peft confuses with the others
        converted = peft.PeftModel.from_pretrained(peers.load_theirs(directories(variant)), tmp_path / "ours").eval()
        peers.assert_close(peers.logits(converted), expected)


def assert_padding_has_no_gradient(model: Any) -> None:
    graph, adapter, rest = nnx.split(model, variables.PeftParam, ...)
    loss = lambda adapter: jnp.square(nnx.merge(graph, adapter, rest)(jnp.asarray(peers.tokens()))).mean()  # noqa: E731
    a, b = (
        adapter["blocks"]["feedforward"]["experts"]["down"]["adapters"]["default"][leaf].get_value() for leaf in "ab"
    )
    gradient = jax.jit(jax.grad(loss))(adapter)["blocks"]["feedforward"]["experts"]["down"]["adapters"]["default"]
    padding = np.asarray((a == 0).all(-2) & (b == 0).all(-1))  # [L, E, R]
    assert 0 < padding.mean() < 1
    of_a, of_b = (np.abs(np.asarray(gradient[leaf].get_value())).max(axis) for leaf, axis in (("a", -2), ("b", -1)))
    assert not (of_a + of_b)[padding].any()
    assert (of_a + of_b)[~padding].all()
    if "magnitude" in gradient:
        of_magnitude = np.asarray(gradient["magnitude"].get_value())  # [L, E, out]
        assert ((of_magnitude != 0).any(-1) == ~padding.all(-1)).all()


def test_gradients_of_a_dora_on_single_experts_are_those_of_peft(
    directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """In peft the LoRAs of gate and up are separate, so that only the diagonal blocks of B have gradients there."""
    block, gate, up, down = SINGLE["qwen3-moe"]
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", use_dora=True, target_modules=[gate, up, down])
    theirs = peft.get_peft_model(with_single_experts(directories("qwen3-moe"), "qwen3-moe"), config)
    peers.shake({name: p for name, p in theirs.named_parameters() if p.requires_grad}, 0.1)
    theirs.save_pretrained(tmp_path)
    theirs(torch.tensor(peers.tokens())).logits.square().mean().backward()
    found = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    largest = max(np.abs(gradient).max() for gradient in found.values())

    model = peftjax.load_adapter(load_model(directories("qwen3-moe")), tmp_path)
    graph, adapter, rest = nnx.split(model, variables.PeftParam, ...)
    loss = lambda adapter: jnp.square(nnx.merge(graph, adapter, rest)(jnp.asarray(peers.tokens()))).mean()  # noqa: E731
    gradients = jax.jit(jax.grad(loss))(adapter)["blocks"]["feedforward"]["experts"]
    for part, (whole, first_rank, first_column) in {
        gate: ("gate_up", 0, 0), up: ("gate_up", 3, 12), down: ("down", 0, 0)
    }.items():  # fmt: skip
        own = {leaf: np.asarray(value.get_value()) for leaf, value in gradients[whole]["adapters"]["default"].items()}
        ranks = slice(first_rank, first_rank + 3)
        for layer, expert in np.ndindex(3, 6):
            module = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{part}"
            expected = [
                found[f"{module}.{name}"]
                for name in ("lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight")
            ]
            columns = slice(first_column, first_column + len(expected[2]))
            ours = (
                own["a"][layer, expert, :, ranks].T,
                own["b"][layer, expert, ranks, columns].T,
                own["magnitude"][layer, expert, columns],
            )
            for one, other in zip(ours, expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-7 * largest)


VECTORS: dict[str, tuple[str, Any]] = {
    "ia3": (
        "qwen2-moe",
        lambda block, gate, up, down: peft.IA3Config(
            target_modules=["k_proj", gate, up, down], feedforward_modules=[down]
        ),
    ),
    "ia3-some": (
        "mixtral",
        lambda block, gate, up, down: peft.IA3Config(
            target_modules=rf".*(\.v_proj|\.[02]\.{block}\.experts\.[13]\.({gate}|{down})|experts\.[12]\.({up}|{down}))",
            feedforward_modules=rf".*\.1\.{block}\.experts\.1\.{down}|.*experts\.3\.{down}",
        ),
    ),
    "vera": (
        "mixtral",
        lambda block, gate, up, down: peft.VeraConfig(r=5, target_modules=["v_proj", gate, up, down]),
    ),
    "vera-some": (
        "qwen3-moe",
        lambda block, gate, up, down: peft.VeraConfig(
            r=5, target_modules=[f"experts.1.{gate}", f"layers.2.{block}.experts.0.{up}", f"experts.3.{down}"]
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_single_experts_go_to_peft_and_back(
    name: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """(IA)3 and VeRA, whose files never have adapters of all experts. The gradients of one step match peft, too."""
    variant, make = VECTORS[name]
    config = make(*SINGLE[variant])
    config.task_type = "CAUSAL_LM"
    theirs = peft.get_peft_model(with_single_experts(directories(variant), variant), config).eval()
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    peers.shake(trained, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = peers.logits(theirs)

    ours = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "theirs")
    peers.assert_close(peers.logits(ours), expected)
    peers.assert_far(expected, peers.logits(peers.load_theirs(directories(variant))))
    assert adapters.count_trainable(ours) == sum(parameter.numel() for parameter in trained.values())

    peftjax.save_adapter(ours, tmp_path / "ours", single_experts=True)
    again = peers.load_into(with_single_experts(directories(variant), variant), tmp_path / "ours").eval()
    np.testing.assert_array_equal(peers.logits(again), expected)
    given, written = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "ours"))
    assert given.keys() == written.keys()
    assert all((given[key] == written[key]).all() for key in given)
    if name == "ia3":  # targets that peft knows are kept
        fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
        assert set(fields["target_modules"]) == config.target_modules
        assert set(fields["feedforward_modules"]) == config.feedforward_modules

    theirs(torch.tensor(peers.tokens())).logits.square().mean().backward()
    graph, adapter, rest = nnx.split(ours, variables.PeftParam, ...)
    loss = lambda adapter: jnp.square(nnx.merge(graph, adapter, rest)(jnp.asarray(peers.tokens()))).mean()  # noqa: E731
    gradients = nnx.merge(graph, jax.jit(jax.grad(loss))(adapter), rest)
    found = adapter_tensors(gradients, read=np.asarray)
    key = lambda name: name.replace(".default", "").replace("block_sparse_moe", "mlp")  # noqa: E731
    wanted = {key(name): parameter.grad.numpy() for name, parameter in trained.items()}
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=2e-5 * largest, err_msg=name)
    everything = sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(nnx.state(gradients, variables.PeftParam)))
    np.testing.assert_allclose(sum(np.abs(found[name]).sum() for name in wanted), everything, rtol=1e-5)
    peers.assert_close(peers.logits(peftjax.merge(ours)), expected)


@pytest.mark.parametrize("variant", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_a_trained_adapter_of_all_experts_is_written_for_single_ones(
    variant: str, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gate and up both get the whole A. Routers, and the shared expert of Qwen2, are there too."""
    method = peftjax.Lora(
        rank=3, alpha=5, dropout=0.1, targets=("v_proj", "mlp.gate", "experts.gate_up_proj", "experts.down_proj"),
        rank_pattern={"1.mlp.experts.gate_up_proj": 2, "v_proj": 1}, alpha_pattern={"experts.down_proj": 2.0},
    )  # fmt: skip
    model = peers.attached(directories(variant), method)
    expected = peers.logits(model)
    peftjax.save_adapter(model, tmp_path / "single", single_experts=True)
    config = json.loads((tmp_path / "single" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.1
    assert "target_parameters" not in config
    back = peftjax.load_adapter(load_model(directories(variant)), tmp_path / "single")
    peers.assert_close(peers.logits(back), expected)
    lora = lambda model: model.blocks.feedforward.experts.gate_up.adapters.default  # noqa: E731
    assert lora(back).ranks == lora(model).ranks == (3, 2, 3)  # gate and up have one A
    np.testing.assert_array_equal(lora(back).b.get_value()[0], lora(model).b.get_value()[0])


RANKS = {
    r"experts\.1\.(gate|up)_proj": 5,
    "layers.2.mlp.experts.0.down_proj": 1,
    "experts.gate_up_proj": 4,
    "q_proj": 2,
}
ALPHAS = {r"experts\.[23]\..*_proj": 2.5, "layers.0.mlp.experts.down_proj": 3.0}


@pytest.mark.parametrize("options", [{"rslora": True}, {"dora": True, "init": "gaussian"}], ids=["rslora", "dora"])
@pytest.mark.parametrize("trained", [True, False])
def test_ranks_and_alphas_of_single_experts_go_to_peft_and_back(
    options: dict[str, Any], trained: bool, directories: Callable[[str], Path], tmp_path: Path
) -> None:
    method = peftjax.Lora(
        rank=3, alpha=6.0, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"), rank_pattern=RANKS,
        alpha_pattern=ALPHAS, **options,
    )  # fmt: skip
    if trained:
        model = peers.attached(directories("qwen3-moe"), method)
    else:
        model = peftjax.attach(load_model(directories("qwen3-moe")), method, rngs=nnx.Rngs(0))
    expected = peers.logits(model)
    peftjax.save_adapter(model, tmp_path / "ours")

    theirs = peers.load_into(with_single_experts(directories("qwen3-moe"), "qwen3-moe"), tmp_path / "ours").eval()
    peers.assert_close(peers.logits(theirs), expected)
    modules = dict(theirs.base_model.model.model.layers.named_modules())
    scale = lambda alpha, rank: alpha / (rank**0.5 if "rslora" in options else rank)  # noqa: E731
    for name, rank, alpha in (
        ("0.mlp.experts.1.gate_proj", 5, 6), ("2.mlp.experts.1.up_proj", 5, 6), ("1.mlp.experts.2.up_proj", 4, 2.5),
        ("2.mlp.experts.0.down_proj", 1, 6), ("1.mlp.experts.0.down_proj", 3, 6), ("0.mlp.experts.3.down_proj", 3, 2.5),
        ("0.mlp.experts.0.down_proj", 3, 3), ("1.self_attn.q_proj", 2, 6),
    ):  # fmt: skip
        assert modules[name].r["default"] == rank, name
        assert modules[name].scaling["default"] == pytest.approx(scale(alpha, rank)), name
        assert modules[name].lora_A["default"].weight.any(dim=1).all(), name  # nothing is padding

    back = peftjax.load_adapter(load_model(directories("qwen3-moe")), tmp_path / "ours")
    peers.assert_close(peers.logits(back), expected)
    peers.assert_close(peers.logits(peftjax.merge(model)), expected)
