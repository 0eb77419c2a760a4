"""Train a model: load it, attach a method, train the method's parameters, and write an adapter that others can read.

    peftjax train --config=configs/quickstart.py --workdir=runs/quickstart [--config.optim.learning_rate=1e-4]

The same command in the same workdir resumes an interrupted run; the result is bit-identical to a run that was
never interrupted.
"""

import argparse
from functools import partial
from pathlib import Path

import jax

from peftjax import sharding
from peftjax.core import cli, distributed, variables
from peftjax.core import workdir as workdirs
from peftjax.core.errors import UserError
from peftjax.core.preemption import Preemption, stopped
from peftjax.io.push import check_push, push_adapter
from peftjax.log import Log
from peftjax.totals import Batch
from peftjax.training import agreement, resume, setup
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.hooks import NO_HOOKS, Hooks, Trained
from peftjax.training.profiling import Profiling, parse_steps
from peftjax.training.run import Run
from peftjax.training.split import split
from peftjax.training.step import Metrics, TrainState, accumulate, apply, jit_options, summary


def train(config: Config, workdir: Path, hooks: Hooks = NO_HOOKS, profile: range | None = None) -> Trained:
    """Run the training that a config describes, from the newest checkpoint in the workdir if there is one.

    Args:
        config: The config.
        workdir: Directory for everything that the run writes.
        hooks: What a program adds to the config.
        profile: The steps to trace.

    Returns:
        The trained model, the metrics of the last evaluation, and where the result is.

    Raises:
        UserError: The config does not fit the model, the data, or the run in the workdir; or the loss or the gradient
            is no longer finite.
    """
    agreement.check_same_configs({"": config})
    mesh = sharding.make_mesh(config.mesh.sizes)
    sharding.check_even_rows(config.train.batch_size // config.train.accumulate, mesh)
    with (
        Preemption(workdir / "checkpoints") as preemption,
        workdirs.claim(workdir, config.model.path),
        jax.set_mesh(mesh),
        resume.open_checkpoints(config, workdir) as checkpoints,
    ):
        task, data = setup.open_data(config, mesh)
        config, source = resume.resolve_config(config, task, data, workdir, checkpoints)
        setup.check_fit(config, task, data, mesh, hooks)  # from shapes alone, before any weights are read
        model = hooks.model or task.load_model(config.model, task.directory, mesh, config.seed)
        base = setup.base_fingerprint(model)
        method = setup.attach_method(config, task, model, mesh, source)
        objective, tx, trainable, frozen = parts = split(config, task, model, method, hooks.optimizer)
        run = Run(config, workdir, mesh, task, data, method, model, parts, base, hooks)
        state = run.resume(trainable, tx, checkpoints)
        del trainable, parts  # the state has copies of the leaves, which in full fine-tuning are a whole model

        @partial(jax.jit, donate_argnums=0, **jit_options(state))
        def train_step(state: TrainState, frozen: variables.FlatTree, batch: Batch) -> tuple[TrainState, Metrics]:
            gradients, totals = accumulate(objective, state, frozen, batch)  # value_and_grad, scanned over microbatches
            return apply(tx, state, gradients), summary(gradients, totals)

        start, steps = int(state.step), config.train.steps
        with (
            Log(
                workdir,
                total_steps=steps,
                resume_step=start,
                enabled=jax.process_index() == 0,
                tracking=run.tracking(),
                on_line=hooks.on_metrics,
            ) as log,
            Profiling(profile, start, steps, workdir, log) as profiling,
            run.compile_ahead(train_step, state, log) as step_ahead,
        ):
            run.introduce(state, log)
            if start == 0:
                run.evaluate(state, log)
            run.window.reopen()
            for step in run.steps_after(start):
                profiling.begin(step, state)
                batch = next(data)
                arrays = run.shard(batch)
                state, metrics = step_ahead(state, frozen, arrays)
                profiling.end(step, train_step, state, frozen, arrays)
                run.window.add(step, metrics, batch)
                stop = preemption.reached()
                run.log_step(step, log, stopping=stop)
                fresh = run.evaluate(state, log) if run.due.eval(step) else {}
                if run.save_is_due(step) or stop:
                    run.save(state, step, fresh, log, checkpoints)
                if stop and step < steps:
                    checkpoints.wait()
                    raise stopped(step, steps, workdir / "checkpoints" / str(step))
            checkpoints.wait()
            result = run.finish(state, log, checkpoints)
    return Trained(model, run.scores, result)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="Repository on the Hugging Face hub to upload the adapter to"
    )
    parser.add_argument(
        "--profile", metavar="N:M", help="First and last step to trace with the profiler, such as 20:22"
    )
    distributed.add_options(parser)


def main(argv: list[str]) -> None:
    description = "Train a model with the method of a config. Run the same command again to resume."
    options = cli.parse_command(argv, "train", description, options=add_options)
    profile = parse_steps(options.profile) if options.profile is not None else None
    config = configs.load(options.config, options.overrides)
    distributed.start(options)
    if options.push is not None:
        if config.method.trains_base:
            raise UserError(
                f"--push={options.push} uploads adapters, and method.name='full' trains the whole model; remove --push"
            )
        distributed.on_first(lambda: check_push(options.push))  # before the training, not after it
    workdir = Path(options.workdir)
    train(config, workdir, profile=profile)
    if options.push is not None:
        url = distributed.on_first(lambda: push_adapter(workdir / "adapter", options.push))
        if jax.process_index() == 0:
            print(url)


if __name__ == "__main__":
    cli.run(main)
