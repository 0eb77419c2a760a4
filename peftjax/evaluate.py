"""Evaluate what a training run left in its workdir.

python -m peftjax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart
"""

import json
from pathlib import Path

import jax

from peftjax import sharding
from peftjax.core import cli, distributed
from peftjax.core import config as configs
from peftjax.tasks import base as tasks
from peftjax.training.evaluation import answer, answer_scores, load_trained, measure


def main(argv: list[str]) -> None:
    from peftjax import methods
    from peftjax.data.batches import eval_examples

    summary = "Evaluate what a training run left in its workdir."
    options = cli.parse(argv, "evaluate", summary, options=distributed.add_options)
    config = configs.load(options.config, options.overrides, method_defaults=methods.method_defaults)
    tasks.check(config)
    distributed.start(options)
    workdir = Path(options.workdir)
    mesh = sharding.make_mesh(config.mesh)
    model, rows = load_trained(config, workdir, mesh)
    with jax.set_mesh(mesh):
        measured = measure(config, model, rows, mesh)
        if count := config.eval.exact_match or config.eval.samples:
            answers = answer(model, eval_examples(config, rows, count), rows.tokenizer, config.eval.max_new_tokens)
            if scored := config.eval.exact_match > 0:
                measured |= answer_scores(answers, config.eval.metrics)
            for item in answers[: config.eval.samples] if jax.process_index() == 0 else ():
                print(item.told(scored))
    if jax.process_index() != 0:
        return
    for name, value in measured.items():
        print(f"{name:15} {value:.6g}")
    (workdir / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
