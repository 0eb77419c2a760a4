"""Routing, experts compared with a plain loop, and the load-balancing loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from peftjax import adapters, methods, quant, sharding
from peftjax.adapters.sites import Site
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.core.variables import PeftConstant, PeftParam
from peftjax.methods.ia3 import Ia3Experts
from peftjax.methods.lora.dora import DoraLinear
from peftjax.methods.lora.experts import DoraExperts
from peftjax.methods.vera import VeraExperts
from peftjax.nn.experts import ExpertLinear, Groups, make_groups
from peftjax.nn.feedforward import silu
from peftjax.nn.linear import Linear
from peftjax.nn.moe import ClampedExperts, Experts
from peftjax.nn.routing import load_balancing_loss, route
from peftjax.quant import grouped
from peftjax.totals import balanced_next_token_loss
from tests import tiny

EXPERTS, CHOICES, WIDTH, HIDDEN = 4, 2, 16, 12


def experts() -> Experts:
    return Experts(EXPERTS, WIDTH, HIDDEN, activation=silu, stddev=0.3, dtype=jnp.float32, rngs=nnx.Rngs(0))


def clamped() -> Experts:
    """The experts of gpt-oss, with biases and about half of the hidden activations clamped."""
    common: dict[str, Any] = {"activation": silu, "stddev": 0.3, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    layer = ClampedExperts(EXPERTS, WIDTH, HIDDEN, alpha=1.3, limit=0.7, **common)
    for part in (layer.gate_up, layer.down):
        part.bias.set_value(jax.random.normal(jax.random.key(2), part.bias.shape))
    return layer


def inputs(rows: int = 8, length: int = 5) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, weights and choices; expert 3 gets no token and expert 0 most."""
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (rows, length, WIDTH))
    logits = jax.random.normal(keys[1], (rows, length, EXPERTS)) + jnp.array([3.0, 0.0, 0.0, -1e9])[None, None]
    return x, *route(logits, CHOICES)


def by_loop(layer: Experts, x: jax.Array, weights: jax.Array, chosen: jax.Array) -> jax.Array:
    """Every expert on every token."""
    total = jnp.zeros_like(x)
    for expert in range(EXPERTS):
        weight = jnp.where(chosen == expert, weights, 0).sum(-1, keepdims=True)
        if isinstance(layer, ClampedExperts):
            both = x @ layer.gate_up.kernel[expert] + layer.gate_up.bias[expert][None, None]
            gate, up = jnp.minimum(both[..., ::2], 0.7), jnp.clip(both[..., 1::2], -0.7, 0.7)
            y = (gate * jax.nn.sigmoid(1.3 * gate) * (up + 1)) @ layer.down.kernel[expert]
            total += weight * (y + layer.down.bias[expert][None, None])
            continue
        gate, up = jnp.split(x @ layer.gate_up.kernel[expert], 2, axis=-1)
        total += weight * ((silu(gate) * up) @ layer.down.kernel[expert])
    return total


def outcome(compute: Any, layer: Experts, *inputs: jax.Array) -> Any:
    """The output, and a loss's gradients of the parameters, the tokens and the weights."""
    graph, state, rest = nnx.split(layer, (nnx.Param, PeftParam), ...)

    def loss(state: Any, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = compute(nnx.merge(graph, state, rest), x, weights, inputs[2])
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(state, *inputs[:2])


def assert_close(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), found, expected)


@pytest.mark.slow_cases
@pytest.mark.parametrize("make", [experts, clamped])
def test_experts_and_their_gradients_are_those_of_a_loop(make: Any) -> None:
    layer, given = make(), inputs()
    assert_close(outcome(Experts.__call__, layer, *given), outcome(by_loop, layer, *given))


def test_second_derivatives_of_experts_are_those_of_a_loop() -> None:
    graph, state = nnx.split(experts())
    x, weights, chosen = inputs()

    def curvature(compute: Any) -> Any:
        loss = lambda *given: jnp.sum(jnp.sin(compute(nnx.merge(graph, given[0]), *given[1:], chosen)))  # noqa: E731
        gradients = lambda *given: jax.tree.leaves(jax.grad(loss, (0, 1, 2))(*given))  # noqa: E731
        along = lambda *given: sum(jnp.sum(jnp.cos(part)) for part in gradients(*given))  # noqa: E731
        return jax.jit(jax.grad(along, (0, 1, 2)))(state, x, weights)

    found, expected = curvature(Experts.__call__), curvature(by_loop)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)


def with_vectors(layer: Experts) -> Experts:
    """The experts with an (IA)3 and a VeRA of some layers of single experts, and random values."""
    model = tiny.model(model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=CHOICES)
    some = np.array([True, True, False, True])[None, :, None]  # [layers, E, parts]
    a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((WIDTH, 3), (3, WIDTH))))
    shared = PeftConstant(a, axes=(None, "rank")), PeftConstant(b, axes=("rank", None))
    for part, name in ((layer.gate_up, "gate_up_proj"), (layer.down, "down_proj")):
        site = Site("", part, (f"experts.{name}",), (), model)
        mask = np.repeat(some, len(site.parts), axis=2)
        into = mask & (name == "down_proj")
        part.adapters.add("ia3", Ia3Experts(site, into, mask & ~into))
        part.adapters.add("vera", VeraExperts(site, ~mask, *shared, d_initial=0.1, dropout=0.0))
        part.adapters.active = ("ia3", "vera")
    return tiny.randomize(layer)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("sizes", "make"),
    [
        ({"fsdp": 2, "sequence": 2, "tensor": 2}, experts),
        ({"tensor": 8}, experts),
        ({"fsdp": 4, "tensor": 2}, clamped),
        pytest.param({"fsdp": 2, "tensor": 4}, lambda: with_vectors(experts()), marks=pytest.mark.slow),
    ],
)
def test_sharded_experts_equal_those_on_one_device(sizes: dict[str, int], make: Any) -> None:
    """On a mesh of 8 devices that splits tokens, experts or both; eight devices cannot split four experts."""
    layer, given = make(), inputs(length=4)
    expected = outcome(Experts.__call__ if layer.down.adapters.active else by_loop, layer, *given)
    mesh = sharding.make_mesh(sizes)
    sharding.place(layer, mesh)
    with jax.set_mesh(mesh):
        assert_close(outcome(Experts.__call__, layer, *given), expected)


@pytest.mark.slow
def test_shards_of_tokens_draw_different_dropout_masks() -> None:
    fields = {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": CHOICES}
    model = adapters.attach(
        tiny.model(**fields), methods.Lora(rank=2, dropout=0.5, targets=("gate_up_proj",)), rngs=nnx.Rngs(0)
    )
    lora = model.blocks.feedforward.experts.gate_up.adapters.default
    lora.b.set_value(jnp.ones_like(lora.b.get_value()))
    mesh, tokens = sharding.make_mesh({"fsdp": 4, "tensor": 2}), jnp.ones((8, 4), jnp.int32)  # two equal rows on each
    sharding.place(model, mesh)

    def logits() -> np.ndarray:
        with jax.set_mesh(mesh):
            return np.asarray(model(tokens))

    np.testing.assert_allclose(logits()[:2], logits()[2:4], atol=1e-6)
    model.train()
    assert np.abs(logits()[:2] - logits()[2:4]).max() > 1e-2


def test_a_device_with_some_of_the_experts_computes_only_their_rows() -> None:
    chosen = jnp.tile(jnp.arange(EXPERTS)[:, None], (16, 1))  # 16 tokens each
    groups = make_groups(chosen, EXPERTS, 1, first=2)
    assert groups.used * groups.rows == 16
    np.testing.assert_array_equal(groups.source[:16], np.flatnonzero(chosen[:, 0] == 2))


def test_ragged_dot_computes_the_same_as_one_block_after_another() -> None:
    """The two implementations; each platform compiles one of them."""
    chosen = inputs()[2].reshape(-1, CHOICES)
    groups = make_groups(chosen, EXPERTS, EXPERTS)
    assert groups.used < len(groups.owner)  # some blocks are not used
    rows = groups.spread(jax.random.normal(jax.random.key(2), (len(chosen), WIDTH)))
    args = (experts().gate_up.kernel.get_value(), groups.owner, groups.used)

    @jax.jit
    def both() -> Any:
        y = grouped._one_by_one(rows, *args)
        ragged = (
            grouped._ragged(rows, *args),
            grouped._ragged_transposed(y, *args),
            grouped._ragged_of_kernel(y, rows, *args),
        )
        return ragged, (y, grouped._one_by_one(y, *args, transposed=True), grouped._of_kernel(y, rows, *args))

    assert_close(*both())


def with_dora(layer: Experts) -> Experts:
    """The experts with a DoRA of rank 2 and random values."""
    keys = jax.random.split(jax.random.key(4), 6)
    for i, part in enumerate((layer.gate_up, layer.down)):
        shapes = (
            ((EXPERTS, part.in_features, 2), ("expert", None, "rank")),
            ((EXPERTS, 2, part.out_features), ("expert", "rank", None)),
        )
        a, b = (
            PeftParam(0.3 * jax.random.normal(keys[2 * i + j], shape), axes=axes)
            for j, (shape, axes) in enumerate(shapes)
        )
        dora = DoraExperts((2,), PeftConstant(jnp.full((EXPERTS, 2), 0.5), axes=("expert", "rank")), a, b)
        dora.measure(part.kernel.get_value())
        a.set_value(2 * a.get_value())  # the ratio of magnitude and norm is not 1
        part.adapters.add("default", dora)
        part.adapters.active = ("default",)
    return layer


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("format_", "adapt"), [("nf4", lambda layer: layer), ("nf4", with_dora), ("int8", with_dora), ("nf4", with_vectors)]
)
def test_quantized_experts_equal_decoded_ones_without_decoding_them_all(format_: str, adapt: Any) -> None:
    layer, given = experts(), inputs()
    decoded = experts()
    for part in ("gate_up", "down"):
        kernel = quant.quantize(getattr(layer, part).kernel.get_value(), format_)
        getattr(layer, part).kernel.set_value(kernel)
        getattr(decoded, part).kernel.set_value(kernel.astype(jnp.float32))

    def both(layer: Experts) -> Any:
        """The output and the gradients."""
        graph, adapter, base = nnx.split(adapt(layer), PeftParam, ...)

        def loss(adapter: Any, x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = nnx.merge(graph, adapter, base)(x, weights, given[2])
            return jnp.sin(y).sum(), y

        return functools.partial(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), adapter)

    assert_close(jax.jit(both(layer))(*given[:2]), jax.jit(both(decoded))(*given[:2]))
    shapes = {tuple(aval.shape) for aval in arrays_in(jax.make_jaxpr(both(layer))(*given[:2]).jaxpr)}
    for kernel in (layer.gate_up.kernel, layer.down.kernel):
        assert kernel.shape not in {shape for shape in shapes if len(shape) == 3}, "all experts were decoded at once"


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("format_", "adapt"), [("nf4", with_dora), ("int8", lambda layer: layer), ("int8", with_vectors)]
)
def test_a_population_decodes_one_expert_of_each_member_at_a_time(format_: str, adapt: Any) -> None:
    layer, members = experts(), 3
    for part in (layer.gate_up, layer.down):
        part.kernel.set_value(quant.quantize(part.kernel.get_value(), format_))
    graph, adapter, base = nnx.split(adapt(layer), PeftParam, ...)
    loss = lambda adapter, *given: jnp.sin(nnx.merge(graph, adapter, base)(*given)).sum()  # noqa: E731
    given = [jax.tree.map(lambda leaf: jnp.stack([leaf] * members), value) for value in (adapter, *inputs(length=2))]
    arrays = arrays_in(jax.make_jaxpr(jax.vmap(jax.grad(loss, argnums=(0, 1))))(*given).jaxpr)  # blocks of 8 rows
    for kernel in (layer.gate_up.kernel, layer.down.kernel):
        kernels = {aval.shape[:-2] for aval in arrays if sorted(aval.shape[-2:]) == sorted(kernel.shape[-2:])}
        assert max(map(np.prod, kernels)) == members, kernels


def test_a_dora_of_one_expert_is_that_of_a_linear_layer() -> None:
    """With dropout; a magnitude of 0 stands for no magnitude in experts."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, kernel = jax.random.normal(keys[0], (3, 8, WIDTH)), jax.random.normal(keys[1], (WIDTH, HIDDEN))
    a, b = (0.5 * jax.random.normal(key, shape) for key, shape in zip(keys[2:], ((WIDTH, 2), (2, HIDDEN)), strict=True))
    common: dict[str, Any] = {"axes": (None, None), "stddev": 1.0, "dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    linear, layer = Linear(WIDTH, HIDDEN, **common), ExpertLinear(1, WIDTH, HIDDEN, **common)
    groups = Groups(jnp.zeros(3, int), jnp.array(3), jnp.arange(24), jnp.arange(24)[:, None], 8)
    outputs = []
    for kind, each, lead, given in ((DoraLinear, linear, (), ()), (DoraExperts, layer, ("expert",), (groups,))):
        stacked = lambda value, lead=lead: value[None] if lead else value  # noqa: E731
        each.kernel.set_value(stacked(kernel))
        scale = PeftConstant(stacked(jnp.array([0.5, 2.0])), axes=(*lead, "rank"))
        factors = [PeftParam(stacked(value), axes=(*lead, None, None)) for value in (a, b)]
        dora = kind((2,), scale, *factors, 0.5)
        dora.measure(each.kernel.get_value())
        dora.magnitude.set_value(1.5 * dora.magnitude.get_value())
        each.adapters.add("default", dora)
        each.adapters.active = ("default",)
        each.train()
        outputs.append(each(x, *given))
    np.testing.assert_allclose(*outputs, atol=1e-5)
    dora.magnitude.set_value(dora.magnitude.get_value().at[0, 3].set(0))
    without = layer(x, groups)[..., 3]
    update = dora._update(dora.dropout(x), groups)[..., 3]
    np.testing.assert_allclose(without, (x @ kernel)[..., 3] + update, atol=1e-5)


def arrays_in(jaxpr: Any) -> list[Any]:
    """The floating-point arrays that a jaxpr computes, in nested ones too."""
    found = []
    for equation in jaxpr.eqns:
        found += [v.aval for v in equation.outvars if jnp.issubdtype(getattr(v.aval, "dtype", np.int32), np.floating)]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found += arrays_in(inner) if hasattr(inner, "eqns") else []
    return found


def test_a_frozen_kernel_keeps_no_activations() -> None:
    """The inputs of a kernel are kept for the backward pass only if the kernel is trained."""
    layer, (x, weights, chosen) = experts(), inputs()
    graph, state = nnx.split(layer)
    run = lambda state, x: nnx.merge(graph, state)(x, weights, chosen)  # noqa: E731
    kept = lambda function, *args: jax.tree.leaves(jax.vjp(function, *args)[1])  # noqa: E731
    rows = lambda arrays: sum(array.shape[-1:] == (WIDTH,) and array.ndim == 3 for array in arrays)  # noqa: E731
    assert rows(kept(functools.partial(run, state), x)) < rows(kept(run, state, x))


def test_no_condition_returns_the_gradient_of_all_experts() -> None:
    """XLA:GPU would copy it for every block."""
    rows, shape = jnp.ones((6, 8, WIDTH)), (EXPERTS, WIDTH, WIDTH)
    given = rows, rows, jnp.ones(shape), jnp.arange(6) // 2, jnp.array(5)
    (loop,) = eqns_of(jax.make_jaxpr(grouped._of_kernel)(*given).jaxpr, "scan")
    (condition,) = eqns_of(loop.params["jaxpr"].jaxpr, "cond")
    assert [var.aval.shape for var in condition.outvars] == [shape[1:]]


def eqns_of(jaxpr: Any, name: str) -> list[Any]:
    return [equation for equation in jaxpr.eqns if equation.primitive.name == name]


def test_routing() -> None:
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    softmax, sigmoid = jax.nn.softmax(logits), jax.nn.sigmoid(logits)
    assert_close(route(logits, 2)[0], softmax[:, :2] / softmax[:, :2].sum())
    assert_close(route(logits, 2, normalized=False)[0], softmax[:, :2])
    weights, chosen = route(logits, 2, sigmoid=True, normalized=False)
    assert chosen.tolist() == [[0, 1]]
    assert_close(weights, sigmoid[:, :2])


def test_the_load_balancing_loss_counts_choices_and_probabilities() -> None:
    """Balanced, it is the number of choices; padding does not count."""
    balanced = jnp.eye(4)[None, None]  # each token prefers a different expert, [L=1, B=1, T=4, E=4]
    np.testing.assert_allclose(load_balancing_loss(balanced * 9, 1), 1, rtol=1e-6)
    same = jnp.zeros((2, 1, 4, 4)).at[..., 1].set(50.0)
    np.testing.assert_allclose(load_balancing_loss(same, 1), 4, rtol=1e-6)
    mixed = jnp.concatenate([balanced * 9, same[:1]], axis=2)
    mask = jnp.arange(8)[None] < 4
    np.testing.assert_allclose(load_balancing_loss(mixed, 1, mask), 1, rtol=1e-6)


@pytest.mark.slow
def test_packed_documents_have_the_load_balancing_loss_of_padded_ones() -> None:
    model = tiny.model(model_type="mixtral", num_local_experts=EXPERTS, num_experts_per_tok=CHOICES)
    first, second = tiny.tokens(shape=(1, 5)), tiny.tokens(1, (1, 3))
    wide = lambda array: jnp.pad(array, ((0, 0), (0, 9 - array.shape[1])))  # noqa: E731
    zeros = {"targets": jnp.zeros((1, 9), jnp.int32), "loss_weights": jnp.zeros((1, 9)).at[0, 1].set(2.0)}
    packed = zeros | {
        "tokens": wide(jnp.concatenate([first, second], axis=1)),
        "positions": jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 0]]),
        "segments": jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]]),
    }
    padded = {name: jnp.concatenate([value, jnp.zeros_like(value)]) for name, value in zeros.items()} | {
        "tokens": jnp.concatenate([wide(first), wide(second)])
    }
    kept = jnp.arange(9)[None] < jnp.array([[5], [3]])
    loss = jax.jit(lambda batch, counted: balanced_next_token_loss(model, batch, counted, 4, 0.1))
    found, expected = loss(packed, packed["segments"] > 0), loss(padded, kept)
    np.testing.assert_allclose(found.balance, expected.balance, rtol=1e-5)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
    everything = loss(padded, jnp.ones((2, 9), bool))
    assert abs(everything.balance - expected.balance) > 1e-3 * expected.balance
    assert loss(padded, jnp.zeros((2, 9), bool)).balance == 0


def test_variables_of_experts_are_sharded_by_expert() -> None:
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    axes = {path: leaf.axes for path, leaf in variables.flat(experts())[1].items()}
    assert sharding.partition(axes["gate_up.kernel"], (EXPERTS, WIDTH, 2 * HIDDEN), mesh) == jax.P(
        "tensor", "fsdp", None
    )
    assert sharding.partition(axes["gate_up.kernel"], (6, WIDTH, 2 * HIDDEN), mesh) == jax.P(None, "fsdp", "tensor")


def test_biases_of_experts_and_routers_are_not_trained() -> None:
    fields = {"model_type": "gpt_oss", "num_local_experts": EXPERTS, "num_experts_per_tok": CHOICES, "head_dim": 8}
    model = adapters.attach(tiny.model(**fields), methods.BitFit(), rngs=nnx.Rngs(0))
    trained = {path.split(".")[2] for path, leaf in variables.flat(model)[1].items() if type(leaf) is PeftParam}
    assert trained == {"query", "key", "value", "out"}
    for method, message in (
        (methods.BitFit(targets=("gate_up_proj",)), "holds experts, whose biases BitFit does not train"),
        (methods.Lora(rank=2, bias="all"), "bias='all' is not supported for experts"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.attach(tiny.model(**fields), method, rngs=nnx.Rngs(0))
