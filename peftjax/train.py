"""Tune a model: load, attach a method, train what it adds, hand back an adapter that everyone can read.

    python -m peftjax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.optim.learning_rate=1e-4]

Run again in the same workdir, it goes on where it was, bit for bit.
"""

import collections
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from peftjax import adapters, methods, sharding
from peftjax import log as metrics
from peftjax.core import cli, distributed, variables
from peftjax.core import config as configs
from peftjax.core.files import write_atomically
from peftjax.core.fingerprint import fingerprint
from peftjax.core.units import format_bytes
from peftjax.data.batches import eval_batches, eval_examples, train_batches
from peftjax.data.rows import Rows, load_rows
from peftjax.io.checkpoint import Checkpoints
from peftjax.io.hf_adapter import save_adapter
from peftjax.io.hf_files import enumerate_some, resolve
from peftjax.io.load import load_kernels
from peftjax.io.save import save_model
from peftjax.report import data as report
from peftjax.report.page import write_report
from peftjax.tasks import base as tasks
from peftjax.training import optim
from peftjax.training.evaluation import Outputs, answer, answer_scores, held_out_scores, make_eval_step
from peftjax.training.step import Step, TrainState, first_state, flatten, prepare

# Sections and fields that may differ between a run and its resumption: they change nothing that is computed, the mesh
# nothing but its rounding.
FREE = ("checkpoint.", "data.workers", "data.tfds_data_dir", "eval.samples", "mesh.")


class NotFiniteError(ValueError):
    """The loss or the gradient of a run is not finite any more."""


class Window:
    """The steps since the last look at them. Looking waits for the device, so it is done for several steps at once."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, jax.Array], Any]] = []
        self.tokens = 0  # or images
        self.reopen()

    def reopen(self) -> None:
        """Count the time from now on."""
        self.opened = time.perf_counter()

    def add(self, step: int, measured: dict[str, jax.Array], batch: Any) -> None:
        """Remember a step that was started."""
        self.steps.append((step, measured, batch))
        self.tokens += batch.real_tokens

    def close(self) -> dict[str, float]:
        """The last step's numbers and the speed over all of them.

        Raises:
            NotFiniteError: a loss or a gradient norm is; names the first such step and its records.
        """
        for step, measured, batch in self.steps:
            numbers = {name: float(value) for name, value in jax.device_get(measured).items()}
            if bad := [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]:
                raise NotFiniteError(
                    f"step {step}: {bad[0]} is {numbers[bad[0]]}. Records of its batch: {', '.join(batch.records)}. "
                    "No checkpoint was written since; lower optim.learning_rate, look at these records, or set optim.clip_norm"
                )
        speed = self.tokens / (time.perf_counter() - self.opened)
        unit = "images" if "pixels" in batch.arrays else "tokens"
        self.steps, self.tokens = [], 0
        self.reopen()
        return numbers | {f"{unit}_per_second": speed}


@dataclasses.dataclass
class Run:
    """What is set up once for a training."""

    config: Any
    workdir: Path
    mesh: Mesh
    base: Path  # the base model's directory
    base_fingerprint: str
    rows: Rows
    batches: Any
    method: adapters.Method
    model: Any  # in evaluation; its trainable leaves are a state's as of the last `sync`, gone with the next step
    frozen: variables.FlatTree
    schedule: optax.Schedule
    train_step: Step
    eval_step: Callable[..., Outputs]
    window: Window = dataclasses.field(default_factory=Window)
    report_data: report.ReportData = dataclasses.field(default_factory=report.ReportData)
    timings: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))

    def sync(self, state: TrainState) -> None:
        """Write what is trained into the model."""
        variables.update(self.model, state.trainable)

    def save_report_data(self) -> None:
        """Write report.json, from one process."""
        if jax.process_index() == 0:
            self.report_data.save(self.workdir)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the run that wrote it."""
        return {"config": json.loads(configs.to_json(self.config)), "base": self.base_fingerprint}


def train(config: Any, workdir: Path) -> dict[str, float]:
    """Run the training that `config` describes in `workdir`, from its newest checkpoint if there is one.

    Returns the last evaluation's scores.

    Raises:
        ValueError: the config does not fit the model, the data, or the run that the workdir holds; or the loss or the
            gradient is not finite any more.
    """
    check_workdir(workdir)
    tasks.check(config)
    mesh = sharding.make_mesh(config.mesh)
    checkpoints = make_checkpoints(config, workdir)
    with jax.set_mesh(mesh), checkpoints, distributed.Preemption() as preemption:
        require_same_config(config, workdir, checkpoints)  # before a model is loaded for nothing
        run, state = setup(config, workdir, mesh)
        state = resume(run, state, checkpoints)
        start, steps = int(state.step), config.train.steps
        train_step = run.train_step.jitted(state)
        with metrics.Log(workdir, total_steps=steps, resume_step=start, enabled=jax.process_index() == 0) as log:
            introduce(run, state, log)
            scores = {} if start else evaluate(run, state, log)
            run.window.reopen()
            for step in range(start + 1, steps + 1):
                batch = next(run.batches)
                state, measured = train_step(state, run.frozen, shard(run, batch))
                run.window.add(step, measured, batch)
                stopping = preemption.reached()
                log_step(run, step, log, stopping=stopping)
                scores = keep(run, state, step, log, checkpoints, stopping=stopping) or scores
                if stopping and step < steps:
                    checkpoints.wait()
                    raise preempted(step, steps)
            checkpoints.wait()
            finish(run, state, log)
    return scores


def make_checkpoints(config: Any, workdir: Path) -> Checkpoints:
    """Those of the run in a workdir."""
    return Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best)


def preempted(step: int, steps: int) -> distributed.Preempted:
    """What to raise when all is saved."""
    return distributed.Preempted(
        f"stopped by SIGTERM after step {step} of {steps}, which is saved; the same command goes on"
    )


def log_step(run: Run, step: int, log: metrics.Log, *, stopping: bool) -> None:
    """Look at the steps since the last look, where a line in the log or a checkpoint is due, and write the line.

    Raises:
        NotFiniteError: the loss or the gradient is not finite any more.
    """
    if logging(run.config, step) or saving(run.config, step, stopping):
        numbers = run.window.close()
        if logging(run.config, step):
            log.step(step, numbers | {"learning_rate": float(run.schedule(step - 1))})


def keep(
    run: Run, state: TrainState, step: int, log: metrics.Log, checkpoints: Checkpoints, *, stopping: bool
) -> dict[str, float]:
    """The evaluation and the checkpoint that are due after a step; returns the scores, empty without an evaluation."""
    scores = evaluate(run, state, log) if evaluating(run.config, step) else {}
    if saving(run.config, step, stopping):
        score = -scores["eval_loss"] if scores else None
        checkpoints.save(step, flatten(state), run.batches.get_state(), score=score, identity=run.identity)
        if run.config.checkpoint.adapter and step < run.config.train.steps:
            write_result(run, state)
        run.window.reopen()
    return scores


def logging(config: Any, step: int) -> bool:
    return step == config.train.steps or due(step, config.train.log_every)


def evaluating(config: Any, step: int) -> bool:
    return step == config.train.steps or due(step, config.train.eval_every)


def saving(config: Any, step: int, stopping: bool) -> bool:
    return stopping or evaluating(config, step) or due(step, config.checkpoint.every)


def check_workdir(workdir: Path) -> None:
    """Raises a ValueError if the workdir can be neither made nor written: now, and not after an hour of loading."""
    place = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "may not be written" if place.is_dir() else "is a file"
        raise ValueError(f"--workdir={workdir}: {place} {why}; name a directory that can be made or written")


def setup(config: Any, workdir: Path, mesh: Mesh, model: Any = None) -> tuple[Run, TrainState]:
    """Everything that a run needs before its first step, and the state it starts from. model: its base, which gets the
    adapters, where it is loaded already."""
    base = resolve(config.model.path, config.model.revision)
    rows = load_rows(config, base)
    method = methods.from_config(config.method)
    if rows.tokenizer is not None:
        method = method.tokenized(rows.tokenizer.encode)
    processes = sharding.batch_share(mesh)
    batches = train_batches(config, rows, **processes)
    if config.data.eval:  # opened again at each evaluation; here, so that what is wrong with it is told at once
        eval_batches(config, rows, **processes).close()
    if model is None:
        model = tasks.load_base(config, base, rows.labels, mesh)
    base_fingerprint = fingerprint({path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()})
    adapters.attach(
        model,
        method,
        rngs=nnx.Rngs(config.seed),
        batches=first_batches(config, rows, method, mesh),
        kernels=load_kernels(base, model) if method.unquantized else None,
    )
    tasks.check_length(config, model, mesh)
    sharding.place(model, mesh)

    task, chunk = tasks.of(config), config.train.loss_chunk
    model.train()
    step, state, frozen = prepare(config, model, method, task.totals(chunk), partial(first_state, seed=config.seed))
    model.eval()
    eval_graph, _ = variables.flat(model)
    run = Run(
        config=config, workdir=workdir, mesh=mesh, base=base, base_fingerprint=base_fingerprint, rows=rows,
        batches=batches, method=method, model=model, frozen=frozen,
        schedule=optim.make_schedule(config.optim, config.train.steps),
        train_step=step, eval_step=make_eval_step(eval_graph, task, chunk, mesh),
    )  # fmt: skip
    run.sync(state)  # the state holds copies: let go of the originals
    return run, state


def first_batches(config: Any, rows: Rows, method: adapters.Method, mesh: Mesh) -> Any:
    """The batches [B, ...] that the method begins with, the first of the training; None where it needs none."""
    if not method.data:
        return None
    batches = train_batches(config, rows, **sharding.batch_share(mesh))
    shown = (sharding.shard_batch(batch.arrays, mesh) for batch in batches)
    return ({key: value[0] for key, value in batch.items()} for batch in itertools.islice(shown, method.data))


def require_same_config(config: Any, workdir: Path, checkpoints: Checkpoints) -> None:
    """Raises a ValueError that names the fields in which the run that the workdir holds was another one."""
    if (identity := checkpoints.identity()) is not None:
        differ = configs.differences(config, configs.from_json(json.dumps(identity["config"])))
        _refuse(workdir, [line for line in differ if not line.startswith(FREE)])


def _refuse(workdir: Path, differ: list[str]) -> None:
    if differ:
        raise ValueError(
            f"{workdir} holds a run with another configuration: {'; '.join(differ)}. "
            "Take another --workdir, or remove this one to start anew"
        )


def resume(run: Run, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The state of the newest intact checkpoint, with the data moved to where it was; else `state`.

    Raises:
        ValueError: the checkpoint is of another base.
    """
    if (identity := checkpoints.identity()) is not None and identity["base"] != run.base_fingerprint:
        prints = f"fingerprint {run.base_fingerprint} here, {identity['base']} there"
        _refuse(run.workdir, [f"the base model's weights: {prints}"])
    abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in flatten(state).items()}
    restored = checkpoints.restore(abstract)
    if restored is None:
        return state
    run.batches.set_state(restored.data_state)
    leaves = [restored.state[name] for name in flatten(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def evaluate(run: Run, state: TrainState, log: metrics.Log) -> dict[str, float]:
    """Scores on the held-out records, logged, with sample answers for the report; empty where the config names none."""
    config, step = run.config, int(state.step)
    if not config.data.eval:
        return {}
    started = time.perf_counter()
    batches = eval_batches(config, run.rows, **sharding.batch_share(run.mesh))
    some = itertools.islice(batches, config.train.eval_batches or None)
    scores = held_out_scores(run.eval_step, tasks.of(config), state.trainable, run.frozen, some, run.mesh)
    scored, answers = config.eval.exact_match > 0, []
    if count := config.eval.exact_match or config.eval.samples:
        run.sync(state)
        examples = eval_examples(config, run.rows, count)
        answers = answer(run.model, examples, run.rows.tokenizer, config.eval.max_new_tokens)
    if scored:
        scores |= answer_scores(answers, config.eval.metrics)
    shown = answers[: config.eval.samples]
    samples = tuple(
        report.Sample(item.record, item.prompt, item.answer, item.expected, item.correct if scored else None)
        for item in shown
    )
    if step:
        run.report_data = dataclasses.replace(run.report_data, after=samples)
    else:
        run.report_data = dataclasses.replace(run.report_data, before=samples)
    run.timings["evaluation"] += time.perf_counter() - started
    run.save_report_data()  # a resumed run cannot answer as the untrained model any more
    log.evaluation(step, scores)
    for item in shown if step in (0, config.train.steps) else ():
        log.message(f"  {item.told(scored)}")
    return scores


def shard(run: Run, batch: Any) -> dict[str, jax.Array]:
    """A batch on the mesh, [A, B / A, ...]."""
    return sharding.shard_batch(batch.arrays, run.mesh, run.config.train.accumulate)


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0: never) is to be done at this one."""
    return every > 0 and step % every == 0


def introduce(run: Run, state: TrainState, log: metrics.Log) -> None:
    """Say what will be trained on what, and write config.json and the beginning of the report's data."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    config, defaults = run.config, configs.defaults()
    defaults.method = methods.make_config(config.method.name)
    if jax.process_index() == 0:
        write_atomically(run.workdir / "config.json", configs.to_json(config) + "\n")
    leaves = variables.flat(run.model)[1]
    parts = report.count_parts(leaves, run.method.trains)
    trained = sum(part.parameters for part in parts if part.trained)
    base = sum(part.parameters for part in parts if not part.adapter)
    run.report_data = dataclasses.replace(
        report.ReportData.load(run.workdir) if state.step > 0 else run.report_data,
        parts=parts,
        optimizer_bytes=report.tree_bytes(state.optimizer),
        versions=report.versions(),
        default_config=json.loads(configs.to_json(defaults)),
    )
    shape = " x ".join(f"{size} {axis}" for axis, size in run.mesh.shape.items() if size > 1) or "1 device"
    log.message(
        f"{config.model.path}: {base:,} parameters in {config.model.param_dtype or config.model.dtype}, on {shape}"
    )
    log.message(f"{config.method.name}: trains {trained:,} parameters, {trained / base:.2%} of the base's number")
    if undivided := sharding.undivided(leaves, run.mesh):
        more = sum(report.tree_bytes(leaves[path].get_value()) * part for path, part in undivided.items())
        log.message(
            f"not divided evenly by the mesh, and therefore {format_bytes(more)} more on each device: "
            f"{enumerate_some(list(undivided), 4)}"
        )
    if state.step > 0:
        log.message(f"going on after step {int(state.step)} of {config.train.steps}")


def write_result(run: Run, state: TrainState) -> Path:
    """Write what the run is for: the adapter, or in full fine-tuning the model."""
    run.sync(state)
    if run.method.trains is nnx.Param:
        save_model(run.model, run.workdir / "model", source=run.base)
        return run.workdir / "model"
    return save_adapter(run.model, run.workdir / "adapter", base=run.config.model.path)


def finish(run: Run, state: TrainState, log: metrics.Log) -> None:
    """Write the result and the report."""
    result = write_result(run, state)
    size = sum(file.stat().st_size for file in result.glob("*.safetensors"))
    run.report_data = dataclasses.replace(
        run.report_data, adapter_file_bytes=size if result.name == "adapter" else 0, timings=dict(run.timings)
    )
    run.save_report_data()
    log.message(run.batches.summary_text())
    log.message(f"{result}: {format_bytes(size)}")
    if jax.process_index() == 0:
        log.message(f"{write_report(run.workdir)}")


def main(argv: list[str]) -> None:
    summary = "Tune a model by the config's method; goes on where it was if run again."
    options = cli.parse(argv, "train", summary, options=distributed.add_options)
    config = configs.load(options.config, options.overrides, method_defaults=methods.method_defaults)
    distributed.start(options)
    train(config, Path(options.workdir))


if __name__ == "__main__":
    cli.run(main)
