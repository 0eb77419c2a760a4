"""Generate text from prompts.

python -m peftjax.generate --model=DIR --adapter=DIR --prompt="..." [--prompt="..."]
"""

import argparse
import time
from functools import partial
from pathlib import Path

from peftjax.core import cli
from peftjax.core.errors import UserError
from peftjax.data.token_rows import check_rows, embedding_rows
from peftjax.data.tokenizer import load_tokenizer
from peftjax.decoding import Sampling, generate
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_method import read_method
from peftjax.io.hf_files import resolve
from peftjax.io.load import load_model
from peftjax.models.base import LanguageModel
from peftjax.quant import FORMATS


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog=cli.program("generate"), description="Generate text from prompts with a model and an adapter."
    )
    add = parser.add_argument
    add("--model", required=True, help='Hugging Face directory, hub id, or "embedded" for the bundled model')
    add("--adapter", help="Adapter directory in the format of Hugging Face PEFT")
    add("--prompt", action="append", required=True, help="Prompt; repeatable, all are answered in one batch")
    add("--chat", action="store_true", help="Render each prompt as a user message with the chat template")
    add("--max-new-tokens", type=int, default=64, help="Maximum number of generated tokens (default: 64)")
    add("--temperature", type=float, default=0.0, help="Sampling temperature; 0: greedy (default)")
    add("--top-k", type=int, default=0, help="Sample among the k most likely tokens; 0: all (default)")
    add("--top-p", type=float, default=1.0, help="Sample among the most likely tokens of this total probability")
    add("--seed", type=int, default=0, help="Random seed")
    add("--stop", action="append", default=[], help="Token to stop at, besides the end of text; repeatable")
    add("--quantize", choices=tuple(FORMATS), help="Quantization format of the frozen weights")
    add("--resize-embeddings", action="store_true", help="Add embedding rows for tokens that have none")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="Compute dtype")
    return parser


def main(argv: list[str]) -> None:
    options = cli.parse_options(make_parser(), argv)
    cli.require_value(options, "model", "adapter")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    directory = resolve(options.model)
    tokenizer = load_tokenizer(directory)
    stop = [*tokenizer.eos_ids, *(tokenizer.token_id(token) for token in options.stop)]
    prompts = [tokenizer.encode_prompt(prompt, chat=options.chat) for prompt in options.prompt]
    rows = tokenizer.vocab_size if options.resize_embeddings else None
    if options.adapter:
        read_method(Path(options.adapter))  # mistakes in its config are reported before any weights are read
    model = load_model(directory, dtype=options.dtype, quantize=options.quantize, resize_embeddings=rows)
    if not isinstance(model, LanguageModel):
        raise UserError(f"--model={options.model} is a {type(model).__name__}, which does not generate text")
    for prompt in prompts:
        check_rows(prompt, embedding_rows(model), tokenizer, "--prompt")
    if options.adapter:
        load_adapter(model, Path(options.adapter))

    answer = partial(
        generate, model, prompts, max_new_tokens=options.max_new_tokens, sampling=sampling, seed=options.seed
    )
    answer(stop=range(model.config.vocab))  # compiles, and stops at the first token
    started = time.perf_counter()
    answers = answer(stop=stop)
    taken = time.perf_counter() - started
    for prompt, tokens in zip(options.prompt, answers, strict=True):
        print(f"\n> {prompt}\n{tokenizer.decode(tokens)}")
    count, plural = sum(map(len, answers)), "s" if len(prompts) > 1 else ""
    print(
        f"\n{count} tokens for {len(prompts)} prompt{plural} in {taken:.2f} s after compilation: {count / taken:.0f} tokens/s"
    )


if __name__ == "__main__":
    cli.run(main)
