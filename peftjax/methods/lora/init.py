"""Initial values of LoRA's A [in, R] and B [R, out]; W is the kernel [in, out], s the scale, r a layer's rank.

kaiming        A uniform within +-1/sqrt(in), B = 0: Hu et al. 2021 (arXiv:2106.09685), as in Hugging Face PEFT
gaussian       A normal with standard deviation 1/r, B = 0
orthogonal     A = N1 Q1 / 10, B = Q2^T N2 / 10, with normal N1 [in, r/2] and N2 [r/2, out], and Q1, Q2 the even and the
               odd rows of an orthogonal [r, r]. Q1 Q2^T = 0, so A B = 0 up to rounding while neither factor is zero
               (peft's init_lora_weights="orthogonal", after https://datta0.github.io/posts/rethink-lora-init)
pissa          W = U S V^T; A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r^T, so that s A B is the best approximation of W
               of rank r: Meng et al. 2024 (arXiv:2404.02948), eq. 2 and 3, where s is 1
pissa_niter_N  the same from a randomized SVD with N subspace iterations (Halko et al. 2011, arXiv:0909.4061, algorithms
               4.4 and 5.1), which takes seconds where the SVD of a large kernel takes minutes
olora          W^T = Q R; A = R_r^T, B = Q_r^T, the first r rows of R and columns of Q: Buyukakyuz 2024 (arXiv:2406.01775)
eva            A the principal directions of the layer's inputs, B = 0 (eva.py; starts as kaiming)
loftq          s A B close to the quantization error of W, loftq_niter_N by a randomized SVD (loftq.py; starts as kaiming)

PiSSA and OLoRA have a nonzero initial update, which `ResidualLora` subtracts.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from peftjax.adapters.ranks import within
from peftjax.adapters.sites import Site
from peftjax.nn.embedding import Embedding
from peftjax.nn.experts import ExpertLinear

INITS = re.compile(r"kaiming|gaussian|orthogonal|eva|olora|(pissa|loftq)(_niter_\d+)?")
RESIDUAL = re.compile(r"olora|pissa.*")

Pair = tuple[jax.Array, jax.Array]


def initial(init: str, site: Site, ranks: np.ndarray, scales: np.ndarray, rngs: nnx.Rngs) -> Pair:
    """Initial A [*stack, in, R] and B [*stack, R, out] of a site, float32, zero beyond each rank. The stack includes experts.

    For an embedding A is zero and B normal with any `init`, as in peft.

    Args:
        init: One of the words above.
        site: The layers.
        ranks: The rank of each layer, int [layers]; of experts, [layers, E].
        scales: The scale s of each, of the same shape.
        rngs: Random keys.
    """
    key, owner, rank = rngs.params(), site.module, int(ranks.max())
    stack = (*site.stack, owner.experts) if isinstance(owner, ExpertLinear) else site.stack
    a_shape, b_shape = (*stack, owner.in_features, rank), (*stack, rank, owner.out_features)
    active = within(ranks, stack)
    if isinstance(owner, Embedding):
        return jnp.zeros(a_shape), jax.random.normal(key, b_shape, jnp.float32) * active[..., None]
    if init in ("kaiming", "eva") or init.startswith("loftq"):
        bound = owner.in_features**-0.5
        a = jax.random.uniform(key, a_shape, jnp.float32, -bound, bound)
        return a * active[..., None, :], jnp.zeros(b_shape)
    if init == "gaussian":
        own = np.maximum(ranks, 1).astype(np.float32).reshape(*stack, 1, 1)
        a = jax.random.normal(key, a_shape, jnp.float32) / own
        return a * active[..., None, :], jnp.zeros(b_shape)
    keys = jax.random.split(key, len(ranks))
    pairs = [_of_layer(init, site, layer, ranks, scales, keys[layer]) for layer in range(len(ranks))]
    a = jnp.stack([pair[0] for pair in pairs]).reshape(a_shape)
    b = jnp.stack([pair[1] for pair in pairs]).reshape(b_shape)
    return a * active[..., None, :], b * active[..., None]


def _of_layer(init: str, site: Site, layer: int, ranks: np.ndarray, scales: np.ndarray, key: jax.Array) -> Pair:
    """A and B of one layer, padded with zeros to the largest rank. Layer by layer, so that only one float32 kernel is in
    memory at a time."""
    owner, rank = site.module, int(ranks[layer])
    if not rank:
        return jnp.zeros((owner.in_features, ranks.max())), jnp.zeros((ranks.max(), owner.out_features))
    with jax.default_matmul_precision("highest"):
        if init == "orthogonal":
            a, b = _orthogonal(owner.in_features, owner.out_features, rank, key)
        else:
            kernel = jax.tree.map(lambda leaf: leaf[layer] if site.stack else leaf, site.kernel)
            a, b = of_kernel(init, kernel.astype(jnp.float32), rank, float(scales[layer]), key)
    missing = int(ranks.max()) - rank
    return jnp.pad(a, ((0, 0), (0, missing))), jnp.pad(b, ((0, missing), (0, 0)))


def _orthogonal(inputs: int, outputs: int, rank: int, key: jax.Array) -> Pair:
    keys = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))[0]
    a = jax.random.normal(keys[1], (inputs, rank // 2)) @ q[0::2]
    b = q[1::2].T @ jax.random.normal(keys[2], (rank // 2, outputs))
    return a / 10, b / 10


def of_kernel(init: str, kernel: jax.Array, rank: int, scale: float | jax.Array, key: jax.Array) -> Pair:
    """A [in, r] and B [r, out] from a kernel [in, out], for "olora", "pissa" and "pissa_niter_N"."""
    if init == "olora":
        q, r = jnp.linalg.qr(kernel.T)
        return r[:rank].T, q[:, :rank].T
    if init == "pissa":
        u, values, vt = jnp.linalg.svd(kernel, full_matrices=False)
    else:
        u, values, vt = randomized_svd(kernel, rank, int(init.rsplit("_", 1)[1]), key)
    root = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * root[None], root[:, None] * vt[:rank]


def randomized_svd(
    kernel: jax.Array, rank: int, iterations: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate the first `rank` singular triples: U [in, r], S [r] and V^T [r, out].

    The random range has `rank` columns, without oversampling, as in peft.
    """
    q = jnp.linalg.qr(kernel @ jax.random.normal(key, (kernel.shape[1], rank)))[0]
    power = lambda _, q: jnp.linalg.qr(kernel @ jnp.linalg.qr(kernel.T @ q)[0])[0]  # noqa: E731
    q = jax.lax.fori_loop(0, iterations, power, q)
    u, values, vt = jnp.linalg.svd(q.T @ kernel, full_matrices=False)
    return q @ u, values, vt
