"""LoRA beside Hugging Face PEFT: files both ways, merged models, and five steps of training."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import optim, sharding
from peftjax.core import variables
from peftjax.core.config import defaults
from peftjax.losses import next_token_loss
from peftjax.methods import count_trainable
from peftjax.step import first_state, make_train_step

# What these libraries warn of among themselves; ours stay errors.
theirs = ("ignore::FutureWarning", "ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*theirs)]

BASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
}
REGEX = r".*\.[01]\.self_attn\.(q|v)_proj"


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of LoRA in our words. merges: peft's own merged model computes what its adapter does."""

    ours: dict[str, Any]
    base: str = "untied"
    merges: bool = True

    @property
    def theirs(self) -> dict[str, Any]:
        """The same options in peft's words."""
        names = {
            "rank": "r",
            "alpha": "lora_alpha",
            "targets": "target_modules",
            "exclude": "exclude_modules",
            "rslora": "use_rslora",
        }
        return {
            names.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in self.ours.items()
        }


def lora(base: str = "untied", merges: bool = True, **options: Any) -> Variant:
    return Variant({"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj")} | options, base, merges)


VARIANTS = {
    "names": lora(),
    "regex": lora(targets=REGEX),
    "all-linear": lora(targets="all-linear"),
    "all-linear-tied": lora("tied", targets="all-linear"),
    "exclude-names": lora(targets="all-linear", exclude=("down_proj", "layers.1.mlp.up_proj")),
    "exclude-regex": lora(targets="all-linear", exclude=r".*\.(0|2)\..*proj"),
    "rank-pattern": lora(rank_pattern={"layers.0.self_attn.q_proj": 2, r"layers\.[12]\.self_attn\.v_proj": 7}),
    "alpha-pattern": lora(alpha_pattern={"layers.0.self_attn.q_proj": 16, r".*\.[12]\.self_attn\.v_proj": 1}),
    "layers": lora(layers_to_transform=(0, 2), targets=("q_proj", "down_proj")),
    "rslora": lora(rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3}),
    "bias-none": lora("biased", targets="all-linear"),
    "bias-all": lora("biased", bias="all"),
    "bias-all-some-layers": lora("biased", bias="all", layers_to_transform=(1,)),
    "bias-lora-only": lora("biased", bias="lora_only", targets="all-linear"),
    "bias-lora-only-some-layers": lora("biased", bias="lora_only", layers_to_transform=(0, 2)),
    "save-lm-head": lora(modules_to_save=("lm_head",)),
    "save-lm-head-tied": lora("tied", modules_to_save=("lm_head",)),
    "save-embedding": lora(modules_to_save=("embed_tokens",)),
    "save-embedding-tied": lora("tied", modules_to_save=("embed_tokens",)),
    "save-one-layer": lora(modules_to_save=("layers.1.mlp.up_proj",)),
    "save-with-bias": lora("biased", modules_to_save=("k_proj",), bias="lora_only"),
    "save-norms": lora(modules_to_save=("norm",)),
    "save-a-target": lora(targets=("q_proj", "lm_head"), modules_to_save=("lm_head",)),
    "embedding": lora(targets=("q_proj", "embed_tokens")),
    "embedding-regex": lora(targets=r".*(embed_tokens|q_proj)", rslora=True),
    "embedding-tied": lora("tied", targets=("q_proj", "embed_tokens"), merges=False),
    "head": lora(targets=("q_proj", "lm_head")),
    "head-tied": lora("tied", targets=("q_proj", "lm_head"), merges=False),
    "both-ends": lora(targets=("embed_tokens", "lm_head", "q_proj"), rank_pattern={"lm_head": 2}),
    "both-ends-tied": lora("tied", targets=("embed_tokens", "lm_head"), merges=False),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Variant:
    return VARIANTS[request.param]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random Llamas of three layers with grouped queries, made once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            save_base(folder / name, **BASES[name])
        return folder / name

    return base


def save_base(path: Path, **fields: Any) -> None:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | fields))
    shake(dict(model.named_parameters()), 0.1)  # the biases and the norms' scales too
    model.save_pretrained(path)


def shake(parameters: dict[str, torch.nn.Parameter], scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def load_theirs(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def adapted(base: Path, fields: dict[str, Any]) -> Any:
    """Their model with their LoRA, as if it had been trained: whatever would be trained has moved."""
    model = peft.get_peft_model(load_theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    shake({name: p for name, p in model.named_parameters() if p.requires_grad}, 0.1)
    return model


def attached(base: Path, method: peftjax.Lora) -> Any:
    """Our model with our LoRA, as if it had been trained."""
    model = peftjax.attach(peftjax.load_model(base), method, rngs=nnx.Rngs(0))
    leaves = variables.flat(model)[1]
    rng = np.random.default_rng(0)
    moved = {
        path: leaf.get_value() + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in leaves.items()
        if type(leaf) is variables.PeftParam
    }
    variables.update(model, moved)
    return model


def load_into_theirs(base: Path, adapter: Path, **options: Any) -> Any:
    """The adapter in peft. It must find every key that it wants, and use every key and every bit that is in the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(load_theirs(base), adapter, **options)
    assert not [str(warning.message) for warning in caught if "missing" in str(warning.message)]
    used = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(adapter / "adapter_model.safetensors")
    assert used.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_array_equal(used[key].numpy(), value, err_msg=key)
    return model


def tokens(vocab: int = 48) -> np.ndarray:
    return np.random.default_rng(3).integers(0, vocab, (2, 12))


def logits(model: Any, vocab: int = 48) -> np.ndarray:
    if isinstance(model, nnx.Module):
        return np.asarray(model(jnp.asarray(tokens(vocab))))
    with torch.no_grad():
        return model(torch.tensor(tokens(vocab))).logits.float().numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = np.abs(theirs).max()
    difference = np.abs(ours - theirs).max() / scale
    assert difference <= tolerance, difference


def assert_far(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one - other).max() > 0.01 * np.abs(other).max()


# --- Files ---


def test_an_adapter_of_peft_gives_equal_logits_here(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases(variant.base), variant.theirs)
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_model(bases(variant.base))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)
    assert count_trainable(model) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    np.testing.assert_array_equal(logits(peftjax.use(model, None)), before)


def test_an_adapter_of_ours_gives_equal_logits_in_peft(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(variant.base), peftjax.Lora(**variant.ours))
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load_into_theirs(bases(variant.base), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(peftjax.use(model, None)))


def test_a_merged_model_gives_equal_logits_in_transformers(variant: Variant, bases: Callable, tmp_path: Path) -> None:
    model = attached(bases(variant.base), peftjax.Lora(**variant.ours))
    expected = logits(model)
    peftjax.save_adapter(model, tmp_path / "adapter")
    peftjax.save_model(peftjax.merge(model), tmp_path / "merged")
    merged = logits(load_theirs(tmp_path / "merged"))
    assert_close(merged, expected)
    if variant.merges:
        assert_close(merged, logits(load_into_theirs(bases(variant.base), tmp_path / "adapter").merge_and_unload()))


def test_of_two_patterns_the_first_counts_in_peft_too(bases: Callable, tmp_path: Path) -> None:
    patterns = {"v_proj": 2, "layers.1.self_attn.v_proj": 3}  # peft's own save would sort them, the second first
    model = attached(bases("untied"), peftjax.Lora(rank=4, targets=("v_proj",), rank_pattern=patterns))
    peftjax.save_adapter(model, tmp_path / "adapter")
    theirs = load_into_theirs(bases("untied"), tmp_path / "adapter")
    assert_close(logits(model), logits(theirs))


def test_a_bfloat16_adapter_of_peft_is_read(bases: Callable, tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "embed_tokens"])
    base = load_theirs(bases("untied"), dtype=torch.bfloat16)
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    shake({name: p for name, p in theirs.named_parameters() if p.requires_grad}, 0.1)
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)
    same = peft.PeftModel.from_pretrained(load_theirs(bases("untied")), tmp_path)
    stored = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    # loading it, peft puts the file's bfloat16 copy of the embedding in place of the base's own
    same.get_base_model().get_input_embeddings().base_layer.weight.data = (
        load_theirs(bases("untied")).get_input_embeddings().weight.data
    )
    assert_close(logits(model), logits(same))


@pytest.mark.parametrize("name", ["tinystories656k", "stories260k", "babyllama105"])
def test_real_checkpoints_with_a_random_lora_give_equal_logits_both_ways(
    assets: Path, name: str, tmp_path: Path
) -> None:
    base, vocab = assets / name, 100
    theirs = adapted(base, VARIANTS["all-linear"].theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(base)
    before = logits(model, vocab)
    peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model, vocab), logits(theirs, vocab))
    assert_far(logits(model, vocab), before)

    model = attached(base, peftjax.Lora(**VARIANTS["all-linear"].ours))
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(logits(model, vocab), logits(load_into_theirs(base, tmp_path / "ours"), vocab))


# --- Training ---

STEPS, RATE, DECAY = 5, 5e-3, 0.1


def batches() -> list[np.ndarray]:
    return [np.random.default_rng(10 + step).integers(0, 48, (4, 17)) for step in range(STEPS)]


def train_theirs(model: Any) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    losses = []
    for ids in map(torch.tensor, batches()):
        outputs = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_for(model: Any, trainable: variables.FlatTree) -> Any:
    config = defaults().optim
    config.learning_rate, config.weight_decay, config.clip_norm, config.schedule = RATE, DECAY, 1.0, "constant"
    axes = {path: leaf.axes for path, leaf in variables.flat(model)[1].items()}
    return optim.make_optimizer(config, STEPS, optim.decay_mask(trainable, axes))


def our_batches() -> list[dict[str, np.ndarray]]:
    weights = np.ones((4, 16), np.float32)
    return [{"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights} for ids in batches()]


def train_by_hand(model: Any) -> list[float]:
    """With value_and_grad, the loss and the optimizer alone."""
    graph, trainable, frozen = variables.split(model, variables.trainable_mask(variables.flat(model)[1]))
    optimizer = optimizer_for(model, trainable)
    state, losses = optimizer.init(trainable), []

    @jax.jit
    def step(trainable: Any, state: Any, batch: Any) -> Any:
        def loss(trainable: Any) -> jax.Array:
            totals = next_token_loss(variables.merge(graph, trainable, frozen), batch, 7)
            return totals.loss / totals.tokens

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state, value

    for batch in our_batches():
        trainable, state, value = step(trainable, state, batch)
        losses.append(float(value))
    variables.update(model, trainable)
    return losses


def train_by_the_step(model: Any) -> list[float]:
    """With the train command's own step, in two microbatches."""
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    graph, trainable, frozen = variables.split(model, variables.trainable_mask(variables.flat(model)[1]))
    optimizer = optimizer_for(model, trainable)
    state, losses = first_state(trainable, optimizer, seed=0), []
    step = make_train_step(graph, optimizer, (), 7, state)
    with jax.set_mesh(mesh):
        for batch in our_batches():
            state, measured = step(state, frozen, sharding.shard_batch(batch, mesh, 2))
            losses.append(float(measured["loss"]))
    variables.update(model, state.trainable)
    return losses


@pytest.mark.parametrize("train", [train_by_hand, train_by_the_step])
@pytest.mark.parametrize("base", ["untied", "tied"])
def test_five_steps_of_adamw_equal_those_of_torch_and_peft(
    base: str, train: Callable[[Any], list[float]], bases: Callable, tmp_path: Path
) -> None:
    method = peftjax.Lora(rank=4, alpha=8, targets="all-linear", rank_pattern={"v_proj": 2})
    model = peftjax.attach(peftjax.load_model(bases(base)), method, rngs=nnx.Rngs(0))
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter_model.safetensors")
    theirs = load_into_theirs(bases(base), tmp_path / "start", is_trainable=True)

    ours = train(model)
    np.testing.assert_allclose(ours, train_theirs(theirs), rtol=1e-5)
    assert len(set(ours)) == STEPS
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    expected = peft.get_peft_model_state_dict(theirs)
    assert end.keys() == expected.keys()
    for key, value in end.items():
        np.testing.assert_allclose(value, expected[key].numpy(), atol=1e-4, rtol=0, err_msg=key)
        assert np.abs(value - start[key]).max() > 10 * 1e-4, key  # it moved much further than the tolerance


# --- What peft takes and we refuse ---


def test_the_configs_that_peft_writes_are_read_and_its_variants_are_refused_by_name(
    bases: Callable, tmp_path: Path
) -> None:
    variants: dict[str, dict[str, Any]] = {
        "use_dora": {"use_dora": True},
        "lora_bias": {"lora_bias": True},
        "trainable_token_indices": {"trainable_token_indices": [1, 2]},
        "init_lora_weights": {"init_lora_weights": "pissa"},
        "layer_replication": {"layer_replication": [(0, 2), (1, 3)]},
    }
    for field, options in variants.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], **options)
        model = peft.get_peft_model(load_theirs(bases("biased")), config)
        model.save_pretrained(tmp_path / field)
        assert json.loads((tmp_path / field / "adapter_config.json").read_text())[field]
        with pytest.raises(ValueError, match=f"adapter_config.json: {field}="):
            peftjax.load_adapter(peftjax.load_model(bases("biased")), tmp_path / field)
