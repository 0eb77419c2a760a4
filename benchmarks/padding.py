"""Time and memory of steps whose batches are padded to their longest example, relative to padding to `data.max_length`.

    PYTHONPATH=. python benchmarks/padding.py

Two cases with random weights: sentences classified by an encoder of the size of MiniLM-L6, and short instructions learned by
a decoder of the size of SmolLM2-135M; both with LoRA. Times are medians over rounds in which both kinds of steps take turns.
The memory is the compiled step's: its arguments and temporaries.
"""

import dataclasses
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from train_step import model_directory

from peftjax import methods, sharding
from peftjax.core.config import defaults
from peftjax.data.batches import train_batches
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.setup import attach_method, batching, open_data
from peftjax.training.split import split
from peftjax.training.step import init_state, make_train_step

STEPS, ROUNDS, RECORDS = 2, 3, 50
MINILM = {
    "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def make_config(root: Path, model: dict[str, Any], tokens: tuple[int, int], **fields: Any) -> Config:
    """A config for a model of these sizes, and for records whose texts have about this range of numbers of tokens."""
    directory = model_directory(root / model["model_type"], model)
    rng, file = random.Random(0), directory / "train.jsonl"
    texts = [" ".join(["a"] * rng.randint(*tokens)) for _ in range(RECORDS)]
    file.write_text("".join(json.dumps({"text": text, "label": i % 2}) + "\n" for i, text in enumerate(texts)))
    made = defaults()
    made.model.path, made.model.init, made.data.train = str(directory), "random", (str(file),)
    made.method = methods.make_config("lora")
    for name, value in fields.items():
        section, _, field = name.partition("__")
        made[section][field] = value
    return configs.validate(made)


def measure(name: str, config: Config) -> None:
    """Print the ratios of one case."""
    mesh, length = sharding.make_mesh(), config.data.max_length
    seconds: dict[int, list[float]] = {}
    memory, states, batches = {}, {}, {}
    with jax.set_mesh(mesh):
        task, _ = open_data(config, mesh)
        model = task.load_model(config.model, task.directory, mesh, config.seed)
        objective, tx, trainable, frozen = split(config, task, model, attach_method(config, task, model, mesh))
        for multiple in (1, length):  # padded to the longest example, and to the maximum length
            states[multiple] = init_state(trainable, tx, config.seed)
            step = make_train_step(objective, tx, states[multiple])
            own = dataclasses.replace(batching(config, mesh), multiple=multiple)
            data = train_batches(config.data, task, own, config.seed)
            batches[multiple] = [sharding.shard_batch(next(data).arrays, mesh) for _ in range(STEPS)]
            used = []
            for batch in {batch["tokens"].shape: batch for batch in batches[multiple]}.values():
                sizes = step.lower(states[multiple], frozen, batch).compile().memory_analysis()  # type: ignore[attr-defined]
                used.append(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes)
                states[multiple], _ = step(states[multiple], frozen, batch)
            memory[multiple], seconds[multiple] = max(used), []
        fill = data.summary()["tokens"] / data.summary()["positions"]
        for _, multiple in itertools.product(range(ROUNDS), (1, length)):
            started = time.perf_counter()
            for batch in batches[multiple]:
                states[multiple], _ = step(states[multiple], frozen, batch)
            jax.block_until_ready(states[multiple])
            seconds[multiple].append(time.perf_counter() - started)
    ratio = statistics.median(one / other for one, other in zip(seconds[1], seconds[length], strict=True))
    found = " or ".join(str(size) for size in sorted({batch["tokens"].shape[-1] for batch in batches[1]}))
    print(
        f"{name}, {config.train.batch_size} x {length} tokens, {fill:.0%} of them real: padded to {found} tokens, a step takes "
        f"{ratio:.2f} of the time and {memory[1] / memory[length]:.2f} of the memory"
    )


def main() -> None:
    print(f"{jax.devices()[0].device_kind}, relative to steps of batches padded to data.max_length")
    with tempfile.TemporaryDirectory() as root:
        labels = {"task__kind": "classification", "task__labels": ("no", "yes"), "data__prompt_template": "{text}"}
        sentences = make_config(Path(root), MINILM, (3, 24), train__batch_size=32, data__max_length=128, **labels)
        measure("Sentences, MiniLM-L6", sentences)
        instructions = make_config(Path(root), SMOLLM2, (20, 60), train__batch_size=2, data__max_length=512)
        measure("Instructions, SmolLM2-135M", instructions)


if __name__ == "__main__":
    main()
