"""LoftQ: LoRA over a quantized base Q(W) begins with s A B near W - Q(W), which is what quantizing took away.

Li et al. 2023 (arXiv:2310.08659), algorithm 1 with T = 1: s A B is the best approximation of rank r. The base stays as it
is, so any base quantized in the same way can take the adapter; with more rounds it would be quantized anew between them.
That is what Hugging Face PEFT's replace_lora_weights_loftq does to a loaded base, but for s, which it takes for 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.adapters.sites import Site
from peftjax.methods.lora.adapter import LoraLinear
from peftjax.methods.lora.dora import DoraLinear
from peftjax.methods.lora.init import of_kernel
from peftjax.quant.base import Quantized

# Of a module's path and a layer (None: it is not stacked), its kernel [in, out] as it was before it was quantized.
Kernels = Callable[[str, int | None], np.ndarray]


def begin(init: str, site: Site, adapter: LoraLinear, kernels: Kernels, key: jax.Array) -> None:
    """Set A and B of a site; one whose kernel is not quantized keeps those that it has. A layer at a time, on the host.

    init: "loftq", or "loftq_niter_N" with a randomised SVD of N iterations, as for PiSSA.
    """
    if not isinstance(site.kernel, Quantized):
        return
    a, b = (np.array(leaf.get_value()) for leaf in (adapter.a, adapter.b))
    for index, (layer, rank) in enumerate(zip(site.layers, adapter.ranks, strict=True)):
        if not rank:
            continue
        one: Any = site.kernel if layer is None else jax.tree.map(lambda leaf, layer=layer: leaf[layer], site.kernel)
        lost = jnp.asarray(kernels(site.path, layer), jnp.float32) - one.astype(jnp.float32)
        scale = float(adapter.scale.get_value().reshape(len(adapter.ranks), -1)[index, 0])
        with jax.default_matmul_precision("highest"):
            factors = of_kernel(init.replace("loftq", "pissa"), lost, rank, scale, jax.random.fold_in(key, index))
        at = () if layer is None else (layer,)
        a[(*at, slice(None), slice(rank))], b[(*at, slice(rank))] = factors
    for leaf, value in ((adapter.a, a), (adapter.b, b)):
        leaf.set_value(jax.device_put(value, leaf.get_value().sharding))
    if isinstance(adapter, DoraLinear):
        adapter.measure(site.kernel)
