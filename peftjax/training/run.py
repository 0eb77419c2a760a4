"""A run that is set up: resuming, logging, evaluating, saving, and writing the result."""

import collections
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.adapters.method import Method
from peftjax.core import variables
from peftjax.core.errors import NotFiniteError
from peftjax.core.files import write_atomically
from peftjax.core.units import format_bytes
from peftjax.data.batches import Batches, HostBatch, eval_batches, eval_prompts
from peftjax.io.adapter_save import save_adapter
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_files import enumerate_some
from peftjax.io.save import save_model
from peftjax.log import METRICS, Log, read_metrics
from peftjax.methods import make_config
from peftjax.models.base import Model
from peftjax.report.data import ReportData, Sample, count_parts, count_trained, tree_bytes, versions
from peftjax.report.outcome import concern
from peftjax.report.page import write_report
from peftjax.tasks import Task
from peftjax.training import answers, duration, optim, precision, start_from
from peftjax.training import config as configs
from peftjax.training.card import write_card
from peftjax.training.config import Config
from peftjax.training.due import Due
from peftjax.training.evaluation import evaluate, make_eval_step
from peftjax.training.setup import batching, raise_if_different
from peftjax.training.split import Parts
from peftjax.training.step import TrainState, flatten
from peftjax.training.window import Window


class Run:
    """A run that is set up.

    Attributes:
      config, workdir, mesh, task, batches, method, model: What it is made of. The model is in evaluation mode; its
        trainable leaves are those of a state as of the last `sync`, and are invalid after the next step.
      frozen: The frozen leaves by path.
      base: The fingerprint of the base.
      due: What is due after which step.
      schedule: The learning rate by step.
      eval_step: The jitted evaluation step.
      window: The steps since the last line of the log.
      planned: The number of steps for which the run was planned when it saved the checkpoint that it resumes from.
      report: What the report shows beside the config and the metrics.
      timings: Seconds by what they were spent on.
    """

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Mesh,
        task: Task,
        batches: Batches,
        method: Method,
        model: Model,
        parts: Parts,
        base: str,
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.task, self.batches, self.method, self.model = task, batches, method, model
        self.frozen, self.base = parts.frozen, base
        self.due = Due(config)
        self.schedule = optim.make_schedule(config.optim, config.train.steps)
        self.eval_step = make_eval_step(variables.flat(model)[0], task, mesh)
        self.window = Window(task.unit)
        self.planned = config.train.steps
        self.report = ReportData()
        self.timings: dict[str, float] = collections.defaultdict(float)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the run that wrote it."""
        return {"config": json.loads(configs.to_json(self.config)), "base": self.base}

    def resume(self, state: TrainState, checkpoints: Checkpoints) -> TrainState:
        """The state of the newest intact checkpoint, with the data at its position; else `state`.

        Raises:
          UserError: The checkpoint belongs to another base.
        """
        if (identity := checkpoints.identity()) is not None and identity["base"] != self.base:
            prints = f"fingerprint {self.base} here, {identity['base']} there"
            raise_if_different(self.workdir, [f"the base model's weights: {prints}"])
        abstract = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flatten(state).items()
        }
        self.sync(state)  # the state holds copies: release the originals
        restored = checkpoints.restore(abstract)
        if restored is None:
            return state
        self.batches.set_state(restored.data_state)
        self.planned = restored.identity["config"]["train"]["steps"]
        leaves = [restored.state[name] for name in flatten(state)]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        self.sync(state)
        return state

    def sync(self, state: TrainState) -> None:
        """Write the trainable leaves of a state into the model."""
        variables.update(self.model, state.trainable)

    def shard(self, batch: HostBatch) -> Mapping[str, jax.Array]:
        """A batch on the mesh, [A, B / A, ...]."""
        return sharding.shard_batch(batch.arrays, self.mesh, self.config.train.accumulate)

    def introduce(self, state: TrainState, log: Log) -> None:
        """Print what is trained on what, and write config.json and the start of the report's data."""
        config = self.config
        self.workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_atomically(self.workdir / "config.json", configs.to_json(config) + "\n")
            if config.start_from and state.step == 0:
                start_from.keep(config, self.workdir)
        leaves = variables.flat(self.model)[1]
        parts = count_parts(leaves, self.method.trains)
        trained, base = count_trained(parts)
        default = configs.validate({"method": make_config(config.method.method).to_dict()})
        self.report = dataclasses.replace(
            ReportData.load(self.workdir) if state.step > 0 else self.report,
            parts=parts,
            optimizer_bytes=tree_bytes(state.optimizer),
            versions=versions(),
            default_config=json.loads(configs.to_json(self._resolved(default))),
        )
        shape = " x ".join(f"{size} {axis}" for axis, size in self.mesh.shape.items() if size > 1) or "1 device"
        dtype = config.model.param_dtype or config.model.dtype
        log.message(f"{config.model.path}: {base:,} parameters in {dtype}, on {shape}")
        log.message(f"{config.method.method}: {trained:,} trainable parameters, {trained / base:.2%} of the base")
        if uneven := sharding.undivided(leaves, self.mesh):
            more = sum(tree_bytes(leaves[path].get_value()) * part for path, part in uneven.items())
            log.message(
                f"not divisible by the mesh, {format_bytes(more)} more per device: {enumerate_some(list(uneven), 4)}"
            )
        if log.prints:  # with packing, records are tokenized for it
            log.message(duration.describe(config, self.task, self.batches))
        if config.start_from and state.step == 0:
            log.message(start_from.describe(config))
        if state.step > 0:
            log.message(f"resuming after step {int(state.step)} of {config.train.steps}")
        if self.planned < config.train.steps:
            log.message(optim.describe_extension(config.optim, self.planned, config.train.steps, int(state.step)))

    def _resolved(self, default: Config) -> Config:
        """The default config with what it stands for in this run: the report shows which values of the run differ."""
        same = dataclasses.replace(default, train=dataclasses.replace(default.train, steps=self.config.train.steps))
        resolved = precision.resolve(duration.in_steps(same, lambda: 0), self.task.hf_config)
        return dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, steps=default.train.steps))

    def log_step(self, step: int, log: Log, *, stopping: bool) -> None:
        """Check the steps since the last check, if a line of the log or a checkpoint is due, and write the line.

        Raises:
          NotFiniteError: The loss or the gradient norm is not finite.
        """
        if self.due.log(step) or self.due.save(step) or stopping:
            numbers = self.window.close()
            if self.due.log(step):
                log.step(step, numbers | {"learning_rate": float(self.schedule(step - 1))})

    def save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step; every process must call this method after every step."""
        return self.due.save(step) or self.due.save_by_time(step)

    def save(
        self, state: TrainState, step: int, scores: Mapping[str, float], log: Log, checkpoints: Checkpoints
    ) -> None:
        """Save a checkpoint, and with checkpoint.adapter the adapter."""
        score = -scores["eval_loss"] if scores else None
        log.sync()  # a run that resumes from this checkpoint keeps the lines up to it
        checkpoints.save(step, flatten(state), self.batches.get_state(), score=score, identity=self.identity)
        self.due.saved()
        if self.config.checkpoint.adapter and step < self.config.train.steps:
            self.write_result(state)
        self.window.reopen()

    def evaluate(self, state: TrainState, log: Log) -> dict[str, float]:
        """The logged metrics on held-out records, with sample answers for the report; empty without held-out data.

        Raises:
          NotFiniteError: The loss is not finite before any training.
        """
        config, step = self.config, int(state.step)
        if not config.data.eval:
            return {}
        started = time.perf_counter()
        batches = eval_batches(config.data, self.task, batching(config, self.mesh))
        some = itertools.islice(batches, config.train.eval_batches or None)
        scores = evaluate(self.eval_step, self.task, state.trainable, self.frozen, some, self.mesh)
        if step == 0 and not math.isfinite(scores["eval_loss"]):
            raise NotFiniteError(
                f"step 0: eval_loss is {scores['eval_loss']} before any training, so the cause is the base model, not the "
                f"learning rate; set model.dtype='float32', or use another checkpoint than {config.model.path}"
            )
        found = self._answers(state)
        scored = config.eval.exact_match > 0
        if scored:
            scores |= answers.score(found, config.eval.metrics)
        shown = found[: config.eval.samples]
        samples = tuple(
            Sample(item.record, item.prompt, item.answer, item.expected, item.correct if scored else None)
            for item in shown
        )
        if step:
            self.report = dataclasses.replace(self.report, after=samples)
        else:
            self.report = dataclasses.replace(self.report, before=samples)
        self.timings["evaluation"] += time.perf_counter() - started
        self.save_report()  # a resumed run cannot answer as the untrained model any more
        log.evaluation(step, scores)
        for item in shown if step in (0, config.train.steps) else ():
            log.message(f"  {item.line(scored)}")
        return scores

    def _answers(self, state: TrainState) -> list[answers.Answer]:
        config = self.config
        count = config.eval.exact_match or config.eval.samples
        if not count:
            return []
        self.sync(state)
        prompts = eval_prompts(config.data, self.task, count)
        return answers.answer(self.model, prompts, self.task.tokenizer, config.eval.max_new_tokens)

    def save_report(self) -> None:
        """Write report.json, from one process."""
        if jax.process_index() == 0:
            self.report.save(self.workdir)

    def write_result(self, state: TrainState) -> Path:
        """Write the adapter with its model card, or in full fine-tuning the model; returns its directory."""
        self.sync(state)
        if self.method.trains is nnx.Param:
            save_model(self.model, self.workdir / "model", source=self.task.directory)
            return self.workdir / "model"
        directory = save_adapter(self.model, self.workdir / "adapter", base=self.config.model.path)
        if jax.process_index() == 0:
            parts = count_parts(variables.flat(self.model)[1], self.method.trains)
            write_card(directory, self.config, self.task, self.workdir, int(state.step), parts)
        return directory

    def finish(self, state: TrainState, log: Log) -> None:
        """Write the result and the report, and print where they are."""
        result = self.write_result(state)
        log.sync()
        size = sum(file.stat().st_size for file in result.glob("*.safetensors"))
        self.report = dataclasses.replace(
            self.report, adapter_file_bytes=size if result.name == "adapter" else 0, timings=dict(self.timings)
        )
        self.save_report()
        log.message(self.batches.summary_text())
        log.message(f"{result}: {format_bytes(size)}")
        if jax.process_index() == 0:
            log.message(f"{write_report(self.workdir)}")
            if why := concern(read_metrics(self.workdir / METRICS)):
                log.message(f"warning: {why}")
