"""The train step of `peftjax train` on a random batch, for several benchmarks."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peftjax import sharding
from peftjax.core import cli, variables
from peftjax.io.hf_files import find_model
from peftjax.models.base import LanguageModel
from peftjax.tasks import Task, make_task
from peftjax.training.config import Config
from peftjax.training.population_step import make_gradients, make_update, own_leaves, shared_leaves
from peftjax.training.setup import attach_method
from peftjax.training.split import split
from peftjax.training.step import init_state, jit_options, make_train_step

DOCUMENTS = 4  # in each packed row
cli.running = True  # commands do not import torch


def model_directory(root: Path, sizes: Mapping[str, Any]) -> Path:
    """A directory with this config.json and the tokenizer of the bundled model, without weights: for model.init="random"."""
    root.mkdir(parents=True)
    for file in find_model("embedded").glob("tokenizer*"):
        shutil.copy(file, root)
    (root / "config.json").write_text(json.dumps(sizes))
    return root


class Step:
    """The step of a config, its state and a batch of random tokens without padding.

    Args:
        config: The config; its dtype is not "auto". The number of rows is train.batch_size, their length
            data.max_length.
    """

    def __init__(self, config: Config) -> None:
        mesh = sharding.make_mesh(config.mesh.sizes)
        jax.set_mesh(mesh)
        task = make_task(config.task, config.data, find_model(config.model.path), config.train.loss_chunk)
        self.model = model = task.load_model(config.model, task.directory, mesh, config.seed)
        assert isinstance(model, LanguageModel)
        method = attach_method(config, task, model, mesh)
        self.objective, self.tx, trainable, self.frozen = split(config, task, model, method)
        self.state = init_state(trainable, self.tx, config.seed)
        variables.update(model, self.state.trainable)  # as train.py: the state holds copies, so let go of the originals
        self.step = make_train_step(self.objective, self.tx, self.state)
        rows = random_rows(task, config.train.batch_size, model.config.vocab)
        self.batch = sharding.shard_batch(rows, mesh, config.train.accumulate)

    def run(self, count: int = 1) -> float:
        """Take a number of steps and wait for the last one; returns its loss."""
        for _ in range(count):
            self.state, metrics = self.step(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])

    def compiled_bytes(self) -> int:
        """The bytes of arguments, temporaries and outputs on each device according to the compiler."""
        compiled = self.step.lower(self.state, self.frozen, self.batch).compile()  # type: ignore[attr-defined]
        sizes = compiled.memory_analysis()
        kept = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + kept


class PopulationStep(Step):
    """The step of several runs of a sweep with the same config, on batches of the same random tokens."""

    def __init__(self, config: Config, runs: int) -> None:
        super().__init__(config)
        self.shared = shared_leaves(self.model, self.frozen)
        self.own = [own_leaves(self.model, self.frozen)] * runs
        self.states = [init_state(self.state.trainable, self.tx, seed) for seed in range(runs)]
        options = jit_options(self.state)
        self.gradients = jax.jit(make_gradients(self.objective), compiler_options=options["compiler_options"])
        self.update = jax.jit(make_update(self.tx, {}), donate_argnums=0, **options)

    def run(self, count: int = 1) -> float:
        """Take a number of steps and wait for the last one; returns the loss of the last run."""
        for _ in range(count):
            inputs = [state._replace(optimizer=()) for state in self.states]
            gradients = self.gradients(inputs, self.shared, self.own, [self.batch] * len(inputs))
            results = [self.update(state, gradients, index) for index, state in enumerate(self.states)]
            self.states = [state for state, _ in results]
        jax.block_until_ready(self.states)
        return float(results[-1][1]["loss"])


def random_rows(task: Task, rows: int, vocab: int) -> dict[str, np.ndarray]:
    """A batch [rows, T] in which every token predicts the next one; packed rows hold `DOCUMENTS` documents of equal length."""
    shapes = task.row_shapes()
    length = shapes["tokens"].shape[0]
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, length), np.int32)
    size = -(-length // DOCUMENTS) if "segments" in shapes else length
    place = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    weights = ((place + 1) % size != 0) & (place < length - 1)
    arrays = {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "loss_weights": weights.astype(np.float32)}
    if "segments" in shapes:
        arrays |= {"positions": place % size, "segments": place // size + 1}
    return arrays
