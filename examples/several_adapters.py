"""Several adapters on one base: switch between them, and use a different one for each row of a batch.

    python examples/several_adapters.py

Two LoRAs learn different date formats on the bundled model: one writes 2024-03-07, the other 07/03/2024.
"""

import datetime
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import peftjax

PROMPT = "{:%B} {}, {} ->"
FORMATS = {"iso": " %Y-%m-%d", "british": " %d/%m/%Y"}


def days(count, seed):
    draw = random.Random(seed)
    return [datetime.date(2000, 1, 1) + datetime.timedelta(draw.randrange(9000)) for _ in range(count)]


def make_batch(tokenizer, picked, written, length=48):
    tokens = np.full((len(picked), length + 1), tokenizer.pad_id, np.int32)
    weights = np.zeros((len(picked), length), np.float32)
    for row, day in enumerate(picked):
        prompt = PROMPT.format(day, day.day, day.year)
        before = tokenizer.encode(prompt, bos=True, eos=False)
        ids = tokenizer.end(tokenizer.encode(prompt + day.strftime(written), bos=True, eos=False))
        tokens[row, : len(ids)], weights[row, len(before) - 1 : len(ids) - 1] = ids, 1
    return {
        "tokens": jnp.array(tokens[:, :-1]),
        "targets": jnp.array(tokens[:, 1:]),
        "loss_weights": jnp.array(weights),
    }


def train(model, name, batches):
    """Train the adapter called `name`; the others stay attached but inactive, and keep their values."""
    peftjax.use(model, name)

    def mine(path, value):
        return isinstance(value, peftjax.PeftParam) and name in path

    graph, adapter, rest = nnx.split(model, mine, ...)
    tx = optax.adamw(optax.cosine_decay_schedule(1e-2, len(batches)))
    opt = tx.init(adapter)

    @jax.jit
    def step(adapter, opt, rest, batch):
        def loss(adapter):
            return peftjax.losses.next_token(nnx.merge(graph, adapter, rest), batch)

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, opt = tx.update(gradients, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    for batch in batches:
        adapter, opt, loss = step(adapter, opt, rest, batch)
    nnx.update(model, adapter)
    print(f"{name}: loss {loss:.3f}")


def main(steps=100):
    tokenizer = peftjax.load_tokenizer("embedded")
    model = peftjax.load_model("embedded")
    for seed, (name, written) in enumerate(FORMATS.items()):
        peftjax.attach(model, peftjax.Lora(rank=8, alpha=16), name, rngs=nnx.Rngs(seed))
        picked = days(16 * steps, seed)
        train(model, name, [make_batch(tokenizer, picked[16 * i : 16 * i + 16], written) for i in range(steps)])

    day = datetime.date(2019, 5, 17)
    prompt = tokenizer.encode(PROMPT.format(day, day.day, day.year), bos=True, eos=False)
    rows = ["iso", "british", None]  # None: the base model alone
    mixed = peftjax.rows(model, rows)
    answers = peftjax.generate(mixed, [prompt] * len(rows), max_new_tokens=12, stop=tokenizer.eos_ids)
    answers = [tokenizer.decode(answer) for answer in answers]
    for name, answer in zip(rows, answers, strict=True):
        print(f"{name}: {answer!r}")

    peftjax.use(model, "british")  # one adapter for the whole batch
    alone = peftjax.generate(model, [prompt], max_new_tokens=12, stop=tokenizer.eos_ids)
    assert tokenizer.decode(alone[0]) == answers[1]
    return answers


if __name__ == "__main__":
    main()
