"""A text classifier: LoRA on a BERT, trained in your own loop.

    python examples/classifier.py [--model=path/to/bert --data=reviews.jsonl]

The data format is JSON lines {"text": ..., "label": ...}. By default, a tiny BERT with random weights learns whether a text
has more even than odd digits. peftjax train with task.kind="classification" does the same from a config.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax
import tokenizers
from flax import nnx

import peftjax
from peftjax.models import from_hf_config

LENGTH = 16


def make_tiny_bert(directory):
    """Write a BERT directory with random weights; its tokens are digits."""
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *"0123456789"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "bert", "vocab_size": len(vocabulary), "pad_token_id": 0, "initializer_range": 0.2, **sizes}
    peftjax.save_model(from_hf_config(config).make(nnx.Rngs(0)), directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers would build a BertTokenizer for this model_type
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


def make_records(count, seed):
    draw = random.Random(seed)
    digits = [[draw.randrange(10) for _ in range(9)] for _ in range(count)]
    return [
        {"text": " ".join(map(str, d)), "label": "even" if sum(x % 2 == 0 for x in d) > 4 else "odd"} for d in digits
    ]


def make_batch(tokenizer, records, labels):
    tokens = np.full((len(records), LENGTH), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, record in enumerate(records):
        ids = tokenizer.encode(record["text"])[:LENGTH]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    numbers = np.array([labels.index(record["label"]) for record in records], np.int32)
    return {"tokens": tokens, "mask": mask, "labels": numbers, "loss_weights": np.ones(len(records), np.float32)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="Directory of a BERT or RoBERTa; default: a tiny random one")
    parser.add_argument("--data", help="FILE.jsonl; default: generated records")
    parser.add_argument("--steps", type=int, default=200, help="Number of optimizer updates")
    parser.add_argument("--out", default="runs/classifier", help="Directory for the adapter and the head")
    options = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as temporary:
        if options.model is None:
            options.model = Path(temporary) / "bert"
            make_tiny_bert(options.model)
        records = (
            [json.loads(line) for line in Path(options.data).read_text().splitlines()]
            if options.data
            else make_records(3000, seed=0)
        )
        labels = sorted({record["label"] for record in records})
        tokenizer = peftjax.load_tokenizer(options.model)
        model = peftjax.load_model(options.model, head="sequence_classification", labels=labels)

    # The head is new. It is trained in full, together with the LoRA, and save_adapter writes both.
    peftjax.attach(model, peftjax.Lora(rank=8, alpha=16), rngs=nnx.Rngs(0))
    graph, adapter, base = nnx.split(model, peftjax.PeftParam, ...)
    tx = optax.adamw(1e-2)
    opt = tx.init(adapter)

    @jax.jit
    def step(adapter, opt, base, batch):
        def loss(adapter):
            return peftjax.losses.classification(nnx.merge(graph, adapter, base), batch)

        value, gradients = jax.value_and_grad(loss)(adapter)
        updates, opt = tx.update(gradients, opt, adapter)
        return optax.apply_updates(adapter, updates), opt, value

    held_out, training = records[: len(records) // 10], records[len(records) // 10 :]
    for index in range(options.steps):
        picked = [training[(32 * index + i) % len(training)] for i in range(32)]
        adapter, opt, loss = step(adapter, opt, base, make_batch(tokenizer, picked, labels))
        if (index + 1) % 50 == 0:
            print(f"step {index + 1}: loss {loss:.3f}")

    nnx.update(model, adapter)
    batch = make_batch(tokenizer, held_out, labels)
    logits = nnx.jit(lambda model, batch: model(batch["tokens"], mask=batch["mask"]))(model, batch)
    accuracy = float((logits.argmax(-1) == batch["labels"]).mean())
    print(f"held-out accuracy: {accuracy:.1%}")
    print("saved", peftjax.save_adapter(model, options.out))
    return accuracy


if __name__ == "__main__":
    main()
