"""QLoRA on a Hugging Face model: an NF4 base with LoRA on all linear layers.

    python examples/qlora_hf_model.py [--model=DIR --data=FILE.jsonl --dtype=bfloat16]

By default, the bundled model, which was trained on Python's documentation, is fine-tuned on Python code. The data format is
JSON lines {"text": ...}. For longer runs, several devices or checkpoints, use peftjax train with
--config.model.quantize=nf4.
"""

import argparse
import difflib
import inspect
import itertools
import json
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import peftjax


def texts_of(path):
    if path is None:
        return [inspect.getsource(module) for module in (argparse, difflib, inspect, json, textwrap)]
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


def make_rows(tokenizer, texts, length):
    """Concatenate all texts and split them into rows of length + 1 tokens."""
    ids = list(itertools.chain.from_iterable(tokenizer.encode(text, bos=True, eos=True) for text in texts))
    count = len(ids) // (length + 1)
    return np.array(ids[: count * (length + 1)], np.int32).reshape(count, length + 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded", help="Hugging Face directory, hub id, or the bundled model")
    parser.add_argument("--data", help='FILE.jsonl with records {"text": ...}; default: Python code')
    parser.add_argument("--dtype", default="float32", help="Compute dtype; bfloat16 on accelerators")
    parser.add_argument("--length", type=int, default=64, help="Tokens per sequence")
    parser.add_argument("--steps", type=int, default=60, help="Number of optimizer updates")
    parser.add_argument("--out", default="runs/qlora", help="Directory for the adapter")
    options = parser.parse_args(argv)

    model = peftjax.load_model(options.model, dtype=options.dtype, quantize="nf4", remat="block")
    peftjax.attach(model, peftjax.Lora(rank=16, alpha=16, dropout=0.05), rngs=nnx.Rngs(0))
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)
    tx = optax.adamw(5e-3)
    rows = make_rows(peftjax.load_tokenizer(options.model), texts_of(options.data), options.length)
    rows = np.random.default_rng(0).permutation(rows)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(adapter, opt, base, batch):
        def loss(adapter):
            return peftjax.losses.next_token(nnx.merge(graph, adapter, base), batch)

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, opt = tx.update(gradients, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates this copy; the model keeps its own arrays
    opt, losses = tx.init(adapter), []
    for index in range(options.steps):
        picked = rows[np.arange(8 * index, 8 * index + 8) % len(rows)]
        batch = {"tokens": picked[:, :-1], "targets": picked[:, 1:], "loss_weights": np.ones((8, options.length))}
        adapter, opt, loss = step(adapter, opt, base, batch)
        losses.append(float(loss))
        if (index + 1) % 20 == 0:
            print(f"step {index + 1}: loss {np.mean(losses[-20:]):.3f}")

    nnx.update(model, adapter)
    print("saved", peftjax.save_adapter(model, options.out))
    return losses


if __name__ == "__main__":
    main()
