"""Generate text from prompts.

python -m peftjax.generate --model=DIR --adapter=DIR --prompt="..." [--prompt="..."]
"""

import argparse
import time
from functools import partial
from pathlib import Path

from peftjax.core import cli
from peftjax.decoding import Sampling, generate
from peftjax.quant import FORMATS


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m peftjax.generate", description="Continue prompts.")
    parser.add_argument("--model", required=True, help='a Hugging Face directory, a hub id, or "embedded"')
    parser.add_argument("--adapter", help="an adapter directory in Hugging Face PEFT format")
    parser.add_argument("--prompt", action="append", required=True, help="repeat it for several, answered in one batch")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are user messages for the tokenizer's chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0: no limit")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], help="a token to stop at, besides the end of text; repeatable"
    )
    parser.add_argument("--quantize", choices=tuple(FORMATS), help="the format in which the base was trained on")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args(argv)

    from peftjax.data.tokenizer import load_tokenizer
    from peftjax.io.hf_adapter import load_adapter
    from peftjax.io.hf_files import resolve
    from peftjax.io.load import load_model
    from peftjax.models.base import LanguageModel

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    directory = resolve(options.model)
    tokenizer = load_tokenizer(directory)
    stop = [*tokenizer.eos_ids, *(tokenizer.token_id(token) for token in options.stop)]
    texts = (
        [tokenizer.chat([{"role": "user", "content": p}], True) for p in options.prompt]
        if options.chat
        else options.prompt
    )
    prompts = [tokenizer.encode(text, bos=not options.chat) for text in texts]
    model = load_model(directory, dtype=options.dtype, quantize=options.quantize)
    if not isinstance(model, LanguageModel):
        raise ValueError(f"--model={options.model} is a {type(model).__name__}, which generates no text")
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
