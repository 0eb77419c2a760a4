"""LoRA on RoBERTa-base for a task of GLUE (Wang et al. 2018, arXiv:1804.07461):

    peftjax train --config=configs/glue_roberta_lora.py:mrpc --workdir=runs/mrpc

The task after the colon is a key of TASKS. The data are TFDS's `glue/mrpc`. To use other files with the same fields (those
in TASKS, and `label`), set --config.data.train=FILE.jsonl --config.data.eval=FILE.jsonl; for other fields, also
--config.data.prompt_template={text}, --config.data.pair_template={other} and --config.data.label_field=gold. Set another
encoder with --config.model.path=DIR; another method with --config.method.name=ia3. Rates and sizes are from Hu et al.
2021 (arXiv:2106.09685), appendix D.1, for 3 epochs.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.core.paths import suggest
from peftjax.methods import make_config

# {task: (fields of the text or the pair, classes in GLUE's order; none for a regression)}
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "stsb": (("sentence1", "sentence2"), ()),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


def get_config(task: str = "mrpc") -> ConfigDict:
    if task not in TASKS:
        raise UserError(f"{task!r} is not a GLUE task.{suggest(task, TASKS)} Available: {', '.join(TASKS)}")
    fields, classes = TASKS[task]
    config = defaults()
    config.model.path = "FacebookAI/roberta-base"
    config.task.kind = "classification" if classes else "regression"
    config.task.labels = classes
    config.method = make_config("lora", rank=8, alpha=16.0, targets=("query", "value"))
    config.data.train = (f"tfds:glue/{task}/train",)
    config.data.eval = (f"tfds:glue/{task}/validation{'_matched' if task == 'mnli' else ''}",)
    config.data.prompt_template = f"{{{fields[0]}}}"
    config.data.pair_template = f"{{{fields[1]}}}" if len(fields) > 1 else ""
    config.data.max_length = 128
    config.train.batch_size = 32
    config.train.epochs = 3.0
    config.train.log_every = 50
    config.train.eval_every = "1 epoch"
    config.optim.learning_rate = 5e-4
    config.optim.schedule = "linear"
    config.optim.warmup_fraction = 0.06
    return config
