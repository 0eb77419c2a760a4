"""Our models and peft's beside each other: random bases, adapters that have moved, and the same steps of training."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax import sharding
from peftjax.adapters import Method
from peftjax.adapters import attached as attached_methods
from peftjax.core import variables
from peftjax.totals import next_token_loss
from peftjax.training import optim
from peftjax.training.step import Objective, init_state, make_train_step

# What these libraries warn of among themselves; ours stay errors.
THEIRS = ("ignore::FutureWarning", "ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
STEPS, RATE, DECAY = 5, 5e-3, 0.1

BASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True},
    "wide": {"hidden_size": 64, "intermediate_size": 128},  # whole blocks of NF4
}


def save_base(path: Path, kind: str = "Llama", **fields: Any) -> None:
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
    config = getattr(transformers, f"{kind}Config")(**sizes | fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    shake(dict(model.named_parameters()), 0.1)  # the biases and the norms' scales too
    model.save_pretrained(path)


def shake(parameters: dict[str, torch.nn.Parameter], scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def load_theirs(path: Path, **options: Any) -> Any:
    """By the class that its config.json names."""
    return getattr(transformers, architecture(path)).from_pretrained(path, **options).eval()


def architecture(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["architectures"][0]


def task_type(path: Path) -> str:
    """What peft calls the task of a base's head."""
    ending = {"Model": "FEATURE_EXTRACTION", "SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS"}
    return next((task for end, task in ending.items() if architecture(path).endswith(end)), "CAUSAL_LM")


def adapted(base: Path, config: peft.PeftConfig) -> Any:
    """Their model with their adapter, as if it had been trained: whatever would be trained has moved."""
    config.task_type = task_type(base)
    model = peft.get_peft_model(load_theirs(base), config).eval()
    shake({name: p for name, p in model.named_parameters() if p.requires_grad}, 0.1)
    return model


def attached(base: Path, method: Method) -> Any:
    """Our model with our adapter, as if it had been trained."""
    model = peftjax.attach(peftjax.load_model(base), method, rngs=nnx.Rngs(0))
    leaves = variables.flat(model)[1]
    rng = np.random.default_rng(0)
    moved = {
        path: jnp.asarray(np.asarray(leaf.get_value()) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32))
        for path, leaf in leaves.items()
        if type(leaf) is variables.PeftParam
    }
    variables.update(model, moved)
    return model


def load_into_theirs(base: Path, adapter: Path, **options: Any) -> Any:
    """The adapter in peft. It must find every key that it wants, and use every key and every bit that is in the file."""
    return load_into(load_theirs(base), adapter, **options)


def load_into(base: torch.nn.Module, adapter: Path, **options: Any) -> Any:
    """`load_into_theirs`, for their model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, adapter, **options)
    assert not [str(warning.message) for warning in caught if "missing" in str(warning.message)]
    used = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    file = load_file(adapter / "adapter_model.safetensors")
    assert used.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_array_equal(used[key].detach().numpy(), value, err_msg=key)
    return model


def trainable_theirs(base: Path, config: peft.PeftConfig, adapter: Path) -> Any:
    """Their model with their adapter, ready to be trained, from the values in a file."""
    config.task_type = task_type(base)
    model = peft.get_peft_model(load_theirs(base), config)
    peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(adapter), device="cpu"))
    return model


def tokens(vocab: int = 48) -> np.ndarray:
    return np.random.default_rng(3).integers(0, vocab, (2, 12))


def logits(model: Any, vocab: int = 48) -> np.ndarray:
    if isinstance(model, nnx.Module):
        return np.asarray(model(jnp.asarray(tokens(vocab))))
    with torch.no_grad():
        return (
            model(torch.tensor(tokens(vocab))).logits[:, -12:].detach().float().numpy()
        )  # soft-prompt positions come first


def assert_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    scale = np.abs(theirs).max()
    difference = np.abs(ours - theirs).max() / scale
    assert difference <= tolerance, difference


def assert_far(one: np.ndarray, other: np.ndarray) -> None:
    assert np.abs(one - other).max() > 0.01 * np.abs(other).max()


# --- Training ---


def batches() -> list[np.ndarray]:
    return [np.random.default_rng(10 + step).integers(0, 48, (4, 17)) for step in range(STEPS)]


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    vectors = [p for p in parameters if p.numel() == max(p.shape)]  # peft has some of them as matrices of one column
    matrices = [p for p in parameters if p.numel() > max(p.shape)]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE)


def train_theirs(
    model: Any, optimizer: torch.optim.Optimizer | None = None, steps: list[np.ndarray] | None = None
) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = optimizer or adamw(parameters), []
    for ids in (torch.tensor(ids).long() for ids in steps or batches()):
        outputs = model(ids[:, :-1]).logits[:, 1 - ids.shape[1] :]
        loss = torch.nn.functional.cross_entropy(outputs.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def optimizer_for(model: Any, trainable: variables.FlatTree) -> Any:
    config = optim.OptimConfig(learning_rate=RATE, weight_decay=DECAY, clip_norm=1.0, schedule="constant")
    axes = {path: leaf.axes for path, leaf in variables.flat(model)[1].items()}
    return optim.make_optimizer(config, STEPS, optim.decay_mask(trainable, axes))


def our_batches(steps: list[np.ndarray] | None = None) -> list[dict[str, np.ndarray]]:
    weights = lambda ids: np.ones((len(ids), ids.shape[1] - 1), np.float32)  # noqa: E731
    return [{"tokens": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights(ids)} for ids in steps or batches()]


def train_by_hand(
    model: Any, steps: list[dict[str, np.ndarray]] | None = None, loss: Callable = next_token_loss, chunk: int = 7
) -> list[float]:
    """With value_and_grad, the loss and the optimizer alone."""
    graph, trainable, frozen = variables.split_by_kind(model)
    optimizer = optimizer_for(model, trainable)
    state, losses = optimizer.init(trainable), []

    @jax.jit
    def step(trainable: Any, state: Any, frozen: Any, batch: Any) -> Any:
        def mean(trainable: Any) -> jax.Array:
            totals = loss(variables.join(graph, trainable, frozen), batch, chunk)
            return totals.loss / totals.tokens

        value, gradients = jax.value_and_grad(mean)(trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        return jax.tree.map(jnp.add, trainable, updates), state, value

    for batch in steps or our_batches():
        trainable, state, value = step(trainable, state, frozen, batch)
        losses.append(float(value))
    variables.update(model, trainable)
    return losses


def train_by_the_step(model: Any) -> list[float]:
    """With the train command's own step, in two microbatches."""
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    graph, trainable, frozen = variables.split_by_kind(model)
    (method,) = attached_methods(model).values()
    optimizer = method.optimizer(optimizer_for(model, trainable), variables.flat(model)[1])
    state, losses = init_state(trainable, optimizer, seed=0), []
    step = make_train_step(Objective(graph, partial(next_token_loss, chunk=7), method.penalty), optimizer, state)
    with jax.set_mesh(mesh):
        for batch in our_batches():
            state, measured = step(state, frozen, sharding.shard_batch(batch, mesh, 2))
            losses.append(float(measured["loss"]))
    variables.update(model, state.trainable)
    return losses
