"""Which bottleneck method the `config` of AdapterHub's adapter_config.json describes."""

from typing import Any

from peftjax.core.errors import UserError
from peftjax.methods.bottleneck.bottleneck import FLOWS, Bottleneck, Houlsby, ParallelAdapter, Pfeiffer


def from_hub(config: dict[str, Any]) -> Bottleneck:
    """The method that the `config` of AdapterHub's adapter_config.json describes.

    Raises:
        UserError: It does not describe a bottleneck adapter, or asks for something that is not supported.
    """
    if config.get("architecture") is not None:
        raise UserError(
            f"adapter_config.json: architecture={config['architecture']!r} of AdapterHub is not supported; only "
            "bottleneck adapters are"
        )
    flow = {key: config.get(key, default) for key, default in FLOWS.items()}
    parallel, before, after, around = flow.values()
    if parallel and after:
        return ParallelAdapter.from_hf(config)
    if after and not before and not parallel:
        return Houlsby.from_hf(config)
    norm_of_sum = config.get("ln_after") and config.get("adapter_residual_before_ln")
    if before and not parallel and ((after, around) == (True, True) or (not after and not around and not norm_of_sum)):
        return Pfeiffer.from_hf(config)
    said = ", ".join(f"{key}={value!r}" for key, value in flow.items())
    raise UserError(
        f"adapter_config.json: {said} is not supported: a block must give x + f(x) plus the output of the adapter"
    )
