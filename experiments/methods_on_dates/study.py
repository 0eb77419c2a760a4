"""Every method on the same data in the same number of steps: python experiments/methods_on_dates/study.py

Each method is trained with all of `RATES` at once, side by side under vmap. The rate is chosen on one half of the held-out
batches; the results are those on the other half. Writes results.json, table.md and methods.png beside this file. Methods
that are in results.json are not trained again.
"""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.methods_on_dates.config import get_config
from experiments.methods_on_dates.picture import draw
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.data.batches import Batching, HeldOut, train_batches
from peftjax.io.adapter_tensors import adapter_tensors
from peftjax.io.hf_files import find_model
from peftjax.io.load import load_model
from peftjax.tasks import make_task
from peftjax.totals import next_token_loss
from peftjax.training import config as configs
from peftjax.training import optim

HERE = Path(__file__).parent
RATES = (3e-3, 2e-2, 1e-1)
EVAL_BATCHES = 8
config = configs.validate(get_config())
METHODS: dict[str, adapters.Method] = {
    "full": methods.Full(),
    "lora": methods.Lora(rank=4, alpha=8),
    "prompt": methods.PromptTuning(tokens=16),
    "prefix": methods.PrefixTuning(tokens=16),
    "ia3": methods.Ia3(feedforward=("down_proj",)),
    "houlsby": methods.Houlsby(reduction_factor=8),
    "lora, DoRA": methods.Lora(rank=4, alpha=8, dora=True),
    "adalora": methods.AdaLora(
        init_rank=6, target_rank=4, total_steps=config.train.steps, warmup_steps=20, final_steps=40
    ),
    "ln_tuning": methods.LnTuning(),
    "pfeiffer": methods.Pfeiffer(reduction_factor=8),
    "parallel": methods.ParallelAdapter(reduction_factor=8),
    "vera": methods.Vera(rank=64),
    "lora, EVA": methods.Lora(rank=4, alpha=8, init="eva", eva_batches=8),
    "lora, PiSSA": methods.Lora(rank=4, alpha=8, init="pissa"),
    "oft": methods.Oft(block_size=16),
    "loha": methods.LoHa(rank=4),
    "lokr": methods.LoKr(rank=4),
    "miss": methods.Miss(rank=4),
    "p_tuning": methods.PTuning(tokens=16),
    "trainable_tokens": methods.TrainableTokens(token_indices=tuple(range(64))),
    "hra": methods.Hra(rank=4),
    "boft": methods.Boft(block_size=4),
    "vblora": methods.VbLora(rank=4, num_vectors=64, vector_length=32),
    "randlora": methods.RandLora(rank=16),
    "fourierft": methods.FourierFT(n_frequency=500),
}


def measure(method: adapters.Method, model: Any, batches: list[Any], held_out: list[Any]) -> dict[str, Any]:
    """Attach the method to the model and train it; its size, its cost and its scores."""
    base = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    alone = products(model, batches[0]["tokens"])
    shown = batches[: method.data] if method.data else None
    adapters.attach(model, method, rngs=nnx.Rngs(0), batches=shown)
    full = method.trains_base
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model, method.trains)
    decayed = optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    loss = partial(next_token_loss, chunk=config.train.loss_chunk)

    def optimizer(rate: Any) -> optax.GradientTransformation:
        unscaled = dataclasses.replace(config.optim, learning_rate=1.0)
        plain = optim.make_optimizer(unscaled, config.train.steps, decayed)
        return method.optimizer(optax.chain(plain, optax.scale(rate)), leaves)

    def step(trainable: Any, state: Any, rate: Any, frozen: Any, batch: Any) -> Any:
        def minimised(trainable: Any) -> jax.Array:
            built = variables.join(graph, trainable, frozen)
            totals, extra = loss(built, batch), method.penalty(built)
            return totals.loss / totals.tokens + (0.0 if extra is None else extra)

        updates, state = optimizer(rate).update(jax.grad(minimised)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    def scores(trainable: Any, frozen: Any, batch: Any) -> Any:
        return jnp.stack(loss(variables.join(graph, trainable, frozen), batch)[:3])

    rates = jnp.array(RATES)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(RATES)), trainable)
    state = jax.vmap(lambda one: optimizer(1.0).init(one))(members)
    together = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)))
    score = jax.jit(jax.vmap(scores, in_axes=(0, None, None)))
    for batch in batches:
        members, state = together(members, state, rates, frozen, batch)
    halves = [
        np.sum([score(members, frozen, batch) for batch in half], axis=0) for half in (held_out[::2], held_out[1::2])
    ]
    best = int(np.argmin(np.nan_to_num(halves[0][:, 0] / halves[0][:, 1], nan=np.inf)))
    total, tokens, correct = halves[1][best].tolist()
    one_state = optimizer(1.0).init(trainable)
    return {
        "trained": base if full else adapters.count_trainable(model),
        "share": 1.0 if full else adapters.count_trainable(model) / base,
        "file_bytes": None if full else sum(leaf.nbytes for leaf in adapter_tensors(model).values()),
        "inference_flops": products(model, batches[0]["tokens"]) / alone,
        "step_flops": products_of(jax.make_jaxpr(step)(trainable, one_state, 1.0, frozen, batches[0]).jaxpr),
        "rate": RATES[best],
        "eval_loss": total / tokens,
        "token_accuracy": correct / tokens,
        "losses_by_rate": (halves[0][:, 0] / halves[0][:, 1]).tolist(),
    }


def products(model: Any, tokens: Any) -> int:
    """The floating-point operations of all matrix products of one forward pass."""
    return products_of(jax.make_jaxpr(lambda tokens: model(tokens))(tokens).jaxpr)


def products_of(jaxpr: Any) -> int:
    """The floating-point operations of all matrix products of a program; the body of a loop counts once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products_of(inner)
    return total


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, the best first."""
    lora = results["methods"]["lora"]["step_flops"]
    lines = [
        "| method | trained | of the base | file | step | inference | best rate | held-out loss | token accuracy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        f"| (the base alone) | | | | | 1.00 | | {results['base_loss']:.3f} | {results['base_accuracy']:.1%} |",
    ]
    for name, one in sorted(results["methods"].items(), key=lambda item: item[1]["eval_loss"]):
        size = f"{one['file_bytes'] / 1024:.0f} KiB" if one["file_bytes"] else "the model"
        lines.append(
            f"| {name} | {one['trained']:,} | {one['share']:.2%} | {size} | {one['step_flops'] / lora:.2f} | "
            f"{one['inference_flops']:.2f} | {one['rate']:g} | {one['eval_loss']:.3f} | {one['token_accuracy']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    base = find_model(config.model.path)
    task, batching = make_task(config.task, config.data, base), Batching(config.train.batch_size)
    stream = train_batches(config.data, task, batching, config.seed)
    batches = [batch.arrays for batch in itertools.islice(stream, config.train.steps)]
    stream = HeldOut(config.data, task).batches(batching)
    held_out: list[Any] = [batch.arrays for batch in itertools.islice(stream, EVAL_BATCHES)]
    file = HERE / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"methods": {}}
    model: Any = load_model(base)
    before = np.sum(
        [np.stack(next_token_loss(model, batch, config.train.loss_chunk)[:3]) for batch in held_out[1::2]], axis=0
    )
    results |= {
        "steps": config.train.steps, "batch_size": config.train.batch_size, "rates": RATES, "jax": jax.__version__,
        "base_loss": float(before[0] / before[1]), "base_accuracy": float(before[2] / before[1]),
    }  # fmt: skip
    for name, method in METHODS.items():
        if name not in results["methods"]:
            results["methods"][name] = measure(method, load_model(base), batches, held_out)
            print(name, results["methods"][name], flush=True)
            file.write_text(json.dumps(results, indent=2) + "\n")
    (HERE / "table.md").write_text(table(results))
    draw(results)


if __name__ == "__main__":
    main()
