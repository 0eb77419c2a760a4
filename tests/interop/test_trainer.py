"""A whole run on conversations beside one of transformers' Trainer: the same losses, rates, gradient norms and adapter."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

import peftjax
from peftjax.data.config import DataConfig
from peftjax.data.records import encode_record
from peftjax.log import read_metrics
from tests.interop.peers import THEIRS, trainable_theirs

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
STEPS, BATCH = 5, 4  # two epochs and a half
WORDS = ["Lily", "saw", "a", "big", "red", "ball", "in", "the", "park", "and", "was", "very", "happy"]


def conversation(index: int) -> list[dict[str, str]]:
    """Of one to three turns, each longer than the one before."""
    texts = [" ".join(WORDS[index : index + 2 + turn]) for turn in range(2 * (1 + index % 3))]
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        name: torch.tensor([example[name] + [filler] * (longest - len(example[name])) for example in examples])
        for name, filler in fillers.items()
    }


def test_a_run_has_the_losses_rates_norms_and_adapter_of_trainer(assets: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(assets / "stories260k", tmp_path / "base", copy_function=shutil.copyfile))
    (base / "chat_template.jinja").write_text(TEMPLATE)
    records = [{"messages": conversation(index)} for index in range(8)]
    lora = peftjax.Lora(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
    model = peftjax.attach(peftjax.load_model(base), lora, rngs=nnx.Rngs(0))
    start = peftjax.save_adapter(model, tmp_path / "start")

    fields = {
        "method.start_from": str(start),
        "data.format": "chat", "data.max_length": 128, "data.shuffle": False,
        "train.steps": STEPS, "train.batch_size": BATCH, "train.accumulate": 2, "train.log_every": 1,
        "optim.learning_rate": 1e-2, "optim.warmup_fraction": 0.4, "optim.weight_decay": 0.1,
        "optim.b1": 0.8, "optim.b2": 0.95, "optim.eps": 1e-6, "optim.clip_norm": 0.5,
    }  # fmt: skip
    trained = peftjax.train(base, lora, records, workdir=tmp_path / "run", config=fields)
    ours = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]

    tokenizer, data = peftjax.load_tokenizer(base), DataConfig(format="chat")
    encoded = [encode_record(record, data, tokenizer, name="a") for record in records]
    dataset = [
        {
            "input_ids": example.tokens.tolist(),
            "labels": np.where(example.loss_mask, example.tokens, -100).tolist(),
            "attention_mask": [1] * len(example.tokens),
        }
        for example in encoded
    ]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    other = trainable_theirs(base, config, start)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "theirs"), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=0.4, weight_decay=0.1, adam_beta1=0.8,
        adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0.5, logging_steps=1, train_sampling_strategy="sequential",
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(other, arguments, train_dataset=dataset, data_collator=collate)
    trainer.train()
    theirs: list[dict[str, Any]] = [line for line in trainer.state.log_history if "loss" in line]

    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "learning_rate", "grad_norm"):
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=1e-4, err_msg=name
        )
    assert ours[0]["learning_rate"] == 0 < ours[1]["learning_rate"] < ours[2]["learning_rate"]
    assert min(line["grad_norm"] for line in ours) > 0.5  # they are clipped
    mine, expected = load_file(trained.path / "adapter_model.safetensors"), peft.get_peft_model_state_dict(other)
    assert mine.keys() == expected.keys()
    for key, value in mine.items():
        np.testing.assert_allclose(value, expected[key].detach().numpy(), atol=1e-4, err_msg=key)
