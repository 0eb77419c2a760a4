"""LoRA on a Llama that writes a sentence from facts about a restaurant (E2E NLG, Novikova et al. 2017).

    peftjax train --config=configs/e2e_nlg_llama_lora.py --workdir=runs/e2e --config.model.path=DIR

The data are JSON lines {"mr": "name[The Vaults], eatType[pub], ...", "ref": "The Vaults pub ..."} under data/e2e_nlg.
"""

from ml_collections import ConfigDict

from peftjax.core.config import defaults
from peftjax.methods import make_config


def get_config() -> ConfigDict:
    config = defaults()
    config.method = make_config("lora", rank=8, alpha=16.0, targets="all-linear")
    config.data.train = ("data/e2e_nlg/train.jsonl.gz",)
    config.data.eval = ("data/e2e_nlg/validation.jsonl.gz",)
    config.data.format = "completion"
    config.data.prompt_template = "{mr}\n"
    config.data.completion_template = "{ref}"
    config.data.max_length = 256
    config.data.pack = True
    config.optim.learning_rate = 3e-3
    config.optim.warmup_fraction = 1 / 15
    config.train.steps = 300
    config.train.batch_size = 8
    config.train.log_every = 20
    config.train.eval_batches = 8
    config.eval.samples = 4  # printed, not scored: there is more than one right answer
    config.eval.max_new_tokens = 80
    return config
