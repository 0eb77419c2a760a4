"""Which kernels of a model are quantized, and what brings each one into its format."""

from collections.abc import Callable, Sequence
from typing import Any

from peftjax.core.paths import matches, suggest, unmatched
from peftjax.io.bitsandbytes import Packed
from peftjax.io.entries import Entry, is_linear
from peftjax.quant import FORMATS

Encode = Callable[[Any], Any]  # makes a quantized kernel of an array [in, out]; an `Unpack`, of its stored parts


def encoders(model: Any, table: Sequence[Entry], quantize: str | None, skip: Sequence[str]) -> dict[str, Encode]:
    """What brings a kernel into its format, by its path, for those that are to be quantized."""
    if not quantize:
        if skip:
            raise ValueError(f"skip={tuple(skip)!r} (model.skip_quantize) means something only where quantize is given")
        return {}
    if quantize not in FORMATS:
        raise ValueError(
            f"quantize={quantize!r} is no format.{suggest(quantize, FORMATS)} Formats: {', '.join(FORMATS)}"
        )
    chosen: dict[str, Encode] = {}
    names: list[str] = []
    for entry in table:
        if not is_linear(model, entry) or entry.module in model.output_layers:
            continue
        modules = entry.hf_modules
        names += modules
        skipped = [name for name in modules if matches(name, tuple(skip))]
        if skipped and len(skipped) < len(modules):
            raise ValueError(
                f"skip (model.skip_quantize): {skipped[0]} is one layer of several, which share one format; name them all"
            )
        if not skipped:
            chosen[entry.path] = FORMATS[quantize]
    if missing := unmatched(names, tuple(skip)):
        last = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ValueError(
            f"skip (model.skip_quantize): {missing[0]!r} is no module with a kernel to quantize.{suggest(missing[0], last)} "
            f"There are: {', '.join(last)}"
        )
    return chosen


def unpackers(model: Any, table: Sequence[Entry], tensors: dict[str, Any]) -> dict[str, Encode]:
    """`encoders` of a model whose file holds kernels in NF4 already."""
    chosen: dict[str, Encode] = {}
    for entry in table:
        kinds = {key: tensors[key].unpack if isinstance(tensors[key], Packed) else None for key in entry.keys}
        one, *others = kinds
        if differing := [key for key in others if kinds[key] != kinds[one]]:
            told = [
                f"{key} is {f'{kind.format} of {kind.dtype}' if (kind := kinds[key]) else 'not quantized'}"
                for key in (one, differing[0])
            ]
            raise ValueError(f"{told[0]} and {told[1]}: the layers of a stack share one format")
        if (unpack := kinds[one]) is None:
            continue
        if not is_linear(model, entry):
            raise ValueError(f"{one} is stored in {unpack.format}, which is read as the kernel of a linear layer only")
        chosen[entry.path] = unpack
    return chosen
