"""How the LoRA of all experts of a layer follows from the LoRAs of single experts, as in transformers 4.

With A_g, B_g of an expert's gate and A_u, B_u of its `up`, the LoRA of gate_up is [A_g, A_u] and the block diagonal of B_g
and B_u. Its rank is the sum of theirs. peft does the same with transformers 5. If A_g and A_u are equal, as in files that peftjax
has written, the LoRA of gate_up is A_g and [B_g, B_u]. Experts of smaller rank are padded with zeros in A and B, which therefore
get no gradient. The magnitudes of DoRA are the gate's followed by up's; they are 0 where a file has none.
"""

from collections.abc import Mapping
from typing import Any

from peftjax.core.paths import first_match

Pattern = tuple[tuple[str, Any], ...]

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"


def table_entries(values: Mapping[str, Any], table: Pattern, default: Any) -> Pattern:
    """Entries for rank_pattern or alpha_pattern, to precede `table`, that give each module its value.

    Modules with equal endings, such as "experts.7.gate_proj" apart from the number, share one entry if their values are equal.
    """
    by_ending: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        ending = r"\.".join(r"\d+" if part.isdigit() else part for part in name[name.index("experts.") :].split("."))
        by_ending.setdefault(ending, {})[name] = value
    entries: list[tuple[str, Any]] = []
    for ending, own in by_ending.items():
        wrong = {name: value for name, value in own.items() if first_match(name, table, default) != value}
        same = len(set(own.values())) == 1
        entries += [(ending, next(iter(own.values())))] if wrong and same else wrong.items()
    return tuple(entries)
