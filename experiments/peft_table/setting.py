"""What the table compares: the tasks, the methods with their learning rates, and the config of each run."""

import dataclasses
import gzip
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peftjax.methods import make_config
from peftjax.training import config as configs
from peftjax.training.config import Config

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH = {"classification": 16, "causal_lm": 1}  # rows; those of the decoder hold three to four records
TEST = 500  # of E2E's test file see `MEANINGS`
MEANINGS = 100  # meaning representations of E2E's test file that are verbalized, each with all its references
References = list[list[str | None]]  # by column, as `columns` makes them
SENTENCE = "Describe the restaurant in one or two sentences.\n{mr}\n"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A task of the table.

    Attributes:
        folder: The folder of its files train, validation and test.
        rows: Number of training records.
        validation: Number of validation records.
        epochs: Passes over them.
        seeds: Number of runs of each method with its best rate.
        score: The main score on the test file.
        length: Maximum number of tokens of a row.
        fields: Other fields of the config.
        train: The name of the training file.
    """

    folder: str
    rows: int
    validation: int
    epochs: int
    seeds: int
    score: str
    length: int
    fields: Mapping[str, Any]
    train: str = "train"

    @property
    def generates(self) -> bool:
        """Whether answers are generated and compared with references."""
        return self.score == "bleu"

    @property
    def kind(self) -> str:
        """The task type."""
        return "causal_lm" if self.generates else "classification"


def classes(*names: str, text: str = "{text}", pair: str = "") -> dict[str, Any]:
    templates = {"data.prompt_template": text, "data.pair_template": pair}
    return {"task.kind": "classification", "task.labels": names, **templates}


TASKS = {
    "sst2": Setting("sst2", 480, 240, 3, 5, "accuracy", 32, classes("negative", "positive"), "train_sentences"),
    "trec": Setting("trec", 1000, 500, 3, 5, "accuracy", 32, classes("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    "ag_news": Setting(
        "ag_news_small", 480, 240, 3, 5, "accuracy", 32, classes("World", "Sports", "Business", "Sci/Tech", text="{title}. {text}")
    ),
    "emotion": Setting(
        "emotion", 1000, 240, 3, 5, "accuracy", 32, classes("sadness", "joy", "love", "anger", "fear", "surprise")
    ),
    "mrpc": Setting(
        "mrpc", 1000, 240, 3, 5, "accuracy", 64, classes("different", "equivalent", text="{sentence1}", pair="{sentence2}")
    ),
    "e2e": Setting(
        "e2e_nlg", 128, 100, 2, 3, "bleu", 256,
        {"data.pack": True, "data.format": "completion", "data.prompt_template": SENTENCE, "data.completion_template": "{ref}"},
    ),
}  # fmt: skip

# The options of a method are common values and were not tuned; QLoRA is LoRA on an NF4 base with nested scales.
METHODS: dict[str, Mapping[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "qlora": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "dora": {"name": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear", "dora": True},
    "prompt": {"name": "prompt", "tokens": 20},
    "prefix": {"name": "prefix", "tokens": 20},
    "houlsby": {"name": "houlsby", "reduction_factor": 16},
    "pfeiffer": {"name": "pfeiffer", "reduction_factor": 16},
    "ia3": {"name": "ia3"},
    "bitfit": {"name": "bitfit"},
}
NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "dora": "DoRA",
    "prompt": "prompt tuning",
    "prefix": "prefix tuning",
    "houlsby": "Houlsby adapters",
    "pfeiffer": "Pfeiffer adapters",
    "ia3": "(IA)3",
    "bitfit": "BitFit",
}
RATES: dict[str, tuple[float, ...]] = {
    "full": (2e-5, 5e-5, 1e-4, 3e-4),
    "lora": (1e-4, 3e-4, 1e-3, 3e-3),
    "qlora": (1e-4, 3e-4, 1e-3, 3e-3),
    "dora": (1e-4, 3e-4, 1e-3, 3e-3),
    "prompt": (3e-3, 1e-2, 3e-2, 1e-1),
    "prefix": (1e-3, 3e-3, 1e-2, 3e-2),
    "houlsby": (3e-4, 1e-3, 3e-3, 1e-2),
    "pfeiffer": (3e-4, 1e-3, 3e-3, 1e-2),
    "ia3": (1e-3, 3e-3, 1e-2, 3e-2),
    "bitfit": (3e-4, 1e-3, 3e-3, 1e-2),
}


def methods_of(task: str) -> list[str]:
    """The methods that fit the task's model: BitFit trains biases, which Llama does not have."""
    return [name for name in METHODS if not (TASKS[task].generates and name == "bitfit")]


def make_config_of(task: str, method: str, rate: float, seed: int, model: str, data: Path) -> Config:
    """The config of one run.

    Args:
        task: A key of `TASKS`.
        method: A key of `METHODS`.
        rate: The learning rate.
        seed: The random seed, of the data order too.
        model: The Hugging Face directory of the base model.
        data: The folder that `prepare` filled.
    """
    setting, options = TASKS[task], dict(METHODS[method])
    return configs.changed(
        configs.load(CONFIGS / "base.py"),
        {
            "method": make_config(options.pop("name"), **options).to_dict(),
            "model.path": model,
            "model.dtype": "float32",
            "model.quantize": "nf4" if method == "qlora" else "",
            "data.train": (str(data / task / "train.jsonl"),),
            "data.eval": (str(data / task / "validation.jsonl"),),
            "data.max_length": setting.length,
            "train.batch_size": BATCH[setting.kind],
            "train.epochs": float(setting.epochs),
            "train.log_every": 50,
            "train.eval_every": "1 epoch",
            "optim.learning_rate": rate,
            "optim.schedule": "linear",
            "optim.warmup_fraction": 0.06,
            "checkpoint.every": "1 epoch",
            "checkpoint.keep": 1,
            "seed": seed,
            **setting.fields,
        },
    )


def prepare(task: str, source: Path, data: Path) -> None:
    """Write the records that the runs use to `data`/TASK: a random sample of the training records, the first validation
    and test records, and for E2E the test records of `MEANINGS` meaning representations."""
    setting, folder = TASKS[task], data / task
    if (folder / "test.jsonl").exists():
        return
    files = {"train": setting.train, "validation": "validation", "test": "test"}
    records = {name: read(source / setting.folder / f"{file}.jsonl.gz") for name, file in files.items()}
    chosen = np.random.default_rng(0).permutation(len(records["train"]))[: setting.rows]
    records["train"] = [records["train"][index] for index in chosen]
    records["validation"] = records["validation"][: setting.validation]
    if setting.generates:
        meanings = list(dict.fromkeys(record["mr"] for record in records["test"]))
        kept = {meanings[index] for index in np.linspace(0, len(meanings) - 1, MEANINGS).astype(int)}
        records["test"] = [record for record in records["test"] if record["mr"] in kept]
    else:
        records["test"] = records["test"][:TEST]
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in records.items():  # the test file is written last
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a compressed file of JSON lines."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def majority_share(file: Path) -> float:
    """The accuracy, in percent, of the answer that is most often right in a file of labeled records."""
    labels = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    return 100 * max(map(labels.count, set(labels))) / len(labels)


def references_of(file: Path) -> dict[str, list[str]]:
    """All references of each meaning representation in a file of E2E."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["mr"], []).append(record["ref"])
    return found


def columns(references: Mapping[str, list[str]]) -> References:
    """The references as sacrebleu takes them: the first of each meaning representation, the second of each, and so on,
    with None where there are fewer. An empty string would count as a reference of length 0 in the brevity penalty."""
    return [list(column) for column in itertools.zip_longest(*references.values())]


def overlaps(texts: Iterable[str], references: Iterable[list[str]]) -> list[float]:
    """ROUGE-L of each answer: its F-measure with the best of its references."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"])
    pairs = zip(texts, references, strict=True)
    return [rouge.score_multi(several, text)["rougeL"].fmeasure for text, several in pairs]
