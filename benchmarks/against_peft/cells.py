"""What is measured. A cell is a named combination of a shape, a method, a dtype and a batch.

This file imports neither jax nor torch: both sides and the parent read it.
"""

import dataclasses
import itertools
from typing import Any

RANK, VIRTUAL, BOTTLENECK = 16, 20, 64
PROMPT, NEW = 32, 64  # tokens of a decoding cell


def llama(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "head_dim": width // heads, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": tied,
    }  # fmt: skip


def mixtral(width: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    mixture = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    return llama(width, mlp, layers, heads, kv_heads, vocab, tied=True) | mixture


SHAPES = {
    "tiny": llama(128, 256, 2, 4, 2, 512, tied=True),  # to test the harness
    "tiny-moe": mixtral(128, 128, 2, 4, 2, 512),
    "15m": llama(288, 768, 6, 6, 6, 32000, tied=True),
    "110m": llama(768, 2048, 12, 12, 12, 32000, tied=True),
    "moe": mixtral(768, 1024, 12, 12, 12, 32000),  # 110M active parameters of 280M
    "135m": llama(576, 1536, 30, 9, 3, 49152, tied=True),  # SmolLM2-135M
    "1.1b": llama(2048, 5632, 22, 32, 4, 32000, tied=False),  # TinyLlama
}
METHODS = ("lora", "full", "qlora", "prompt", "prefix", "houlsby")
DTYPES = {"f32": "float32", "bf16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        kind: "step": a train step; "decode": greedy decoding; "load": loading a checkpoint.
        shape: The name of the model's shape.
        method: The method of a train step; for the other kinds, "nf4" if the base is quantized, else "dense".
        dtype: The compute dtype.
        rows, length: The size of a train step's batch, or the number and length of the prompts in a decoding cell.
        compiled: Whether the peer runs under torch.compile.
        runs: Number of runs that are trained side by side; the peer trains them one after the other.
    """

    kind: str
    shape: str
    method: str
    dtype: str
    rows: int = 1
    length: int = 0
    compiled: bool = False
    runs: int = 1

    @property
    def name(self) -> str:
        short = next(short for short, dtype in DTYPES.items() if dtype == self.dtype)
        batch = {"step": f"-{self.rows}x{self.length}", "decode": f"-{self.rows}", "load": ""}[self.kind]
        method = self.method if self.kind == "step" else f"{self.kind}-{self.method}"
        several = f"-{self.runs}runs" if self.runs > 1 else ""
        return f"{self.shape}-{method}-{short}{batch}{'-compiled' * self.compiled}{several}"

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields of the model's config.json."""
        return SHAPES[self.shape]

    @property
    def quantized(self) -> bool:
        return self.method in ("qlora", "nf4")

    @property
    def choices(self) -> int:
        """Number of experts per token; 0 without experts."""
        return int(self.sizes.get("num_experts_per_tok", 0))

    @property
    def work(self) -> int:
        """Tokens of a step, or of all answers; 0 for loading."""
        return {"step": self.runs * self.rows * self.length, "decode": self.rows * NEW, "load": 0}[self.kind]

    def flops(self) -> float:
        """FLOP of the matrix products of a train step; 0 for the other kinds.

        Two passes over each kernel, forward and backward to its input, and a third one, to the kernel itself, in full
        fine-tuning; three passes over the kernels of adapters and over the scores, of which the masked half is not computed.
        """
        if self.kind != "step":
            return 0.0
        width, layers, heads, head = (
            self.sizes[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")
        )
        queries, keys, mlp = heads * head, self.sizes["num_key_value_heads"] * head, self.sizes["intermediate_size"]
        attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
        feedforward = [(width, mlp), (width, mlp), (mlp, width)]
        if self.choices:  # gate and up are one kernel
            feedforward = [(width, 2 * mlp), (mlp, width)] * self.choices
        adapted = [*attention, *feedforward]
        kernels = [*adapted, (width, self.sizes.get("num_local_experts", 0))]  # with the router
        positions = self.length + (VIRTUAL if self.method == "prompt" else 0)
        seen = self.length + (VIRTUAL if self.method in ("prompt", "prefix") else 0)
        passes = 3 if self.method == "full" else 2
        a_row = passes * 2 * positions * sum(a * b for a, b in kernels) + 3 * 2 * positions * seen * queries
        if self.method in ("lora", "qlora"):
            a_row += 3 * 2 * positions * RANK * sum(a + b for a, b in adapted)
        if self.method == "houlsby":
            a_row += 3 * 2 * positions * 2 * 2 * BOTTLENECK * width
        return float(
            self.runs * self.rows * (layers * a_row + passes * 2 * self.length * width * self.sizes["vocab_size"])
        )


def _steps(shapes: tuple[str, ...], methods: tuple[str, ...], *batches: tuple[int, int]) -> list[Cell]:
    made = itertools.product(shapes, methods, DTYPES.values(), batches)
    return [Cell("step", shape, method, dtype, *batch) for shape, method, dtype, batch in made]


def _all() -> list[Cell]:
    small = _steps(("15m", "110m"), METHODS, (4, 128), (1, 64))
    large = _steps(("1.1b",), tuple(method for method in METHODS if method != "full"), (1, 64))
    mixture = _steps(("moe",), ("lora", "full"), (4, 128))
    compiled = [
        dataclasses.replace(cell, compiled=True)
        for cell in _steps(("110m",), ("lora", "full", "qlora"), (4, 128))
    ]  # fmt: skip
    together = [
        dataclasses.replace(cell, runs=runs)
        for cell in _steps(("15m",), ("lora", "qlora"), (1, 64)) for runs in (8, 32)
    ]  # fmt: skip
    bases = (("dense", "float32"), ("dense", "bfloat16"), ("nf4", "bfloat16"))
    decode = [
        Cell("decode", shape, method, dtype, rows, PROMPT)
        for shape, (method, dtype), rows in itertools.product(("135m", "1.1b"), bases, (1, 16))
    ]
    load = [Cell("load", "1.1b", method, "bfloat16") for method in ("dense", "nf4")]
    tests = [
        *_steps(("tiny",), METHODS, (2, 32)),
        *_steps(("tiny-moe",), ("lora", "full"), (2, 32)),
        Cell("step", "tiny", "lora", "float32", 2, 32, runs=2),
        Cell("decode", "tiny", "dense", "float32", 2, PROMPT),
    ]
    return [
        *small,
        *large,
        *mixture,
        *compiled,
        *together,
        *decode,
        *load,
        *tests,
        Cell("load", "tiny", "dense", "bfloat16"),
    ]


CELLS = {cell.name: cell for cell in _all()}
SHORT = ("15m-lora-f32-4x128", "15m-qlora-bf16-4x128", "110m-lora-bf16-4x128")


def select(patterns: list[str]) -> list[Cell]:
    """The cells whose names contain all the words of one of the patterns ("110m lora").

    A whole name selects only that cell; "short" and "all" are sets.

    Cells of tiny shapes are only selected by name.
    """
    sets = {name: (name,) for name in CELLS} | {
        "short": SHORT,
        "all": tuple(name for name, cell in CELLS.items() if "tiny" not in cell.shape),
    }
    names: list[str] = []
    for pattern in patterns:
        words = pattern.split()
        found = sets.get(pattern) or tuple(
            name for name, cell in CELLS.items()
            if all(word in name for word in words) and ("tiny" not in cell.shape or "tiny" in pattern)
        )  # fmt: skip
        if not found:
            raise SystemExit(f"no cell matches {pattern!r}; --list prints all of them")
        names.extend(found)
    return [CELLS[name] for name in dict.fromkeys(names)]
