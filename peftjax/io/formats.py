"""Which kernels of a model are quantized, and the functions that quantize them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peftjax.core.errors import UserError
from peftjax.core.paths import matches, suggest, unmatched
from peftjax.io.bitsandbytes import Packed, Stored
from peftjax.io.entries import Entry, is_linear, is_router
from peftjax.models.base import Model
from peftjax.quant import FORMATS
from peftjax.quant import quantize as encode
from peftjax.quant.base import Quantized

Encode = Callable[[Any], Quantized]  # from a kernel [in, out]; an `Unpack`: from the arrays of a stored kernel


def encoders(model: Model, table: Sequence[Entry], quantize: str | None, skip: Sequence[str]) -> dict[str, Encode]:
    """Return the functions that quantize kernels to the format `quantize`, by path; none if it is None or empty.

    The modules in `skip`, whole names or name endings, are left unquantized.

    Raises:
        UserError: An unknown format, or names that match no kernel or some layers of a stack only.
    """
    if isinstance(skip, str):
        raise UserError(f"skip={skip!r} (model.skip_quantize) is one string; give a tuple of names: ({skip!r},)")
    if not quantize:
        if skip:
            raise UserError(f"skip={tuple(skip)!r} (model.skip_quantize) needs quantize")
        return {}
    if quantize not in FORMATS:
        raise UserError(
            f"quantize={quantize!r} is not a format.{suggest(str(quantize), FORMATS)} Formats: {', '.join(FORMATS)}"
        )
    chosen: dict[str, Encode] = {}
    names: list[str] = []
    for entry in table:
        if not is_linear(model, entry) or entry.module in model.output_layers or is_router(model, entry):
            continue
        modules = entry.hf_modules
        names += modules
        skipped = [name for name in modules if matches(name, (*skip, *model.hf_dense))]
        if skipped and len(skipped) < len(modules):
            raise UserError(
                f"skip (model.skip_quantize): {skipped[0]} is one of several layers that share one format; name them all"
            )
        if not skipped:
            of_experts = len(entry.shape) - entry.stacked > 2
            chosen[entry.path] = partial(encode, format_=quantize) if of_experts else FORMATS[quantize]
    if missing := unmatched(names, tuple(skip)):
        last = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(
            f"skip (model.skip_quantize): {missing[0]!r} is not a module with a kernel to quantize.{suggest(missing[0], last)} "
            f"Modules: {', '.join(last)}"
        )
    return chosen


def unpackers(model: Model, table: Sequence[Entry], tensors: Mapping[str, Stored]) -> dict[str, Encode]:
    """Return the function that unpacks each kernel stored in NF4, by path; `tensors` has the keys of the table.

    Raises:
        UserError: The layers of a stack have different formats, or a parameter that is not a kernel is quantized.
    """
    chosen: dict[str, Encode] = {}
    for entry in table:
        kinds = {key: tensor.unpack if isinstance(tensor := tensors[key], Packed) else None for key in entry.keys}
        one, *others = kinds
        if differing := [key for key in others if kinds[key] != kinds[one]]:
            first, second = (
                f"{key} is {f'{kind.format} of {kind.dtype}' if (kind := kinds[key]) else 'not quantized'}"
                for key in (one, differing[0])
            )
            raise UserError(f"{first} and {second}: the layers of a stack must have one format")
        if (unpack := kinds[one]) is None:
            continue
        if not is_linear(model, entry):
            raise UserError(f"{one} is stored in {unpack.format}, which is supported for kernels of linear layers only")
        chosen[entry.path] = unpack
    return chosen
