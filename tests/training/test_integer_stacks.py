"""On one CPU, loops store bfloat16 as integers, with the same results."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from peftjax import sharding
from peftjax.training.integer_stacks import with_integer_stacks
from peftjax.training.step import accumulate
from tests.training.test_residuals import LAYERS, step_of


def stacks(program: Any) -> Iterator[jax.core.ShapedArray]:
    """The stacked results of every loop over layers in a program."""
    jaxpr = getattr(program, "jaxpr", program)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == LAYERS:
            pairs = zip(equation.outvars, equation.params["jaxpr"].jaxpr.outvars, strict=True)
            yield from (whole.aval for whole, one in pairs if len(whole.aval.shape) > len(one.aval.shape))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                    yield from stacks(inner)


def loops(kernels: jax.Array, x: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
    """Loops that carry and share values, read stacks of other loops, run in reverse, and contain a loop."""

    def forward(carry: tuple[jax.Array, jax.Array], kernel: jax.Array) -> tuple[Any, Any]:
        x, total = carry
        y = jnp.tanh(x @ kernel)
        inner = jax.lax.scan(lambda sum_, row: (sum_ + row, sum_), jnp.zeros_like(y[0]), y)[1]
        return (x + y, total + y.astype(jnp.float32)), (y, inner, y.astype(jnp.float32))

    (x, total), (ys, inner, exact) = jax.lax.scan(forward, (x, jnp.zeros(x.shape)), kernels)
    last = ys[-1]

    def backward(carry: jax.Array, parts: Any) -> tuple[jax.Array, jax.Array]:
        y, inner, i = parts
        return carry + y * i.astype(y.dtype), carry + inner + last

    _, reverse = jax.lax.scan(backward, jnp.zeros_like(x), (ys, inner, index), reverse=True)
    return {"x": x, "total": total, "ys": ys, "exact": exact, "reverse": reverse}


def test_loops_store_integers_and_return_equal_results() -> None:
    rng = np.random.default_rng(0)
    kernels = jnp.asarray(rng.normal(size=(LAYERS, 4, 4)), jnp.bfloat16)
    arguments = (kernels, jnp.asarray(rng.normal(size=(2, 4)), jnp.bfloat16), jnp.arange(LAYERS))
    stored = with_integer_stacks(loops)
    assert [aval.dtype for aval in stacks(jax.make_jaxpr(loops)(*arguments))].count(jnp.bfloat16) == 3
    dtypes = [aval.dtype for aval in stacks(jax.make_jaxpr(stored)(*arguments))]
    assert sorted(map(str, dtypes)) == ["float32", "uint16", "uint16", "uint16"]
    expected, found = loops(*arguments), stored(*arguments)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    compiled = jax.jit(stored).lower(*arguments).compile().as_text()
    assert compiled is not None
    assert not re.search(rf"= bf16\[{LAYERS},2,4\]\S* convert\(", compiled)  # no loop rewrites a whole stack


@pytest.mark.parametrize("remat", ["none", "block"])
def test_a_train_step_on_one_cpu_stores_the_same_arrays_as_integers(remat: str) -> None:
    objective, _, state, frozen, batch = step_of("bfloat16", remat)
    microbatches = {name: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype) for name, leaf in batch.items()}

    def gradients(state: Any, frozen: Any, batch: Any) -> Any:
        return accumulate(objective, state, frozen, batch)

    plain = list(stacks(jax.make_jaxpr(gradients)(state, frozen, microbatches)))
    mesh = sharding.make_mesh({"fsdp": 1}, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        stored = list(stacks(jax.make_jaxpr(gradients)(state, frozen, microbatches)))
    replaced = {np.dtype(jnp.bfloat16): np.dtype(np.uint16)}
    assert [(x.shape, replaced.get(x.dtype, x.dtype)) for x in plain] == [(x.shape, x.dtype) for x in stored]
    assert any(x.dtype == jnp.bfloat16 for x in plain)
