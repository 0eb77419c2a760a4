"""Evaluate what a training run left in its workdir.

python -m peftjax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart
"""

import json
from pathlib import Path

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core.files import write_atomically
from peftjax.core.progress import Progress
from peftjax.data.batches import eval_prompts
from peftjax.training import answers
from peftjax.training import config as configs
from peftjax.training.trained import load_trained, measure


def main(argv: list[str]) -> None:
    summary = "Evaluate the trained model in a workdir."
    options = cli.parse(argv, "evaluate", summary, configs.describe(), options=distributed.add_options)
    config = configs.load(options.config, options.overrides)
    distributed.start(options)
    workdir = Path(options.workdir)
    mesh = sharding.make_mesh(config.mesh.sizes)
    model, task = load_trained(config, workdir, mesh)
    with jax.set_mesh(mesh), Progress(enabled=jax.process_index() == 0) as progress:
        measured = measure(config, model, task, mesh, progress)
        if count := config.eval.exact_match or config.eval.samples:
            prompts = eval_prompts(config.data, task, count)
            found = answers.answer(model, prompts, task.tokenizer, config.eval.max_new_tokens, progress)
            if scored := config.eval.exact_match > 0:
                measured |= answers.score(found, config.eval.metrics)
            if config.eval.samples:
                progress.print_panel("samples", answers.table(found[: config.eval.samples], scored))
    if jax.process_index() != 0:
        return
    for name, value in measured.items():
        print(f"{name:15} {value:.6g}")
    write_atomically(workdir / "evaluation.json", json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
