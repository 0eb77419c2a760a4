"""Evaluate the trained model in a workdir, or an adapter or a base model on the data of a config.

    peftjax evaluate --workdir=runs/quickstart
    peftjax evaluate --config=my_config.py --adapter=DIR
    peftjax evaluate --config=my_config.py --base

The scores are printed. Those of a run are also written to evaluation.json in its workdir.
"""

import argparse
from pathlib import Path

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core.errors import UserError
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.core.progress import Progress
from peftjax.data.batches import HeldOut
from peftjax.log import is_amount
from peftjax.training import answers
from peftjax.training import config as configs
from peftjax.training.agreement import check_same_configs
from peftjax.training.setup import check_held_out
from peftjax.training.trained import (
    check_adapter,
    held_out_scores,
    load_adapted,
    load_trained,
    open_task,
    result_of,
    run_config,
    with_chat_template,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=cli.path,
        metavar="DIR",
        help="Adapter directory in the format of Hugging Face PEFT, instead of a run; --config has the base model and the data",
    )
    parser.add_argument(
        "--base", action="store_true", help="Evaluate the base model of --config alone, instead of a run"
    )
    distributed.add_options(parser)


def main(argv: list[str]) -> None:
    summary = "Evaluate the trained model in a workdir, or an adapter or a base model."
    options = cli.parse_command(argv, "evaluate", summary, of_run=True, options=add_options)
    _check(options)
    workdir, adapter = (Path(path) if path else None for path in (options.workdir, options.adapter))
    overrides = options.overrides
    config = run_config(workdir, options.config, overrides) if workdir else configs.load(options.config, overrides)
    if adapter:
        config = with_chat_template(config, adapter)
    distributed.start(options)
    check_same_configs({"": config})
    result = result_of(config, workdir) if workdir else None
    mesh, task = sharding.make_mesh(config.mesh.sizes), open_task(config)
    if adapter:
        check_adapter(adapter, config, task)
    check_held_out(config, task, mesh)  # before any weights are read
    if result:
        model = load_trained(config, task, result, mesh)
    else:
        model = load_adapted(config, task, adapter, mesh)
        task.check_lengths(model, mesh)
    with jax.set_mesh(mesh), Progress(enabled=jax.process_index() == 0) as progress:
        measured = held_out_scores(config, model, task, mesh, progress)
        if count := config.eval.exact_match or config.eval.samples:
            prompts = HeldOut(config.data, task).prompts(count)
            found = answers.answer(model, prompts, task.tokenizer, config.eval.max_new_tokens, progress)
            if config.eval.exact_match:
                measured |= answers.score(found, config.eval.metrics)
            if config.eval.samples:
                shown = answers.answers_table(found[: config.eval.samples], config.eval.marks_answers)
                progress.print_panel("samples", shown)
    if jax.process_index() != 0:
        return
    for name, value in measured.items():
        text = f"{value:.0f}" if is_amount(name) else f"{value:.6g}"
        print(f"{name:15} {text}")
    if workdir:
        write_atomically(workdir / "evaluation.json", to_json(measured, indent=2) + "\n")


def _check(options: argparse.Namespace) -> None:
    """Raises a UserError unless the options name exactly one model."""
    cli.require_value(options, "adapter")
    given = [f"--{name}" for name in ("workdir", "adapter", "base") if getattr(options, name)]
    if not given:
        raise UserError(
            "nothing to evaluate; give --workdir=DIR of a training run, or --config=FILE with --adapter=DIR or --base"
        )
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} name different models; give one of them. For the base model and the data of a run, give "
            "--config=WORKDIR/config.json instead of --workdir"
        )
    if not options.workdir and not options.config:
        raise UserError(
            f"{given[0]} needs --config=FILE, which has the base model (model.path) and the data (data.eval)"
        )


if __name__ == "__main__":
    cli.run(main)
