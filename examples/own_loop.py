"""LoRA in your own training loop: from texts to a saved adapter.

    python examples/own_loop.py [--model=DIR] [--out=runs/own_loop]

By default, the bundled model learns to rewrite dates. The training data is generated below.
"""

import argparse
import datetime
import random
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import peftjax

LENGTH = 48


def make_pairs(count, seed):
    """Make pairs such as ("March 7th, 2024 ->", " 2024-03-07")."""
    draw = random.Random(seed)
    days = [datetime.date(2000, 1, 1) + datetime.timedelta(draw.randrange(9000)) for _ in range(count)]
    return [(f"{day:%B} {day.day}, {day.year} ->", f" {day.isoformat()}") for day in days]


def make_batch(tokenizer, pairs):
    """Make token rows with the next tokens as targets, and weights that are 1 on the completion and the end of text."""
    tokens = np.full((len(pairs), LENGTH + 1), tokenizer.pad_id, np.int32)
    weights = np.zeros((len(pairs), LENGTH), np.float32)
    for row, (prompt, completion) in enumerate(pairs):
        before = tokenizer.encode(prompt, bos=True, eos=False)
        ids = tokenizer.end(tokenizer.encode(prompt + completion, bos=True, eos=False))[: LENGTH + 1]
        tokens[row, : len(ids)] = ids
        weights[row, len(before) - 1 : len(ids) - 1] = 1
    return {
        "tokens": jnp.array(tokens[:, :-1]),
        "targets": jnp.array(tokens[:, 1:]),
        "loss_weights": jnp.array(weights),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="Hugging Face directory, hub id, or the bundled model")
    parser.add_argument("--out", default="runs/own_loop", help="Directory for the adapter")
    parser.add_argument("--steps", type=int, default=100, help="Number of optimizer updates")
    options = parser.parse_args(argv)

    tokenizer = peftjax.load_tokenizer(options.model)
    model = peftjax.load_model(options.model)
    peftjax.attach(model, peftjax.Lora(rank=8, alpha=16, dropout=0.05), rngs=nnx.Rngs(0))
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, options.steps))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter, opt, base, batch):
        def loss(adapter):
            return peftjax.losses.next_token(nnx.merge(graph, adapter, base), batch)

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, opt = tx.update(gradients, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    @jax.jit
    def evaluate(adapter, base, batch):
        return peftjax.losses.next_token(nnx.merge(graph, adapter, base), batch, train=False)

    pairs, held_out = make_pairs(2000, seed=0), make_batch(tokenizer, make_pairs(32, seed=1))
    before = float(evaluate(adapter, base, held_out))
    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates this copy; the model keeps its own arrays
    opt = tx.init(adapter)
    for index in range(options.steps):
        batch = make_batch(tokenizer, [pairs[(16 * index + i) % len(pairs)] for i in range(16)])
        adapter, opt, loss = step(adapter, opt, base, batch)
        if (index + 1) % 50 == 0:
            print(f"step {index + 1}: loss {loss:.3f}")
    after = float(evaluate(adapter, base, held_out))
    print(f"held-out loss: {before:.3f} before, {after:.3f} after")

    nnx.update(model, adapter)
    print("saved", peftjax.save_adapter(model, options.out))
    return before, after


if __name__ == "__main__":
    main()
