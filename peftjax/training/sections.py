"""The sections `train`, `eval` and `checkpoint` of the configuration."""

import dataclasses

from peftjax.core.config import field
from peftjax.core.errors import UserError
from peftjax.tasks.metrics import check_answer_metrics

DEFAULT_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long the training is, how large its steps are, and when it logs and evaluates."""

    steps: int = field(DEFAULT_STEPS, "Number of optimizer updates", low=1)
    epochs: float = field(
        0.0, "Number of passes over data.train, in place of steps; 0: steps", low=0, instead_of="steps"
    )
    batch_size: int = field(8, "Sequences per step, over all devices and microbatches", low=1)
    accumulate: int = field(1, "Microbatches per step, computed one after the other", low=1)
    loss_chunk: int = field(128, "Positions of a sequence whose logits are in memory at the same time", low=1)
    log_every: int = field(10, "Steps between two lines of metrics", low=1)
    eval_every: int | str = field(
        "10%",
        "Interval between two evaluations: a number of steps, a percentage of the run ('10%'), or epochs ('0.5 epochs'); "
        "0: only before the first and after the last step",
        low=0,
        interval=True,
    )
    eval_batches: int = field(0, "Batches per evaluation; 0: all held-out records", low=0)

    def __post_init__(self) -> None:
        if self.epochs and self.steps != DEFAULT_STEPS:
            raise UserError(
                f"train.epochs={self.epochs:g} and train.steps={self.steps} both give the length of the run; set "
                f"train.epochs=0, or leave train.steps at its default, {DEFAULT_STEPS}"
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} must be a multiple of train.accumulate={self.accumulate}"
            )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The evaluation of generated answers."""

    exact_match: int = field(0, "Number of held-out prompts to answer and score; 0: none", low=0)
    metrics: tuple[str, ...] = field(("exact_match",), "Metrics of these answers: exact_match, bleu, rouge_l")
    max_new_tokens: int = field(64, "Maximum length of a generated answer in tokens", low=1)
    samples: int = field(
        0, "Number of generated answers to print and report; with exact_match, the first of those", low=0
    )

    def __post_init__(self) -> None:
        check_answer_metrics(self.metrics)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are kept."""

    every: int | str = field(
        100,
        "Interval between two checkpoints: a number of steps, a percentage of the run ('10%'), or epochs ('0.5 epochs')",
        low=1,
        interval=True,
    )
    minutes: float = field(
        10.0,
        "Maximum age of the last checkpoint in minutes, checked whenever metrics are logged; 0: never save by time",
        low=0,
    )
    keep: int = field(2, "Number of most recent checkpoints to keep", low=1)
    keep_best: bool = field(True, "Also keep the checkpoint with the lowest evaluation loss")
    adapter: bool = field(False, "Also write adapter/ with every checkpoint, not only at the end")


METHOD_NAME = Field("lora", "PEFT method; the other fields of this section are the options of that method")
@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a run."""

    seed: int = field(0, "Random seed of initial values, dropout and data order", low=0, high=2**63 - 1)
    model: ModelSection = section(ModelSection)
    task: TaskConfig = section(TaskConfig)
    method: Method = dataclasses.field(
        default_factory=methods.Lora, metadata={"fields": {"name": METHOD_NAME, "start_from": START_FROM}}
    )
    data: DataConfig = section(DataConfig)
    optim: OptimConfig = section(OptimConfig)
    train: TrainConfig = section(TrainConfig)
    eval: EvalConfig = section(EvalConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    mesh: MeshConfig = section(MeshConfig)
    start_from: str = dataclasses.field(default="", metadata={"fields": {}})  # method.start_from

    def __post_init__(self) -> None:
        if methods.METHODS.get(name := self.method.method) is not (kind := type(self.method)):
            raise UserError(
                f"method.name={name!r} does not stand for {kind.__name__}; give {kind.__name__}.method a name of its own, and "
                f"register the class: peftjax.methods.METHODS[{kind.__name__}.method] = {kind.__name__}"
            )
        if self.optim.warmup_steps > self.train.steps and not self.train.epochs:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} must be at most train.steps={self.train.steps}; shorten the "
                "warmup, or set optim.warmup_fraction, which scales with the run"
            )
        if self.model.attention == "cudnn" and self.data.pack:
            raise UserError(
                "model.attention='cudnn' does not support packed sequences; set data.pack=False or model.attention='auto'"
            )
        for name, value in (("exact_match", self.eval.exact_match), ("samples", self.eval.samples)):
            if value and not TASKS[self.task.kind].generates:
                raise UserError(
                    f"eval.{name}={value}: task.kind={self.task.kind!r} does not generate text; set it to 0"
                )
            if value and not self.data.eval:
                raise UserError(
                    f"eval.{name}={value} answers prompts of data.eval, which names no source; set data.eval, or eval.{name}=0"
                )
        if self.model.new_head and TASKS[self.task.kind].head is None:
            raise UserError(
                f"model.new_head=True: a model for task.kind={self.task.kind!r} has no task head to replace; set it to False"
            )


SCHEMA = Schema(core_config.fields_of(Config), methods.method_defaults)
core_config.declare(SCHEMA)


def load(path: str | Path, overrides: Iterable[str] = (), origins: Mapping[str, str] | None = None) -> Config:
    """The config of a file, completed by the defaults and overridden.

    Args:
      path: A Python file with a function `get_config()` (in "FILE.py:TEXT", the text is its argument), or a YAML or JSON file
        with the same sections and fields, such as the config.json of a run.
      overrides: Strings "--config.optim.learning_rate=1e-3"; see `config_values.override`.
      origins: Where some of the overrides were given, for messages.

    Raises:
      UserError: The file fails, or a field is unknown, of the wrong type or out of range.
    """
    given, source = config_file.read(path)
    values = config_values.complete(given, SCHEMA, source)
    return _make(config_values.override(values, overrides, SCHEMA, origins or {}), str(path))


def validate(config: ConfigDict | Mapping[str, Any], source: str = "config") -> Config:
    """The config with the given values, which may leave out fields and sections. `source` is named in messages.

    Raises:
      UserError: A field is unknown, of the wrong type or out of range.
    """
    return _make(config_values.complete(flat(config), SCHEMA, ConfigSource(source)), source)


def changed(config: Config, fields: Mapping[str, Any]) -> Config:
    """The config with other values of some fields.

    Args:
      config: The config; it is not modified.
      fields: New values by dotted name, such as {"model.remat": "block"}. As on the command line, another "method.name"
        first replaces the whole section by the defaults of that method. A mapping by the name of a section, such as
        {"mesh": {"fsdp": 2}}, replaces the section.

    Raises:
      UserError: As `validate`.
    """
    values = to_dict(config)
    for name in core_config.replaced_by(fields, SCHEMA.fields):
        head, _, leaf = name.partition(".")
        values[head][leaf] = SCHEMA.fields[name].default
    for name, value in sorted(fields.items(), key=lambda item: item[0] != "method.name"):
        head, _, leaf = str(name).partition(".")
        if name == "method.name" and value != config.method.method:
            values["method"] = {"name": value}
        elif leaf and isinstance(values.get(head), Mapping):
            values[head] = values[head] | {leaf: value}
        else:
            values[name] = value
    return validate(values)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, which `validate` turns back into an equal one."""
    sections = {
        each.name: getattr(config, each.name) for each in dataclasses.fields(config) if "section" in each.metadata
    }
    plain = {name: dataclasses.asdict(value) for name, value in sections.items()}
    return {"seed": config.seed, "method": _method_values(config.method, config.start_from)} | plain


def to_json(config: Config) -> str:
    """The config as JSON text."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def differences(here: Config, there: Mapping[str, Any]) -> list[str]:
    """One line for every field in which a config and the stored values of another differ.

    For example "optim.learning_rate: 0.001 here, 0.002 there". The stored values may be those of an older version, which
    did what the defaults of newer fields do.
    """
    a, b = flat(to_dict(here)), {name: config_values.as_tuples(value) for name, value in _normalized(there).items()}
    return [
        f"{name}: {repr(a[name]) if name in a else 'absent'} here, {repr(b[name]) if name in b else 'absent'} there"
        for name in a | b
        if (name in a, a.get(name)) != (name in b, b.get(name))
    ]


def _normalized(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values, flat and complete; the method's options as its class has them ("q_proj,v_proj" as a tuple)."""
    defaults = {name: value for name, value in to_dict(Config()).items() if name not in ("seed", "method")}
    stored = {**stored, **{name: section | stored.get(name, {}) for name, section in defaults.items()}}
    try:
        method = methods.from_config({name: config_values.as_tuples(value) for name, value in stored["method"].items()})
    except (KeyError, UserError, TypeError):
        return flat(stored)
    return flat({**stored, "method": _method_values(method, stored["method"].get("start_from", ""))})


def _method_values(method: Method, start_from: str) -> dict[str, Any]:
    """The values of the section `method`."""
    own = {each.name: getattr(method, each.name) for each in dataclasses.fields(method)}
    return {"name": method.method, "start_from": start_from} | own


def _make(values: Mapping[str, Any], source: str) -> Config:
    """The Config with complete values."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, leaf = name.rpartition(".")
        sections.setdefault(head, {})[leaf] = value
    try:
        made = {
            each.name: each.metadata["section"](**sections[each.name])
            for each in dataclasses.fields(Config)
            if "section" in each.metadata
        }
        method, start_from = methods.from_config(sections["method"]), sections["method"]["start_from"]
        return Config(**sections[""], method=method, start_from=start_from, **made)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def describe() -> str:
    """All fields with their defaults and meanings, for --help."""
