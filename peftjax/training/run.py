"""A run that is set up: resuming, logging, evaluating, saving, and writing the result."""

import collections
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.adapters.method import Method
from peftjax.core import distributed, variables
from peftjax.core.config import flat_fields
from peftjax.core.errors import NotFiniteError, UserError
from peftjax.core.files import write_atomically
from peftjax.core.listing import enumerate_some
from peftjax.core.paths import suggest
from peftjax.core.progress import EVALUATING, SAVING
from peftjax.core.units import format_bytes
from peftjax.data.batches import Batches, HeldOut, HostBatch
from peftjax.data.records import Prompt
from peftjax.io.adapter_save import write_adapter
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.save import save_model
from peftjax.log import METRICS, PLACE, Log, is_amount, read_metrics
from peftjax.models.base import Model
from peftjax.models.kernels import kernel_of
from peftjax.quant.base import Quantized
from peftjax.report.data import Answer, ReportData, count_parts, count_trained, tree_bytes
from peftjax.report.origin import origin, versions
from peftjax.report.outcome import concerns
from peftjax.report.page import write_report
from peftjax.report.text import format_duration
from peftjax.tasks import Task
from peftjax.tasks.best import best_evaluation, out_of_patience
from peftjax.tasks.prompt_format import PromptFormat, save_chat_template
from peftjax.trackers.base import Tracking
from peftjax.training import answers, card, duration, moved, optim, predictions, start_from
from peftjax.training import config as configs
from peftjax.training.abstract import abstract_batch
from peftjax.training.compile_ahead import CompileAhead
from peftjax.training.config import Config
from peftjax.training.defaults import default_values
from peftjax.training.due import Due
from peftjax.training.evaluation import Evaluation, counted, evaluate, make_eval_step
from peftjax.training.hooks import Hooks
from peftjax.training.resume import raise_if_different
from peftjax.training.sections import CheckpointConfig
from peftjax.training.setup import batching
from peftjax.training.split import Parts
from peftjax.training.step import TrainState, abstract_like, abstract_state, flatten, init_state, unflatten
from peftjax.training.window import Window


class Measured(NamedTuple):
    """An evaluation of a state, made together with the evaluations of other runs.

    Attributes:
        evaluation: The loss and metrics on held-out records.
        answers: The answers to prompts, or the error if the logits are not finite.
    """

    evaluation: Evaluation
    answers: list[Answer] | NotFiniteError


class Run:
    """A run that is set up.

    Attributes:
        config, workdir, mesh, task, batches, method, model: Its parts. The model is in evaluation mode. Its trainable
            leaves belong to the state that was last given to `sync`, and are invalid after the next step.
        frozen: The frozen leaves by path.
        base: The fingerprint of the base.
        hooks: What a Python program adds to the config.
        due: What is due after which step.
        schedule: The learning rate by step.
        eval_step: The jitted evaluation step.
        window: The steps since the last line of the log.
        planned: The number of steps for which the run was planned when it saved the checkpoint that it resumes from.
        evaluations: The evaluations so far, as lines of metrics.jsonl.
        report: The report's data other than the config and the metrics.
        timings: Seconds by activity.
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
        hooks: Hooks,
    ) -> None:
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.task, self.batches, self.method, self.model = task, batches, method, model
        self.frozen, self.base, self.hooks = parts.frozen, base, hooks
        self.due = Due(config)
        self.schedule = optim.make_schedule(config.optim, config.train.steps)
        self.eval_step = make_eval_step(variables.flat(model)[0], task, mesh)
        self.window = Window(task.unit)
        self.planned = config.train.steps
        self.evaluations: list[dict[str, Any]] = []
        self.report = ReportData()
        self.timings: dict[str, float] = collections.defaultdict(float)
        self._reported = False  # whether the number of truncated and dropped held-out records was printed

    @property
    def identity(self) -> dict[str, Any]:
        """The config, the base's fingerprint, and the checksums of records in the workdir, which checkpoints record."""
        return {"config": json.loads(configs.to_json(self.config)), "base": self.base, "records": self._records}

    @functools.cached_property
    def _records(self) -> dict[str, str]:
        return moved.checksums(self.config, self.workdir)

    @property
    def out_of_patience(self) -> bool:
        """Whether train.patience evaluations in a row were no better than an earlier one."""
        config = self.config
        return out_of_patience(self.evaluations, config.checkpoint.best_score, config.train.patience)

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the result's evaluation, or else of the last evaluation; empty if there was none."""
        line = self._best if self.config.checkpoint.export == "best" else None
        line = line or (self.evaluations[-1] if self.evaluations else {})
        return {name: value for name, value in line.items() if name not in PLACE}

    @property
    def _best(self) -> Mapping[str, Any] | None:
        """The best evaluation so far."""
        return best_evaluation(self.evaluations, self.config.checkpoint.best_score)

    def tracking(self, *, sweep: bool = False, required: bool = True) -> Tracking:
        """What trackers show of the run. The runs of a sweep form a group, each under the name of its directory."""
        log, workdir = self.config.log, self.workdir.absolute()
        own, given = workdir.name, log.run_name
        name, group = (own, given or workdir.parent.name) if sweep else (given or own, "")
        return Tracking(log.trackers, log.project, name, group, flat_fields(configs.to_dict(self.config)), required)

    @functools.cached_property
    def held_out(self) -> HeldOut:
        """The records of data.eval."""
        return HeldOut(self.config.data, self.task)

    def resume(
        self, trainable: variables.FlatTree, tx: optax.GradientTransformation, checkpoints: Checkpoints
    ) -> TrainState:
        """The state of the newest intact checkpoint, with the data at its position; else the state before the first step.

        The model then has the trainable leaves of this state.

        Raises:
            UserError: The checkpoint belongs to another base.
        """
        if (identity := checkpoints.identity()) is not None and identity["base"] != self.base:
            prints = f"fingerprint {self.base} here, {identity['base']} there"
            raise_if_different(self.workdir, [f"the base model's weights: {prints}"])
        abstract = abstract_state(trainable, tx)  # a second state beside the restored one might not fit the memory
        if (restored := checkpoints.restore(flatten(abstract))) is None:
            state = init_state(trainable, tx, self.config.seed)
        else:
            self.batches.set_state(moved.data_state(restored.data_state, restored.identity, self.workdir))
            if left := self.config.train.steps - restored.step:
                self.batches.preview(left)
            self.planned = restored.identity["config"]["train"]["steps"]
            self.evaluations = distributed.on_first(lambda: self._logged_evaluations(restored.step))
            state = unflatten(abstract, restored.state)
        self.sync(state)
        return state

    def _logged_evaluations(self, step: int) -> list[dict[str, Any]]:
        """The evaluations up to a step in the log of the run; none if the log is missing."""
        log = self.workdir / METRICS
        lines = read_metrics(log, last=step) if log.exists() else []
        return [line for line in lines if line["kind"] == "eval"]

    def sync(self, state: TrainState) -> None:
        """Write the trainable leaves of a state into the model."""
        variables.update(self.model, state.trainable)

    def shard(self, batch: HostBatch) -> Mapping[str, jax.Array]:
        """A batch on the mesh, [A, B / A, ...]."""
        return sharding.shard_batch(batch.arrays, self.mesh, self.config.train.accumulate)

    def compile_ahead(self, step: Callable[..., Any], state: TrainState, log: Log) -> CompileAhead:
        """The jitted step (state, frozen, batch), compiled ahead for the next batches."""
        batches = [abstract_batch(self.config, row, self.mesh) for row in self.batches.ahead]
        return CompileAhead(step, self.mesh, (state, self.frozen), batches, log.progress)

    def introduce(self, state: TrainState, log: Log) -> None:
        """Print a summary of the run, write config.json, and collect what the report says about the setup."""
        config, step = self.config, int(state.step)
        log.expect([each for each in range(1, config.train.steps + 1) if self.due.eval(each)])
        self.workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_atomically(self.workdir / "config.json", configs.to_json(config))
            if config.start_from and step == 0:
                start_from.keep(config, self.workdir)
        leaves = variables.flat(self.model)[1]
        self.report = dataclasses.replace(
            ReportData.load(self.workdir) if step > 0 else self.report,
            parts=count_parts(leaves, self.method.trains),
            optimizer_bytes=tree_bytes(state.optimizer),
            loss_unit=self.task.loss_unit,
            origin=origin(self.workdir),
            versions=versions(),
            default_config=default_values(config, self.task.hf_config),
        )
        for text in self._describe(leaves, step, log):
            log.message(text)

    def _describe(self, leaves: Mapping[str, nnx.Variable], step: int, log: Log) -> Iterator[str]:
        config, (trained, base) = self.config, count_trained(self.report.parts)
        shape = " x ".join(f"{size} {axis}" for axis, size in self.mesh.shape.items() if size > 1) or "1 device"
        dtype = config.model.param_dtype or config.model.dtype
        loaded = f", loaded in {format_duration(self.model.origin.seconds)}" if self.model.origin else ""
        formats = {type(value).__name__ for leaf in leaves.values() if isinstance(value := leaf.get_value(), Quantized)}
        kernels = "".join(f", kernels in {name.lower()}" for name in sorted(formats))
        yield f"{config.model.path}: {base:,} parameters in {dtype}{kernels}, on {shape}{loaded}"
        yield f"{config.method.method}: {trained:,} trainable parameters, {trained / base:.2%} of the base"
        if config.model.attention == "auto" and self.model.chooses_attention:
            length = self.task.positions(self.model) + self.model.virtual
            with jax.set_mesh(self.mesh):
                kernel = kernel_of(self.model, length, packed=config.data.pack, padded=self.task.pads)
            yield f"attention: {kernel} for {length:,} positions (model.attention='auto')"
        yield from self._describe_mesh(leaves)
        if log.prints:  # with packing, this tokenizes records
            yield duration.describe_length(config, self.task, self.batches)
        if padding := self.batches.padding_text():
            yield padding
        if too_long := self.batches.too_long_text():
            yield too_long
        if config.start_from and step == 0:
            yield start_from.describe_start(config)
        if step > 0:
            yield f"resuming after step {step} of {config.train.steps}"
        if self.planned < config.train.steps and not self.hooks.optimizer:
            yield optim.describe_extension(config.optim, self.planned, config.train.steps, step)

    def _describe_mesh(self, leaves: Mapping[str, nnx.Variable]) -> Iterator[str]:
        """The parameters and rows that the mesh does not divide and therefore replicates, as messages."""
        if uneven := sharding.undivided(leaves, self.mesh):
            more = sum(tree_bytes(leaves[path].get_value()) * part for path, part in uneven.items())
            names = enumerate_some(list(uneven), 4)
            yield f"parameters that cannot be split evenly over the mesh need another {format_bytes(more)} per device: {names}"
        rows = self.config.train.batch_size // self.config.train.accumulate
        if warning := sharding.uneven_rows(rows, self.mesh.shape):
            yield warning

    def steps_after(self, done: int) -> Iterator[int]:
        """The steps to train after the first `done` ones, until the last one or until the run is out of patience."""
        for step in range(done + 1, self.config.train.steps + 1):
            if self.out_of_patience:
                return
            yield step

    def log_step(self, step: int, log: Log, *, stopping: bool) -> None:
        """Count a step. If a line of the log or a checkpoint is due, check the steps since the last check, and write the line.

        Raises:
            NotFiniteError: The loss or the gradient norm is not finite.
        """
        log.advance(step)
        if self.due.log(step) or self.due.save(step) or stopping:
            numbers = self.window.close()
            if self.due.log(step):
                rate = {} if self.hooks.optimizer else {"learning_rate": float(self.schedule(step - 1))}
                log.step(step, numbers | rate)

    def save_is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after a step; every process must call this method after every step."""
        return self.due.save(step) or self.due.save_by_time(step)

    def save(
        self, state: TrainState, step: int, scores: Mapping[str, float], log: Log, checkpoints: Checkpoints
    ) -> None:
        """Save a checkpoint, and with checkpoint.adapter the adapter."""
        config = self.config.checkpoint
        score = config.score(scores)
        log.sync()  # a run that resumes from this checkpoint keeps the lines up to it
        with log.progress.phase(SAVING):
            checkpoints.save(step, flatten(state), self.batches.get_state(), score=score, identity=self.identity)
            self.due.saved()
            if config.adapter and step < self.config.train.steps and self._may_be_result(step):
                self.write_result(state)
        self.window.reopen()

    def evaluate(self, state: TrainState, log: Log, measured: Measured | None = None) -> dict[str, float]:
        """The logged metrics on held-out records, with sample answers for the report; empty without held-out data.

        `measured` is the evaluation of this state if it was made already.

        Raises:
            NotFiniteError: The loss is not finite before any training, or the logits after a prompt are not.
        """
        step, started = int(state.step), time.perf_counter()
        with log.progress.phase(EVALUATING):
            scores, shown, reported = self._held_out(state, log, measured) if self.config.data.eval else ({}, [], {})
            if self.hooks.on_evaluate:
                self.sync(state)
                scores |= distributed.gather(self.hooks.scores(self.model, step, scores))[0]
            self.timings["evaluation"] += time.perf_counter() - started
            self._check_best_score(scores)
            if not scores:
                return {}
            self.evaluations.append({"step": step, "kind": "eval", **scores})
            if step == 0 or self._may_be_result(step):
                self.report = dataclasses.replace(self.report, **reported)
            self.save_report()  # a resumed run no longer has the untrained model
            log.evaluation(step, scores)
            if shown and step in (0, self.config.train.steps):
                log.panel(f"samples at step {step}", answers.answers_table(shown, self.config.eval.marks_answers))
        return scores

    def _check_best_score(self, scores: Mapping[str, float]) -> None:
        """Raises a UserError if the score that decides about the result or the end of the run is not among these."""
        checkpoint, patience = self.config.checkpoint, self.config.train.patience
        name, default = checkpoint.best_score, CheckpointConfig().best_score
        if name in scores or (name == default and checkpoint.export == "last" and not patience):
            return
        if not scores:
            field = f"train.patience={patience}" if patience else f"checkpoint.export={checkpoint.export!r}"
            raise UserError(f"{field} requires evaluations; set data.eval")
        raise UserError(
            f"checkpoint.best_score={name!r} is not a score of this run.{suggest(name, scores)} Its scores: "
            f"{', '.join(each for each in scores if not is_amount(each))}"
        )

    def _may_be_result(self, step: int) -> bool:
        """Whether the weights after this step, which is the latest, are the result if the run ends here."""
        return self.config.checkpoint.export == "last" or (self._best is not None and self._best["step"] == step)

    def held_out_batches(self, log: Log) -> Iterator[HostBatch]:
        """The batches of an evaluation, with a bar that counts them."""
        batches = self.held_out.batches(batching(self.config, self.mesh))
        reported, self._reported = self._reported, True
        return counted(batches, self.config.train.eval_batches, log.progress, reported=reported)

    def _held_out(
        self, state: TrainState, log: Log, measured: Measured | None
    ) -> tuple[dict[str, float], list[Answer], dict[str, Any]]:
        """The metrics on held-out records, the sample answers, and what the report shows of this evaluation."""
        config, step = self.config, int(state.step)
        if measured is None:
            batches = self.held_out_batches(log)
            evaluation = evaluate(self.eval_step, self.task, state.trainable, self.frozen, batches, self.mesh)
        else:
            evaluation = measured.evaluation
        scores = evaluation.scores
        if step == 0 and not math.isfinite(scores["eval_loss"]):
            raise NotFiniteError(
                f"step 0: eval_loss is {scores['eval_loss']} before any training, so the cause is the base model, not the "
                f"learning rate; set model.dtype='float32', or use another checkpoint than {config.model.path}"
            )
        classes = predictions.summarize(self.held_out, self.task, evaluation, step)
        found = self._answers(state, log, measured)
        if config.eval.exact_match:
            scores |= answers.score(found, config.eval.metrics)
        shown = found[: config.eval.samples]
        samples = shown if config.eval.marks_answers else [dataclasses.replace(item, correct=None) for item in shown]
        return scores, shown, {"classes": classes, "after" if step else "before": tuple(samples)}

    def prompts(self) -> list[Prompt]:
        """The held-out prompts that an evaluation answers."""
        count = self.config.eval.exact_match or self.config.eval.samples
        return self.held_out.prompts(count) if count else []

    def _answers(self, state: TrainState, log: Log, measured: Measured | None) -> list[Answer]:
        if measured is None:
            if not (prompts := self.prompts()):
                return []
            self.sync(state)
            limit = self.config.eval.max_new_tokens
            return answers.answer(self.model, prompts, self.task.tokenizer, limit, log.progress)
        if isinstance(measured.answers, NotFiniteError):
            raise measured.answers
        return measured.answers

    def save_report(self) -> None:
        """Write report.json, from one process."""
        if jax.process_index() == 0:
            counts = self.batches.summary()
            self.report = dataclasses.replace(self.report, counts=counts, padding=self.batches.padding())
            self.report.save(self.workdir)

    def write_result(self, state: TrainState) -> Path:
        """Write the adapter with its model card, or in full fine-tuning the model; returns its directory."""
        self.sync(state)
        if self.method.trains_base:
            directory = self.workdir / "model"
            save_model(self.model, directory, source=self.task.directory)
        else:
            training = None
            if jax.process_index() == 0:
                parts = count_parts(variables.flat(self.model)[1], self.method.trains)
                training = card.training_summary(self.config, self.task, self.workdir, int(state.step), parts)
            base = start_from.recorded_base(self.model, self.config)
            directory = write_adapter(self.model, self.workdir / "adapter", "default", base, training)
        if self.task.generates and jax.process_index() == 0:
            PromptFormat.of(self.task.kind, self.config.data).save(directory)
            if self.config.data.chat_template:
                save_chat_template(directory, self.config.data.chat_template)
        return directory

    def finish(self, state: TrainState, log: Log, checkpoints: Checkpoints) -> Path:
        """Write the result and the report, and print where they are; returns the directory of the result."""
        config, step = self.config, int(state.step)
        if step < config.train.steps:
            log.message(self.describe_stop(step))
        with log.progress.phase(SAVING):
            if config.checkpoint.export == "best" and (best := self._best):
                if best["step"] < step:
                    state = self._restore(best["step"], state, checkpoints)
                name = config.checkpoint.best_score
                log.message(
                    f"the result has the weights of step {best['step']}, with the best {name}: {best[name]:.4g}"
                )
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
                log.message(str(write_report(self.workdir)))
                for why in concerns(read_metrics(self.workdir / METRICS, last=int(state.step)), self.report.classes):
                    log.message(f"warning: {why}")
        return result

    def describe_stop(self, step: int) -> str:
        """Why the run has ended before its last step."""
        patience, score = self.config.train.patience, self.config.checkpoint.best_score
        count = f"{patience} evaluations in a row" if patience > 1 else "an evaluation"
        return f"stopped after step {step} of {self.config.train.steps}: no better {score} in {count} (train.patience)"

    def _restore(self, step: int, state: TrainState, checkpoints: Checkpoints) -> TrainState:
        """The state of the checkpoint of a step. The memory of the given state, which was saved, is freed for it."""
        abstract = abstract_like(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        return unflatten(abstract, checkpoints.restore_step(step, flatten(abstract)).state)
