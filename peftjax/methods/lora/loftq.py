"""LoftQ: LoRA over a quantized base Q(W), initialized so that s A B is close to the quantization error W - Q(W).

Li et al. 2023 (arXiv:2310.08659), algorithm 1 with T = 1: s A B is the best approximation of rank r. The base does not
change, so the adapter fits any base that is quantized in the same way; more iterations would quantize the base again.
Hugging Face PEFT's replace_lora_weights_loftq does the same to a loaded base, except that it assumes s = 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.adapters.method import Kernels
from peftjax.adapters.sites import Site
from peftjax.methods.lora.adapter import LoraLinear
from peftjax.methods.lora.dora import DoraLinear
from peftjax.methods.lora.init import Pair, of_kernel
from peftjax.quant.base import Quantized


def begin(init: str, site: Site, adapter: LoraLinear, kernels: Kernels, key: jax.Array) -> None:
    """Initialize A and B of a site with a quantized kernel, one layer at a time on the host.

    Args:
        init: "loftq", or "loftq_niter_N" for a randomized SVD with N iterations, as for PiSSA.
        site: The layers. If their kernel is not quantized, A and B stay as they are.
        adapter: The adapter of the site.
        kernels: The kernels before quantization.
        key: A random key.
    """
    if not isinstance(site.kernel, Quantized):
        return
    a, b = (np.array(leaf.get_value()) for leaf in (adapter.a, adapter.b))
    scales = np.asarray(adapter.scale.get_value()).reshape(len(adapter.ranks), -1)[:, 0]
    for index, (layer, rank) in enumerate(zip(site.layers, adapter.ranks, strict=True)):
        if not rank:
            continue
        exact = jnp.asarray(kernels(site.path, layer), jnp.float32)
        with jax.default_matmul_precision("highest"):
            factors = _factors(init, exact, site.kernel, layer, rank, scales[index], jax.random.fold_in(key, index))
        at = () if layer is None else (layer,)
        a[(*at, slice(None), slice(rank))], b[(*at, slice(rank))] = factors
    for leaf, value in ((adapter.a, a), (adapter.b, b)):
        leaf.set_value(jax.device_put(value, leaf.get_value().sharding))
    if isinstance(adapter, DoraLinear):
        adapter.measure(site.kernel)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _factors(
    init: str, exact: jax.Array, kernel: Any, layer: jax.Array | None, rank: int, scale: jax.Array, key: jax.Array
) -> Pair:
    """A and B of one layer of a quantized kernel, whose values were `exact` [in, out]."""
    one = kernel if layer is None else jax.tree.map(lambda leaf: leaf[layer], kernel)
    return of_kernel(init.replace("loftq", "pissa"), exact - one.astype(jnp.float32), rank, scale, key)
