"""The tables of docs/qlora.md: bits and error of NF4 by block size, and the bytes of models by their shapes.

python benchmarks/nf4_arithmetic.py
"""

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.quant import nf4

GIB = 2**30
MODELS = {  # embed, mlp, layers, kv heads * head dim, vocab
    "LLaMA 7B": (4096, 11008, 32, 4096, 32000),
    "LLaMA 13B": (5120, 13824, 40, 5120, 32000),
    "LLaMA 33B": (6656, 17920, 60, 6656, 32000),
    "LLaMA 65B": (8192, 22016, 80, 8192, 32000),
    "Llama 3 8B": (4096, 14336, 32, 1024, 128256),
    "Llama 3 70B": (8192, 28672, 80, 1024, 128256),
}


def error(block: int) -> float:
    """The root mean square error of normal weights in blocks of this size, relative to their root mean square."""
    weights = np.random.default_rng(0).normal(size=(2**20 // block, block)).astype(np.float32)
    absmax = np.abs(weights).max(1, keepdims=True)
    codes = np.searchsorted((nf4.CODEBOOK[1:] + nf4.CODEBOOK[:-1]) / 2, weights / absmax)
    return float(np.sqrt(np.square(nf4.CODEBOOK[codes] * absmax - weights).mean() / np.square(weights).mean()))


def requantized(change: float) -> tuple[float, float]:
    """The error of requantizing an NF4 kernel after a random rank-16 update of this relative size, relative to the kernel
    and relative to the update."""
    rng = np.random.default_rng(0)
    old = rounded(rng.normal(size=(1024, 1024)).astype(np.float32))
    delta = (rng.normal(size=(1024, 16)) @ rng.normal(size=(16, 1024))).astype(np.float32)
    delta *= change * np.linalg.norm(old) / np.linalg.norm(delta)
    moved = np.linalg.norm(rounded(old + delta) - old - delta)
    return float(moved / np.linalg.norm(old)), float(moved / np.linalg.norm(delta))


def rounded(kernel: np.ndarray) -> np.ndarray:
    """A float32 kernel after quantization."""
    return np.asarray(nf4.quantize(jnp.asarray(kernel)).astype(np.float32))


def linear(embed: int, mlp: int, kv: int) -> list[tuple[int, int]]:
    return [(embed, embed), (embed, kv), (embed, kv), (embed, embed), (embed, mlp), (embed, mlp), (mlp, embed)]


def nf4_bytes(inputs: int, outputs: int) -> float:
    made = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct((inputs, outputs), np.float32))
    return sum(leaf.size * (0.5 if leaf is made.codes else leaf.dtype.itemsize) for leaf in jax.tree.leaves(made))


def main() -> None:
    print("| block | bits, single | bits, double | error |\n|---|---|---|---|")
    for block in (16, 32, 64, 128, 256, 1024):
        single, double = 4 + 32 / block, 4 + 8 / block + 32 / (block * nf4.GROUP)
        print(f"| {block} | {single:.3f} | {double:.3f} | {error(block):.2%} |")
    print("\n| update | error / kernel | error / update |\n|---|---|---|")
    for change in (0.003, 0.01, 0.03, 0.1, 0.3):
        print(f"| {change:.1%} | " + " | ".join(f"{moved:.1%}" for moved in requantized(change)) + " |")
    print(
        "\n| | kernels | bf16 | NF4 | embedding, head, norms | LoRA 16 | LoRA 64 | NF4, LoRA 16 |\n|---|---|---|---|---|---|---|---|"
    )
    for name, (embed, mlp, layers, kv, vocab) in MODELS.items():
        kernels = linear(embed, mlp, kv)
        count = layers * sum(i * o for i, o in kernels)
        packed = layers * sum(nf4_bytes(i, o) for i, o in kernels)
        others = 2 * (2 * vocab * embed + (2 * layers + 1) * embed)
        lora = [
            3 * 4 * layers * rank * sum(i + o for i, o in kernels) for rank in (16, 64)
        ]  # the parameters and two moments
        numbers = (2 * count, packed, others, *lora, packed + others + lora[0])
        print(f"| {name} | {count / 1e9:.2f} G | " + " | ".join(f"{number / GIB:.2f}" for number in numbers) + " |")
        assert packed * 8 / count <= 4.13


if __name__ == "__main__":
    main()
