"""Optimizers and schedules step by step beside PyTorch's and transformers'."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import optimization

from peftjax.training.optim import OptimConfig, decay_mask, make_optimizer, make_schedule

pytestmark = pytest.mark.interop

STEPS = 20
SHAPES = {"a": (16, 4), "b": (4, 24), "bias": (24,), "large": (130, 150)}
AXES = {"a": ("embed", "rank"), "b": ("rank", "mlp"), "bias": ("mlp",), "large": ("embed", "mlp")}


def make_config(**changes: Any) -> OptimConfig:
    return OptimConfig(**{"learning_rate": 1e-3, "schedule": "constant", "clip_norm": 0.0} | changes)


def make_arrays(seed: int) -> dict[str, np.ndarray]:
    """Of the size of weights, so that their own rounding is far below the tolerance."""
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def gradients_at(step: int) -> dict[str, np.ndarray]:
    """Norms from far above to far below a clip at 1, and no gradient at all for `a` in the first step (LoRA's A)."""
    gradients = make_arrays(100 + step)
    scale = np.float32(10.0 ** (1 - step % 5))
    return {name: scale * g * (0 if name == "a" and step == 0 else 1) for name, g in gradients.items()}


def run_ours(config: OptimConfig) -> dict[str, np.ndarray]:
    params: dict[str, Any] = {name: jnp.asarray(x) for name, x in make_arrays(0).items()}
    params["frozen"] = optax.MaskedNode()
    tx = make_optimizer(config, STEPS, decay_mask(params, AXES))
    state = tx.init(params)

    @jax.jit
    def update(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(STEPS):
        params, state = update(params, state, gradients_at(step) | {"frozen": optax.MaskedNode()})
    return {name: np.asarray(params[name]) for name in SHAPES}


def run_theirs(make: Any, weight_decay: float = 0.0, clip_norm: float = 0.0, schedule: Any = None) -> dict[str, Any]:
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in make_arrays(0).items()}
    matrices = [p for p in params.values() if p.ndim >= 2]
    vectors = [p for p in params.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = make(groups)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(STEPS):
        for name, gradient in gradients_at(step).items():
            params[name].grad = torch.tensor(gradient)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return {name: p.detach().numpy() for name, p in params.items()}


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    start = make_arrays(0)
    for name in SHAPES:
        assert np.abs(theirs[name] - start[name]).max() > 1e-3, name  # they moved
        difference = np.abs(ours[name] - theirs[name]).max()
        assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
@pytest.mark.parametrize(("weight_decay", "clip_norm", "b2"), [(0.0, 0.0, 0.999), (0.1, 1.0, 0.999), (0.1, 1.0, 0.95)])
def test_adamw_equals_torch(eps: float, weight_decay: float, clip_norm: float, b2: float) -> None:
    ours = run_ours(make_config(weight_decay=weight_decay, clip_norm=clip_norm, b2=b2, eps=eps))
    theirs = run_theirs(
        lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, b2), eps=eps), weight_decay, clip_norm
    )
    assert_equal(ours, theirs)


def test_adamw_under_a_cosine_with_warmup_equals_torch_under_transformers_schedule() -> None:
    ours = run_ours(make_config(weight_decay=0.1, clip_norm=1.0, schedule="cosine", warmup_steps=4))
    theirs = run_theirs(
        lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        weight_decay=0.1,
        clip_norm=1.0,
        schedule=lambda optimizer: optimization.get_cosine_schedule_with_warmup(optimizer, 4, STEPS),
    )
    assert_equal(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch(momentum: float) -> None:
    ours = run_ours(make_config(name="sgd", learning_rate=0.1, momentum=momentum, clip_norm=1.0))
    theirs = run_theirs(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=momentum), clip_norm=1.0)
    assert_equal(ours, theirs)


def test_adafactor_equals_transformers() -> None:
    # theirs factors every matrix, so only the large one and the vector mean the same in both
    ours = run_ours(make_config(name="adafactor", weight_decay=0.1))
    theirs = run_theirs(
        lambda groups: optimization.Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False),
        weight_decay=0.1,
    )
    for name in ("large", "bias"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6)
        assert np.abs(theirs[name] - make_arrays(0)[name]).max() > 1e-3


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine to a tenth"])
def test_every_update_has_the_rate_that_transformers_gives_it(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    steps, final = 50, 0.1 if name == "cosine to a tenth" else 0.0
    scheduler = {
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps),
        "cosine to a tenth": lambda: optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=0.1
        ),
    }[name]()
    config = make_config(learning_rate=0.3, schedule=name.split()[0], warmup_steps=warmup, final_fraction=final)
    ours = make_schedule(config, steps)
    for step in range(steps + 1):
        assert float(ours(step)) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-5, abs=1e-8), step
        optimizer.step()
        scheduler.step()
