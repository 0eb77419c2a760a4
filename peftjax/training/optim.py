"""The optimizer and its learning rate, from `config.optim`.

Every optimizer is the same chain; only the direction d_t differs:

    g_t <- g_t * min(1, clip_norm / ||g_t||)          one norm over all trainable parameters; off at clip_norm = 0
    d_t  = direction of descent from g_t and the moments
    p_t  = p_{t-1} - lr_t * (d_t + weight_decay * p_{t-1})       decay where `decay_mask` is true

The decay is decoupled from the moments (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2 line 12) and multiplied
by the learning rate, as in PyTorch and Hugging Face. Clipping by the global norm: Pascanu et al. 2013
(arXiv:1211.5063), algorithm 1.

Trees are flat ({path: array}). Frozen leaves are `optax.MaskedNode()`: they have no gradient, no share in the norm, no
moment and no update.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from peftjax.core.config import field
from peftjax.core.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")
CUSTOM = "custom"  # the optax transformation given to `peftjax.train`
STACKED = ("layers", "expert", "part")
SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = field(
        "adamw", "Optimizer; custom: the one given to peftjax.train in Python", choices=(*OPTIMIZERS, CUSTOM)
    )
    learning_rate: float = field(1e-4, "Peak learning rate", low=0)
    schedule: str = field("cosine", "Learning rate schedule after the warmup", choices=SCHEDULES)
    warmup_steps: int = field(0, "Steps over which the learning rate rises from 0", low=0)
    warmup_fraction: float = field(
        0.0, "Warmup as a fraction of all steps, in place of warmup_steps; 0: use warmup_steps", low=0, high=1,
        instead_of="warmup_steps",
    )  # fmt: skip
    final_fraction: float = field(0.0, "Final learning rate as a fraction of the peak", low=0, high=1)
    weight_decay: float = field(
        0.0, "Decoupled weight decay of matrices; not applied to norms, biases and other vectors", low=0
    )
    b1: float = field(0.9, "Decay rate of the first moment (adamw, lion)", low=0, high=1)
    b2: float = field(0.999, "Decay rate of the second moment (adamw) or of the momentum (lion)", low=0, high=1)
    eps: float = field(1e-8, "Term added to the root of the second moment (adamw)", low=0)
    momentum: float = field(0.9, "Momentum of sgd", low=0, high=1)
    momentum_dtype: str = field(
        "float32", "Dtype of the first moment (adamw, lion, sgd)", choices=("float32", "bfloat16")
    )
    clip_norm: float = field(1.0, "Maximum global norm of the gradient; 0: no clipping", low=0)

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_fraction:
            raise UserError(
                f"optim.warmup_steps={self.warmup_steps} and optim.warmup_fraction={self.warmup_fraction:g} both give the "
                "length of the warmup; set one of them"
            )
        # open intervals, which the bounds of fields cannot express
        for name, value in (("b1", self.b1), ("b2", self.b2), ("momentum", self.momentum)):
            if value == 1:
                raise UserError(f"optim.{name}=1 must be less than 1")
        if self.eps == 0:  # 0 would divide 0 by 0: LoRA's A has no gradient while B is zero
            raise UserError("optim.eps=0 must be more than 0, for example 1e-8")

    def warmup(self, steps: int) -> int:
        """The steps of the warmup in a run of so many steps; a fraction is rounded up, as in transformers."""
        return math.ceil(round(self.warmup_fraction * steps, 6)) if self.warmup_fraction else self.warmup_steps


def make_schedule(config: OptimConfig, steps: int, peak: ArrayLike | None = None) -> optax.Schedule:
    """The learning rate lr(s) of update s = 0, 1, ..., steps - 1.

    With w = config.warmup(steps) and f = final_fraction:

        s <  w:   learning_rate * s / w
        s >= w:   learning_rate * (f + (1 - f) * shape(x)),   x = (s - w) / (steps - w)
        shape(x): constant 1 (f has no effect); linear 1 - x; cosine (1 + cos(pi x)) / 2

    The first update of a warmup has rate 0, update w the peak rate; update `steps`, which does not happen, would have
    learning_rate * f. These are the rates of get_constant_, get_linear_ and get_cosine_schedule_with_warmup in Hugging
    Face transformers. Cosine: Loshchilov & Hutter 2017 (arXiv:1608.03983), equation 5, without restarts. optax's
    schedules are the same functions with another rounding, which would change the bits of a resumed run.

    Args:
        config: The section `optim`.
        steps: The number of updates.
        peak: The peak learning rate, if it is not `config.learning_rate`; it may be an argument of a jitted update.

    Returns:
        A function from a step, an int or an int32 array, to a float32 scalar.
    """
    peak = config.learning_rate if peak is None else peak
    warmup, final = config.warmup(steps), config.final_fraction

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = jnp.clip((steps - step) / max(1, steps - warmup), 0.0, 1.0)  # 1 - x
        shapes: dict[str, ArrayLike] = {
            "constant": 1.0,
            "linear": final + (1 - final) * left,
            "cosine": final + (1 - final) * jnp.sin(0.5 * jnp.pi * left) ** 2,  # = (1 + cos(pi x)) / 2, exact near 0
        }
        return jnp.multiply(peak, jnp.where(step < warmup, step / max(1, warmup), shapes[config.schedule]))

    return schedule


def describe_extension(config: OptimConfig, before: int, after: int, done: int) -> str:
    """Describe how the learning rate changes if a run of `before` updates, of which `done` are completed, gets `after` updates."""
    changed = f"train.steps was raised from {before:,} to {after:,}"
    last, coming = float(make_schedule(config, before)(done - 1)), float(make_schedule(config, after)(done))
    if config.schedule == "constant":
        return f"{changed}; the schedule is constant, the next learning rate is {coming:.3g}"
    return (
        f"{changed}: the {config.schedule} schedule now spans {after:,} steps, so the learning rate goes from {last:.3g} "
        f"to {coming:.3g}"
    )


def make_optimizer(
    config: OptimConfig, steps: int, decay_mask: Mapping[str, Any], peak: ArrayLike | None = None
) -> optax.GradientTransformation:
    """The chain at the head of this file: clip, direction, decay, learning rate. `update` needs `params`.

    adamw      m_t = b1 m_{t-1} + (1 - b1) g_t,  v_t = b2 v_{t-1} + (1 - b2) g_t^2,
               d_t = (m_t / (1 - b1^t)) / (sqrt(v_t / (1 - b2^t)) + eps)
               Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2. Equal to torch.optim.AdamW up to 6e-6 of an
               update at b2 = 0.999, where optax computes 1 - b2^t in float32.
    adafactor  d_t = u_t / max(1, RMS(u_t)),  u_t = g_t / sqrt(v_t),  v_t = c_t v_{t-1} + (1 - c_t)(g_t^2 + 1e-30),
               c_t = 1 - t^-0.8; if two dimensions have at least 128 elements, v_t is the outer product of its row and
               column means over the two largest. Shazeer & Stern 2018 (arXiv:1804.04235), algorithms 4 and 5, with a
               learning rate of its own: no scaling by the parameter's RMS, no relative step, no momentum. A leaf with
               stacked layers is one parameter: its RMS is over all of them.
    lion       d_t = sign(b1 m_{t-1} + (1 - b1) g_t),  m_t = b2 m_{t-1} + (1 - b2) g_t
               Chen et al. 2023 (arXiv:2302.06675), algorithm 2; they use b2 = 0.99 and a learning rate 3 to 10 times
               smaller than AdamW's.
    sgd        d_t = m_t = momentum * m_{t-1} + g_t
               Loshchilov & Hutter 2019, algorithm 1, with the rate outside of the momentum as in torch.optim.SGD.

    Gradients and parameters may have any float dtype; everything is computed and stored in float32, because a bfloat16
    v_t would not change: its new value is below its rounding. m_t, of which a tenth is new in every step, may be stored
    in bfloat16 (momentum_dtype).

    Args:
        config: The section `optim`.
        steps: The number of updates.
        decay_mask: A tree of booleans as `decay_mask` returns it.
        peak: The peak learning rate, as in `make_schedule`.

    Raises:
        UserError: The optimizer is a custom one.
    """
    if config.name == CUSTOM:
        raise UserError(
            f"optim.name={CUSTOM!r} stands for an optimizer given to peftjax.train(..., optimizer=...) in Python; here, use "
            f"{' or '.join(map(repr, OPTIMIZERS))}"
        )
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm > 0 else []
    return in_float32(
        optax.chain(
            *clip,
            _direction(config),
            optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
            optax.scale_by_learning_rate(make_schedule(config, steps, peak)),
        )
    )


def decay_mask(trainable: Mapping[str, Any], axes: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Whether weight decay applies, by path: to matrices, not to the scales of norms, biases and other vectors.

    Args:
        trainable: The trainable leaves; frozen ones are `optax.MaskedNode()` and stay so.
        axes: The logical axes of each parameter. Leading ones in `STACKED` stack the parameters of layers and experts,
            and do not count.
    """

    def stacked(path: str) -> int:
        return len(list(itertools.takewhile(STACKED.__contains__, axes[path])))

    return {
        path: value if isinstance(value, optax.MaskedNode) else value.ndim - stacked(path) >= 2
        for path, value in trainable.items()
    }


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    """The direction d_t of `make_optimizer`."""
    stored = config.momentum_dtype
    if config.name == "adamw":
        return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=stored)
    if config.name == "adafactor":
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.name == "lion":
        return optax.scale_by_lion(config.b1, config.b2, mu_dtype=stored)
    return optax.trace(config.momentum, accumulator_dtype=stored) if config.momentum else optax.identity()


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` applied to float32 copies of gradients and parameters; its state and its updates are float32."""

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)
