"""Write the corpus, the tokenizer and the config.json of the bundled model, from text in every Python installation.

    python experiments/base_model/make_corpus.py --out=runs/base_model/corpus

Nothing is downloaded. The text is `pydoc_data.topics` (the language reference shown by `help()`), the docstrings of the
standard library (of its sources, and of its compiled modules through `inspect`), and the comment blocks of its sources.
The task of the quickstart is not in it: no text here pairs a written date with its ISO 8601 form on purpose.

The output directory holds
    train.jsonl, validation.jsonl   one {"text": ...} per line, at most `MAX_TOKENS` tokens each; no document is in both
    base/                           config.json, tokenizer.json, ...: for `model.init="random"`
    corpus.json                     counts, the Python version and the SHA-256 of the text
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import io
import json
import pathlib
import platform
import random
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

MAX_TOKENS = 126  # of 128 positions: begin and end of text take two
CHUNKINGS = 3  # how often the training text is written, cut at different places each time
VALIDATION_PERCENT = 2
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
# Tests are mostly code and test data; the vendored installers are not part of the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled"}
VOCABULARY = 1024
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}


def source_files() -> list[pathlib.Path]:
    """Return the standard library's Python files, sorted, without tests and vendored packages."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts))
    return sorted(files)


def topics() -> Iterator[str]:
    """Yield the documentation topics behind `help("...")`."""
    from pydoc_data.topics import topics as pages

    for name in sorted(pages):
        yield pages[name].strip()


def docstrings(source: str) -> Iterator[str]:
    """Yield each definition's first line with its docstring, so that names stand beside what they mean."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = f"def {node.name}({ast.unparse(node.args)}):\n{text}"
        elif isinstance(node, ast.ClassDef):
            text = f"class {node.name}:\n{text}"
        yield text


def comments(source: str) -> Iterator[str]:
    """Yield each run of comment lines of at least two lines; a shorter one says little without its code."""
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1 and block:
            yield from joined(block)
            block = []
        block.append(token.string.lstrip("#").removeprefix(" ").rstrip())
        last = line
    yield from joined(block)


def joined(block: list[str]) -> Iterator[str]:
    text = "\n".join(block).strip()
    if len(block) > 1 and len(text) > 60:
        yield text


def compiled_docstrings() -> Iterator[str]:
    """Yield the docstrings of built-in and extension modules, which have no source to parse."""
    for name in [*sorted(sys.builtin_module_names), "_datetime", "_decimal", "_json", "_struct", "array", "math"]:
        try:
            module = importlib.import_module(name)
        except ImportError:  # not in this build of Python
            continue
        for key, value in sorted(vars(module).items()):
            members = [(key, value)]
            if inspect.isclass(value):
                members += [(f"{key}.{inner}", member) for inner, member in sorted(vars(value).items())]
            for label, member in members:
                text = getattr(member, "__doc__", None)
                if isinstance(text, str) and len(text) > 60:
                    yield f"{label}\n{inspect.cleandoc(text)}"


def documents() -> list[str]:
    """Return every document once: the pieces of one source file joined, in a fixed order."""
    found = list(topics())
    for path in source_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                source = path.read_bytes().decode("utf-8")
                pieces = [*docstrings(source), *comments(source)]
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):  # templates and deliberate errors
                continue
        found.append("\n\n".join(dict.fromkeys(pieces)))
    found.append("\n\n".join(dict.fromkeys(compiled_docstrings())))
    return [re.sub(r"\n{3,}", "\n\n", text) for text in dict.fromkeys(found) if len(text) > 200]


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE on `texts`; each digit is a separate token, so that numbers are spelled out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def chunks(text: str, tokenizer: Tokenizer, first: int) -> Iterator[str]:
    """Cut `text` at line ends into pieces of at most MAX_TOKENS tokens, the first of at most `first`."""
    piece, used, limit = "", 0, first
    for line in text.splitlines(keepends=True):
        count = len(tokenizer.encode(line).ids)
        if used + count > limit and piece:
            yield piece
            piece, used, limit = "", 0, MAX_TOKENS
        if count <= MAX_TOKENS:  # a longer line is a table of data
            piece, used = piece + line, used + count
    if piece.strip():
        yield piece


def write_lines(path: pathlib.Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write_base(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Write the files of a Hugging Face directory, except the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    files = {
        "config.json": LLAMA,
        "generation_config.json": {key: LLAMA[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": LLAMA["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **special,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="Directory to write")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    rng = random.Random(0)
    texts = documents()
    held_out = set(rng.sample(range(len(texts)), len(texts) * VALIDATION_PERCENT // 100))
    train = [text for index, text in enumerate(texts) if index not in held_out]
    validation = [text for index, text in enumerate(texts) if index in held_out]

    tokenizer = make_tokenizer(train)
    write_base(out / "base", tokenizer)
    pieces = [
        piece
        for chunking in range(CHUNKINGS)
        for text in train
        for piece in chunks(text, tokenizer, MAX_TOKENS if chunking == 0 else rng.randint(1, MAX_TOKENS))
    ]
    write_lines(out / "train.jsonl", pieces)
    write_lines(
        out / "validation.jsonl", [piece for text in validation for piece in chunks(text, tokenizer, MAX_TOKENS)]
    )

    report = {
        "python": platform.python_version(),
        "documents": {"train": len(train), "validation": len(validation)},
        "characters": {"train": sum(map(len, train)), "validation": sum(map(len, validation))},
        "tokens": {"train": sum(len(tokenizer.encode(text).ids) for text in train)},
        "lines": {"train": len(pieces)},
        "chunkings": CHUNKINGS,
        "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
    }
    (out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
