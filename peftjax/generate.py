"""Generate text from prompts, with a trained run or with any model and adapter.

    peftjax generate --workdir=runs/quickstart --prompt="..." [--prompt="..."]
    peftjax generate --adapter=DIR [--model=DIR] --prompt="..."
    peftjax generate --workdir=runs/quickstart --prompts=prompts.jsonl --output=answers.jsonl

Prompts get the format that they had in training, a prompt template or the chat template. --raw turns this off.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from peftjax import sharding
from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.core.output import say
from peftjax.core.progress import GENERATING, Progress
from peftjax.core.terminal import printable
from peftjax.data.prompt_file import Texts, open_answers, open_prompts, write_answers
from peftjax.data.token_rows import check_token_rows
from peftjax.data.tokenizer import Tokenizer, load_tokenizer
from peftjax.decoding import check_positions, generate_batches, generate_ids
from peftjax.io.adapter_base import recorded_name
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_method import read_method
from peftjax.io.adapter_tensors import CONFIG
from peftjax.io.hf_files import find_model
from peftjax.io.load import load_model
from peftjax.models.base import LanguageModel
from peftjax.quant import FORMATS
from peftjax.sampling import Sampling
from peftjax.tasks.prompt_format import PromptFormat, read_chat_template, read_prompt_format
from peftjax.tasks.prompt_records import encode_chat, prompt_text, text_in, with_messages
from peftjax.tasks.prompts import Encoder, Prompts
from peftjax.training.trained import load_trained, open_task, result_of, run_config

BATCH_SIZE = 8  # prompts of a file that are answered at the same time


class ModelSource(NamedTuple):
    """What to generate with.

    Attributes:
        name: The option that names it, for messages.
        tokenizer: Its tokenizer.
        prompts: The format of the prompts in training; None if it is unknown.
        load: Reads the weights.
        mesh: The devices; None: one device.
    """

    name: str
    tokenizer: Tokenizer
    prompts: PromptFormat | None
    load: Callable[[], LanguageModel]
    mesh: Mesh | None = None


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog=cli.program("generate"),
        description="Generate text from prompts, with a trained run or a model and an adapter.",
    )
    add = parser.add_argument
    add(
        "--workdir",
        type=cli.path,
        help="Workdir of a training run, instead of --model and --adapter; --config.FIELD=VALUE changes its config",
    )
    add("--config", type=cli.path, metavar="FILE", help="With --workdir: config to use instead of the run's own")
    add(
        "--model",
        help='Hugging Face directory, hub id, or "embedded" for the bundled model (default: the adapter\'s base)',
    )
    add("--adapter", type=cli.path, help="Adapter directory in the format of Hugging Face PEFT")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="Prompt; repeatable")
    prompts.add_argument(
        "--prompts",
        type=cli.path,
        metavar="FILE",
        help="JSON Lines (.jsonl) with a prompt or messages in each record, or text (.txt) with one prompt per line",
    )
    add(
        "--output",
        type=cli.path,
        metavar="FILE",
        help="JSON Lines file for the answers, written after each batch: the records with a field generated_text",
    )
    add(
        "--batch-size",
        type=int,
        help=f"Number of prompts per batch (default: all of --prompt, {BATCH_SIZE} of --prompts)",
    )
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument(
        "--chat",
        action="store_true",
        help="Render each prompt with the chat template, as a user message or, if it is a JSON list of messages, as a conversation",
    )
    formats.add_argument(
        "--raw", action="store_true", help="Continue each prompt as it is, without the prompt format used in training"
    )
    add("--max-new-tokens", type=int, default=64, help="Maximum number of generated tokens (default: 64)")
    add("--temperature", type=float, default=0.0, help="Sampling temperature; 0: greedy (default)")
    add("--top-k", type=int, default=0, help="Sample among the k most likely tokens; 0: all (default)")
    add(
        "--top-p",
        type=float,
        default=1.0,
        help="Sample among the most likely tokens of this total probability; 1: all (default)",
    )
    add("--seed", type=int, default=0, help="Random seed (default: 0)")
    add("--stop", action="append", default=[], help="Additional token to stop at; repeatable")
    add(
        "--quantize",
        choices=tuple(FORMATS),
        help="Quantization format of the frozen weights (default: the run's, or none)",
    )
    add("--resize-embeddings", action="store_true", help="Add embedding rows for tokens that have none")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="Compute dtype (default: the run's, or float32)")
    return parser


def open_run(options: argparse.Namespace, overrides: list[str]) -> ModelSource:
    """The model that a training run has trained.

    Raises:
        UserError: The directory holds no run, the run has not finished, or its task does not generate text.
    """
    workdir = Path(options.workdir)
    own = {"quantize": options.quantize, "resize_embeddings": options.resize_embeddings or None}
    overrides = [*overrides, *(f"--config.model.{name}={value}" for name, value in own.items() if value is not None)]
    config = run_config(workdir, options.config, overrides)
    if options.dtype:  # float16 as well, which training does not support
        model = dataclasses.replace(config.model, dtype=options.dtype, param_dtype="")
        config = dataclasses.replace(config, model=model)
    result, task = result_of(config, workdir), open_task(config)
    if not task.generates:
        raise UserError(f"--workdir={workdir}: task.kind={task.kind!r} does not generate text; use peftjax evaluate")
    mesh = sharding.make_mesh(config.mesh.sizes)
    prompts = PromptFormat.of(task.kind, config.data)

    def load() -> LanguageModel:
        model = load_trained(config, task, result, mesh)
        assert isinstance(model, LanguageModel)  # the task generates
        return model

    return ModelSource(f"--workdir={workdir}", task.tokenizer, prompts, load, mesh)


def open_model(options: argparse.Namespace) -> ModelSource:
    """A model, with or without an adapter.

    Raises:
        UserError: There is no such model or adapter, or neither is given.
    """
    adapter = Path(options.adapter) if options.adapter else None
    if adapter:
        read_method(adapter)  # mistakes in its config are reported before any weights are read
    directory = find_model(options.model) if options.model else _base_of(adapter)
    tokenizer = load_tokenizer(directory, chat_template=read_chat_template(adapter) if adapter else None)

    def load() -> LanguageModel:
        rows = tokenizer.vocab_size if options.resize_embeddings else None
        model = load_model(directory, options.dtype or "float32", options.quantize, resize_embeddings=rows)
        if not isinstance(model, LanguageModel):
            raise UserError(f"--model={directory} is a {type(model).__name__}, which does not generate text")
        return load_adapter(model, adapter) if adapter else model

    name = f"--adapter={adapter}" if adapter else f"--model={options.model}"
    return ModelSource(name, tokenizer, read_prompt_format(adapter or directory), load)


def _base_of(adapter: Path | None) -> Path:
    """The directory of the base model that an adapter names."""
    if adapter is None:
        raise UserError("nothing to generate with; give --workdir=DIR of a training run, --adapter=DIR or --model=DIR")
    try:
        if (base := recorded_name(adapter)) is None:
            raise UserError(f"{adapter / CONFIG} does not name the base model")
        return find_model(base.name, base.revision)
    except UserError as error:
        raise UserError(f"--adapter={adapter} without --model: {error}; give --model=DIR") from None


def make_encoder(source: ModelSource, options: argparse.Namespace, first: str) -> Encoder:
    """The function that encodes records of prompts; prints which format it applies to prompts such as the first one."""
    tokenizer, prompts = source.tokenizer, source.prompts

    def encode_raw(record: Mapping[str, Any], name: str) -> list[int]:
        if with_messages(record):
            fix = "give --chat instead of --raw" if options.raw else "add --chat"
            raise UserError(f"{name}: messages are rendered with the chat template; {fix}")
        return tokenizer.encode_prompt(text_in(record, name))

    if options.chat:
        return lambda record, name: encode_chat(record, tokenizer, name)
    if options.raw or prompts is None:
        return encode_raw
    if applied := prompts.describe(tokenizer, options.prompt or [first]):
        say(f"applying {applied}, as in the training of {source.name.partition('=')[2]}; --raw turns it off")
    if options.prompts:
        return lambda record, name: prompts.encode_record(record, tokenizer, name)
    return lambda record, name: prompts.encode(text_in(record, name), tokenizer, name)


def stop_ids(source: ModelSource, options: argparse.Namespace) -> tuple[int, ...]:
    """The tokens that end an answer: as in training for a training format, otherwise as in `peftjax.generate`."""
    formatted = source.prompts is not None and not options.raw
    return source.tokenizer.stop_ids(chat=options.chat or formatted)


def answer_at_once(
    model: LanguageModel, prompts: Prompts, stop: Sequence[int], **options: Any
) -> Iterator[tuple[list[list[int]], float]]:
    """The answers to all prompts in one batch, and the seconds that they took after compilation."""
    tokens = [prompts.tokens(index) for index in range(len(prompts.records))]
    with Progress() as progress, progress.phase(GENERATING):
        # The first pass compiles, and stops at the first token.
        for ends in progress.track((range(model.config.vocab), stop), "passes", 2):
            started = time.perf_counter()
            answers = generate_ids(model, tokens, stop=ends, **options)
            taken = time.perf_counter() - started
    yield answers, taken


def answer_in_batches(
    model: LanguageModel, prompts: Prompts, parts: Sequence[range], shows_progress: bool, **options: Any
) -> Iterator[tuple[list[list[int]], float]]:
    """The answers to each part of the prompts, one after the other, and the seconds that they took."""
    batches = ([prompts.tokens(index) for index in part] for part in parts)
    with Progress(enabled=shows_progress) as progress, progress.phase(GENERATING):
        answers = generate_batches(model, batches, len(parts[0]), **options)
        for _ in progress.track(parts, "batches", len(parts)):
            started = time.perf_counter()
            yield next(answers), time.perf_counter() - started


def show(records: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> None:
    """Print prompts and their answers."""
    shown = printable if sys.stdout.isatty() else str  # a terminal would execute escape sequences
    for record, answer in zip(records, answers, strict=True):
        say(shown(f"\n> {prompt_text(record)}\n{answer}"))


def main(argv: list[str]) -> None:
    overrides, rest = cli.config_fields(argv)
    options = cli.parse_options(make_parser(), rest)
    cli.require_value(options, "model", "adapter", "workdir", "config", "prompts", "output")
    _check(options, overrides)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    records = open_prompts(options.prompts) if options.prompts else Texts(options.prompt, "--prompt")
    source = open_run(options, overrides) if options.workdir else open_model(options)
    tokenizer = source.tokenizer
    stop = [*stop_ids(source, options), *(tokenizer.token_id(token) for token in options.stop)]
    prompts = Prompts(records, make_encoder(source, options, prompt_text(records[0])))
    longest, highest = prompts.extremes()
    total = len(records)
    size = min(options.batch_size or (BATCH_SIZE if options.prompts else total), total)
    parts = [range(start, min(start + size, total)) for start in range(0, total, size)]
    with (
        open_answers(options.output) if options.output else contextlib.nullcontext() as output,
        jax.set_mesh(source.mesh) if source.mesh else contextlib.nullcontext(),
    ):
        model = source.load()
        check_token_rows(prompts.tokens(highest), model.embedding_rows, tokenizer, records.name(highest))
        check_positions(model, len(prompts.tokens(longest)), options.max_new_tokens, records.name(longest))
        chosen = {"max_new_tokens": options.max_new_tokens, "sampling": sampling, "seed": options.seed}
        if len(parts) == 1:
            answered = answer_at_once(model, prompts, stop, **chosen)
        else:
            answered = answer_in_batches(model, prompts, parts, output is not None, stop=stop, **chosen)
        count, seconds = 0, 0.0
        for part, (answers, taken) in zip(parts, answered, strict=True):
            given, texts = [records[index] for index in part], [tokenizer.decode(tokens) for tokens in answers]
            if output:
                write_answers(output, given, texts)
            else:
                show(given, texts)
            count, seconds = count + sum(map(len, answers)), seconds + taken
    where, plural = f"{options.output}: " if options.output else "\n", "s" if total > 1 else ""
    after = " after compilation" if len(parts) == 1 else ""
    say(f"{where}{count} tokens for {total} prompt{plural} in {seconds:.2f} s{after}: {count / seconds:.0f} tokens/s")


def _check(options: argparse.Namespace, overrides: list[str]) -> None:
    """Raises a UserError for options that exclude each other or are out of range."""
    if options.workdir and (options.model or options.adapter):
        raise UserError(
            "--workdir names both the model and the adapter of a run; remove --model and --adapter, or remove --workdir. "
            "For a base model that was moved, give --config.model.path=DIR"
        )
    if not options.workdir and (options.config or overrides):
        given = overrides[0] if overrides else f"--config={options.config}"
        raise UserError(f"{given} changes the config of a run; give the run with --workdir=DIR")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={options.max_new_tokens} generates nothing; use 1 or more")
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError(f"--batch-size={options.batch_size} must be at least 1")
    if options.dtype == "float16" and jax.default_backend() == "cpu":
        raise UserError("--dtype=float16: attention in float16 is not supported on CPUs; use float32 or bfloat16")


if __name__ == "__main__":
    cli.run(main)
