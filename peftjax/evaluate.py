"""Evaluate the trained model in a workdir, with the config that the run wrote there.

peftjax evaluate --workdir=runs/quickstart
"""

from pathlib import Path

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core.files import write_atomically
from peftjax.core.json_numbers import to_json
from peftjax.core.progress import Progress
from peftjax.data.batches import HeldOut
from peftjax.log import is_amount
from peftjax.training import answers
from peftjax.training.setup import check_held_out, check_same_configs
from peftjax.training.trained import held_out_scores, load_trained, open_task, result_of, run_config


def main(argv: list[str]) -> None:
    summary = "Evaluate the trained model in a workdir."
    options = cli.parse_command(argv, "evaluate", summary, of_run=True, options=distributed.add_options)
    workdir = Path(options.workdir)
    config = run_config(workdir, options.config, options.overrides)
    distributed.start(options)
    check_same_configs({"": config})
    mesh, result, task = sharding.make_mesh(config.mesh.sizes), result_of(config, workdir), open_task(config)
    check_held_out(config, task, mesh)  # before any weights are read
    model = load_trained(config, task, result, mesh)
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
    write_atomically(workdir / "evaluation.json", to_json(measured, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
