"""What every method promises. A new method joins by an entry in CASES.

The promises that compile much are checked for the first case of each method, some of them side by side in one model
(GROUPS). But for a few methods all of it is slow (make test-slow), and so is most of what compiles much.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import tests.tiny as tiny
from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.io.adapter_load import load_adapter
from peftjax.io.adapter_save import save_adapter
from peftjax.io.checkpoint import Checkpoints
from peftjax.models import decoder
from peftjax.totals import next_token_loss
from peftjax.training import optim
from peftjax.training.step import Objective, TrainState, flatten, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Case:
    """A method, the number of parameters that it trains on the tiny model by its formula, and what it promises."""

    method: adapters.Method
    trained: int
    noop: bool = True  # a new adapter changes no bit of the logits
    merges: bool = True
    encoded: bool = False  # the file holds arrays that are computed from the trained ones
    moments: int = 2  # of the optimizer, for each trained parameter


E, F, V, KV, L = 32, 40, 48, 16, 3  # embed, mlp, vocab, kv heads * head dim, layers
SIDES = [(E, E), (E, KV), (E, KV), (E, E), (E, F), (E, F), (F, E)]  # q k v o gate up down
BASE = L * (sum(i * o for i, o in SIDES) + 2 * E) + E + 2 * V * E

CASES = {
    "full": Case(methods.Full(), BASE, merges=False),
    "lora": Case(methods.Lora(rank=4, alpha=8), L * 4 * sum(i + o for i, o in SIDES)),
    "lora-dropout-rs": Case(
        methods.Lora(rank=2, dropout=0.25, targets=("q_proj", "v_proj"), rslora=True), L * 2 * (2 * E + E + KV)
    ),
    "lora-patterns": Case(
        methods.Lora(
            rank=4, targets=("q_proj", "down_proj"), exclude=("layers.0.self_attn.q_proj",), rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 16.0}, layers_to_transform=(0, 1),
        ),
        4 * (E + E) + 2 * 2 * (F + E),
    ),
    "lora-everything": Case(
        methods.Lora(rank=2, targets=("q_proj", "embed_tokens"), bias="all", modules_to_save=("lm_head",)),
        L * 2 * (E + E) + 2 * (V + E) + L * (E + KV + KV + E) + E * V,
    ),
    "lora-joint": Case(
        methods.Lora(rank=2, targets=("q_proj", "up_proj"), modules_to_save=("layers.1.mlp",)),
        2 * (L * (E + E) + (L - 1) * (E + F)) + 3 * E * F,
    ),
    "lora-dora": Case(
        methods.Lora(
            rank=2, dora=True, dropout=0.25, targets=("q_proj", "down_proj", "embed_tokens"),
            exclude=("layers.1.self_attn.q_proj",),
        ),
        2 * (2 * 2 * E + E) + L * (2 * (F + E) + E) + 2 * (V + E) + E, noop=False,
    ),
    "lora-tokens": Case(
        methods.Lora(rank=2, targets=("q_proj", "lm_head"), token_indices=(40, 3, 7)), L * 2 * (E + E) + 2 * (E + V) + 3 * E
    ),
    "lora-plus": Case(
        methods.Lora(rank=4, lr_ratio=4.0, targets=("q_proj", "embed_tokens")), L * 4 * (E + E) + 4 * (V + E)
    ),
    "lora-fa": Case(methods.Lora(rank=4, freeze_a=True), L * 4 * sum(o for _, o in SIDES)),
    "lora-bias": Case(
        methods.Lora(rank=2, lora_bias=True, targets=("q_proj", "v_proj"), layers_to_transform=(0, 2)),
        2 * (2 * (E + E) + E + 2 * (E + KV) + KV),
    ),
    "lora-pissa": Case(
        methods.Lora(rank=4, alpha=8, init="pissa", targets=("q_proj", "lm_head"), rank_pattern={"1.self_attn.q_proj": 2}),
        (4 + 2 + 4) * (E + E) + 4 * (E + V), encoded=True,
    ),
    "lora-olora-dora": Case(
        methods.Lora(rank=4, init="olora", dora=True, rslora=True, targets=("q_proj",)), L * (4 * (E + E) + E),
        noop=False, encoded=True,
    ),
    "lora-experts": Case(
        methods.Lora(rank=3, targets=("q_proj", "gate_up_proj", "down_proj"), rank_pattern={"layers.1.mlp.experts.down_proj": 2}),
        L * 3 * (E + E) + 4 * (L * 3 * (E + 2 * F) + (3 + 2 + 3) * (F + E)),
    ),
    "lora-experts-dora": Case(
        methods.Lora(rank=2, dora=True, targets=("gate_up_proj", "down_proj"), layers_to_transform=(0, 2)),
        4 * 2 * (2 * (E + 2 * F) + 2 * F + 2 * (F + E) + E), noop=False,
    ),
    "prompt": Case(methods.PromptTuning(tokens=5), 5 * E, noop=False, merges=False),
    "p-tuning": Case(
        methods.PTuning(tokens=5, hidden=6), 5 * E + (E + 1) * 6 + 7 * 6 + 7 * E, noop=False, merges=False,
        encoded=True,
    ),
    "p-tuning-lstm": Case(
        methods.PTuning(tokens=5, hidden=6, encoder="lstm"),
        5 * E + 2 * 24 * (E + 6 + 2) + 2 * 24 * (12 + 6 + 2) + 13 * 12 + 13 * E, noop=False, merges=False,
        encoded=True,
    ),
    "prefix": Case(methods.PrefixTuning(tokens=5), 5 * L * 2 * KV, noop=False, merges=False),
    "prefix-projection": Case(
        methods.PrefixTuning(tokens=5, projection=True, hidden=6), 5 * KV + (KV + 1) * 6 + 7 * L * 2 * KV, noop=False,
        merges=False, encoded=True,
    ),
    "ia3": Case(
        methods.Ia3(targets=("k_proj", "v_proj", "down_proj"), feedforward=("down_proj",)), L * (KV + KV + F)
    ),
    "ia3-patterns": Case(
        methods.Ia3(exclude=("layers.1.self_attn.q_proj",), feedforward=r".*\.(0\.self_attn\.q|2\.mlp\.down)_proj"),
        L * (3 * E + 2 * KV + 2 * F) - E - E + F,
    ),
    "ln-tuning": Case(methods.LnTuning(), (2 * L + 1) * E),
    "ln-tuning-some": Case(
        methods.LnTuning(targets=("input_layernorm",), layers_to_transform=(0, 2), modules_to_save=("lm_head",)),
        2 * E + E * V,
    ),
    "bitfit": Case(methods.BitFit(), L * (E + KV + KV + E)),
    "bitfit-some": Case(methods.BitFit(targets=("q_proj", "v_proj"), layers_to_transform=(1,)), E + KV),
    "trainable-tokens": Case(methods.TrainableTokens(token_indices=(40, 3, 7)), 3 * E),
    "trainable-tokens-tied": Case(methods.TrainableTokens(token_indices=(40, 3, 7)), 3 * E),
    "miss": Case(methods.Miss(rank=6), L * 6 * sum(o for _, o in SIDES)),
    "miss-mini": Case(
        methods.Miss(
            rank=8, variant="mini", mini_rank=4, dropout=0.25, targets=("q_proj", "down_proj"), layers_to_transform=(0, 2)
        ),
        4 * 8 * 4,
    ),
    "miss-bat": Case(methods.Miss(rank=8, variant="bat", exclude=("layers.1.mlp.up_proj",)),
                     8 * (L * sum(o for _, o in SIDES) - F)),
    "oft": Case(methods.Oft(block_size=8), L * 28 * sum(i // 8 for i, _ in SIDES)),
    "oft-exact": Case(
        methods.Oft(
            block_size=0, blocks=4, neumann=False, targets=("q_proj", "down_proj"), layers_to_transform=(0, 1)
        ),
        2 * 4 * (28 + 45),
    ),
    "oft-constrained": Case(
        methods.Oft(block_size=8, share=True, constrained=True, eps=0.5, targets=("q_proj", "v_proj")), L * 2 * 28
    ),
    "boft": Case(methods.Boft(), L * sum(4 * i + o for i, o in SIDES)),  # of a base with biases
    "boft-factors": Case(
        methods.Boft(block_size=4, factors=3, dropout=0.25, targets=("q_proj", "up_proj"), layers_to_transform=(0, 2)),
        2 * (2 * 3 * 4 * E + E + F),
    ),
    "boft-biases": Case(
        methods.Boft(block_size=4, targets=("q_proj", "up_proj"), layers_to_transform=(0, 2), bias="all"),
        2 * (2 * 4 * E + E + F) + L * (E + KV + KV + E),
    ),
    "hra": Case(methods.Hra(rank=4), L * 4 * sum(i for i, _ in SIDES), noop=False),
    "hra-gram-schmidt": Case(
        methods.Hra(rank=3, gram_schmidt=True, targets=("q_proj", "down_proj"), layers_to_transform=(1,)), 3 * (E + F),
        noop=False,
    ),
    "adalora-some": Case(
        methods.AdaLora(
            init_rank=4, target_rank=2, total_steps=2, dropout=0.25, orthogonality=0.0, targets=("q_proj", "v_proj"),
            layers_to_transform=(0, 2),
        ),
        2 * 4 * (E + 1 + E + E + 1 + KV), moments=4,
    ),
    "adalora": Case(
        methods.AdaLora(init_rank=4, target_rank=3, total_steps=4, warmup_steps=1),
        L * 4 * sum(i + 1 + o for i, o in SIDES), moments=4,
    ),
    "loha": Case(
        methods.LoHa(
            rank=3, targets=("q_proj", "down_proj"), exclude=("layers.0.mlp.down_proj",), rank_dropout=0.25,
            module_dropout=0.1, rank_pattern={"layers.1.self_attn.q_proj": 6}, alpha_pattern={"down_proj": 6.0},
        ),
        2 * (3 + 6 + 3) * (E + E) + 2 * (3 + 3) * (F + E),
    ),
    "lokr": Case(
        methods.LoKr(
            rank=2, targets=("q_proj", "v_proj", "down_proj"), exclude=("layers.0.mlp.down_proj",), rank_dropout=0.25,
            module_dropout=0.1, rank_pattern={"layers.1.self_attn.q_proj": 3},
        ),
        L * 4 * 4 + (2 + 3 + 2) * (8 + 8) + L * (4 * 4 + 2 * (8 + 4)) + 2 * (5 * 4 + 2 * (8 + 8)),
    ),
    "lokr-both": Case(
        methods.LoKr(rank=2, targets=("q_proj", "v_proj", "down_proj"), decompose_both=True, decompose_factor=8),
        L * (2 * (8 + 8) + 4 * 4 + 2 * (8 + 8) + 4 * 2 + 2 * (8 + 8) + 2 * (5 + 4)),
    ),
    "vera": Case(
        methods.Vera(rank=4, dropout=0.25, exclude=("layers.1.self_attn.v_proj",)),
        L * sum(4 + o for _, o in SIDES) - 4 - KV,
    ),
    "ia3-experts": Case(
        methods.Ia3(
            targets=("k_proj", "gate_up_proj", "down_proj"), feedforward=("down_proj",),
            exclude=("experts.1.w3", "layers.1.mlp.experts.down_proj"),
        ),
        L * (KV + (4 + 3) * F) + 2 * 4 * F,
    ),
    "vera-experts": Case(
        methods.Vera(rank=4, targets=("v_proj", "w1", "experts.2.w3", "w2"), layers_to_transform=(0, 2)),
        2 * ((4 + KV) + (4 + 1) * (4 + F) + 4 * (4 + E)),
    ),
    "fourierft": Case(
        methods.FourierFT(
            n_frequency=6, targets=("q_proj", "v_proj", "down_proj"), exclude=("layers.0.mlp.down_proj",), scaling=300.0,
            n_frequency_pattern={"layers.1.self_attn.v_proj": 9},
        ),
        L * 6 + (6 + 9 + 6) + 2 * 6, noop=False,
    ),
    "randlora": Case(
        methods.RandLora(
            rank=5, alpha=10, targets=("q_proj", "v_proj", "down_proj"), exclude=("layers.1.self_attn.v_proj",),
            dropout=0.25,
        ),
        L * 7 * (5 + E) + 2 * 4 * (5 + KV) + L * 7 * (5 + E),
    ),
    "vblora": Case(
        methods.VbLora(
            rank=2, num_vectors=6, vector_length=8, targets=("q_proj", "v_proj", "down_proj"), dropout=0.25,
            exclude=("layers.1.self_attn.v_proj",),
        ),
        6 * 8 + 2 * 6 * (L * (E + E) + 2 * (E + KV) + L * (F + E)) // 8, noop=False,
    ),
    "houlsby": Case(methods.Houlsby(reduction_factor=8), L * 2 * (2 * E * 4 + 4 + E), noop=False, merges=False),
    "pfeiffer-norms": Case(
        methods.Pfeiffer(
            reduction_factor=5, norm_before=True, norm_after=True, learned_scale="channel", dropout=0.25, leave_out=(1,)
        ),
        2 * (2 * E * 6 + 6 + E + E + 4 * E), noop=False, merges=False,
    ),
    "parallel": Case(methods.ParallelAdapter(learned_scale="scalar"), L * (2 * E * 16 + 16 + E + 1), merges=False),
}  # fmt: skip
FIELDS = {
    name: {"attention_bias": True}
    for name in ("lora-everything", "lora-bias", "bitfit", "bitfit-some", "boft", "boft-biases")
}
MOE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = ("lora-experts", "lora-experts-dora", "ia3-experts", "vera-experts")
FIELDS |= dict.fromkeys(EXPERTS, MOE)
FIELDS["trainable-tokens-tied"] = {"tie_word_embeddings": True}
QUICK = ("full", "lora", "lora-everything", "prompt", "prefix", "ia3")
QUICKEST = ("lora",)  # also in what compiles much
FIRST = {type(case.method): name for name, case in reversed(CASES.items())}.values()  # the first case of each method
OF_EACH = [
    name
    for name in CASES
    if name in {*FIRST, *EXPERTS, "lora-everything", "lora-dora", "lora-pissa", "prefix-projection"} - {"ia3-experts"}
]
# Methods side by side in one model, some on one kind of layer only: one program checks them all.
GROUPS: dict[str, dict[str, str | None]] = {
    "weights": {
        "lora-dora": "q_proj", "miss": "k_proj", "oft": "v_proj", "loha": "o_proj", "lokr": "gate_proj", "hra": "up_proj",
        "vblora": "down_proj",
    },
    "more-weights": {
        "lora-pissa": "q_proj", "boft": "k_proj", "vera": "v_proj", "fourierft": "o_proj", "randlora": "down_proj",
    },
    # BitFit reads the layer's own bias, so it comes before what scales the output.
    "others": dict.fromkeys(("bitfit", "ia3", "ln-tuning", "trainable-tokens")),
    # DoRA measures the layer's own kernel, so it comes before what adds to it.
    "experts": dict.fromkeys(("lora-experts-dora", "lora-experts", "vera-experts")),
    "bottlenecks": dict.fromkeys(("houlsby", "pfeiffer-norms", "parallel")),
}  # fmt: skip
FIELDS |= {"others": {"attention_bias": True}, "experts": MOE}
GROUPED = [*(name for name in OF_EACH if not any(name in group for group in GROUPS.values())), *GROUPS]


def marked(names: Iterable[str], *others: Any, quick: Iterable[str] = QUICK) -> list[Any]:
    """Parameters of a test: (name, *others) for each name."""
    return [
        pytest.param(*((name, *others) if others else (name,)), marks=() if name in quick else pytest.mark.slow)
        for name in names
    ]


ALL, HEAVY = marked(CASES), marked(GROUPED, quick=QUICKEST)
PEFT = marked(name for name in CASES if name != "full")
PEFT_OF_EACH = marked(name for name in OF_EACH if name != "full")


@pytest.fixture(params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def methods_of(name: str) -> dict[str, Any]:
    """The methods of a group, or a case's alone, by the names of their adapters."""
    if name in CASES:
        return {"default": CASES[name].method}
    return {part: only(CASES[part].method, kind) for part, kind in GROUPS[name].items()}


def only(method: Any, kind: str | None) -> Any:
    """The method on one kind of layer, if given; its other options stay, but for patterns that name layers."""
    if kind is None:
        return method
    patterns = {field.name: {} for field in dataclasses.fields(method) if field.name.endswith("_pattern")}
    return dataclasses.replace(method, targets=(kind,), exclude=(), **patterns)


def first_method(name: str) -> adapters.Method:
    """A case's method, or the first of a group, in which none has a penalty or an optimizer of its own."""
    return next(iter(methods_of(name).values()))


def attached(name: str, *, dtype: str = "float32", remat: str = "none", adapter: str = "default", seed: int = 1) -> Any:
    """The method, or those of a group, on the tiny model; dtype "nf4": on a float32 one that is quantized, as wide as
    whole blocks but for the inputs of down_proj."""
    if dtype == "nf4":
        model = tiny.quantized(tiny.model(remat=remat, hidden_size=64, intermediate_size=72, **FIELDS.get(name, {})))
    else:
        model = tiny.model(dtype=dtype, remat=remat, **FIELDS.get(name, {}))
    if name in CASES:
        return adapters.attach(model, CASES[name].method, adapter, rngs=nnx.Rngs(seed))
    for part, method in methods_of(name).items():
        adapters.attach(model, method, part, rngs=nnx.Rngs(seed))
    return adapters.use(model, tuple(GROUPS[name]))


LOSS = functools.partial(next_token_loss, chunk=8)


def optimizer_for(trainable: variables.FlatTree, leaves: dict[str, Any]) -> optax.GradientTransformation:
    config = optim.OptimConfig(
        learning_rate=1e-2,
        weight_decay=0.01,
        schedule="constant",
        eps=1e-3,  # far above rounding: a gradient of almost 0 must not get a random sign
    )
    return optim.make_optimizer(
        config, 10, optim.decay_mask(trainable, {path: leaf.axes for path, leaf in leaves.items()})
    )


def trainer(model: Any, method: adapters.Method, mesh: Any = None) -> tuple[Callable, TrainState, variables.FlatTree]:
    """The train step of the real train command, its first state, and the frozen tree."""
    sharding.place(model, mesh or sharding.make_mesh())
    model.train()
    _, leaves = variables.flat(model)
    graph, trainable, frozen = variables.split_by_kind(model, method.trains)
    optimizer = method.optimizer(optimizer_for(trainable, leaves), leaves)
    state = init_state(trainable, optimizer, seed=3)
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    return make_train_step(Objective(graph, LOSS, method.penalty, keys), optimizer, state), state, frozen


@functools.cache
def batches(count: int) -> list[dict[str, np.ndarray]]:
    """The first training batches. Drawing them under each mesh would compile the drawing for each mesh."""
    return [{key: np.asarray(value) for key, value in tiny.batch(index).items()} for index in range(count)]


def run(
    step: Callable, state: TrainState, frozen: variables.FlatTree, count: int, mesh: Any = None
) -> tuple[TrainState, list]:
    mesh, losses, drawn = mesh or sharding.make_mesh(), [], batches(count)
    with jax.set_mesh(mesh):
        for batch in drawn:
            state, measured = step(state, frozen, sharding.shard_batch(batch, mesh, 2))
            losses.append(float(measured["loss"]))
    return state, losses


def arrays(tree: variables.FlatTree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.items() if not isinstance(leaf, optax.MaskedNode)}


def test_attaching_changes_no_bit_of_the_base_and_of_its_logits(name: str) -> None:
    base = tiny.model(**FIELDS.get(name, {}))
    model = attached(name)
    assert tiny.bits(model) == tiny.bits(base)
    if CASES[name].noop:
        # One operation at a time where the adapter makes XLA fuse, and so round, the base's operations differently.
        with jax.disable_jit(name == "trainable-tokens-tied"):
            np.testing.assert_array_equal(model(tiny.tokens()), base(tiny.tokens()))
    elif CASES[name].method.neutral:
        np.testing.assert_allclose(model(tiny.tokens()), base(tiny.tokens()), atol=1e-5)
    else:
        assert np.abs(model(tiny.tokens()) - base(tiny.tokens())).max() > 1e-5


@dataclasses.dataclass
class Trained:
    """Three steps of training on one device, and what was there before them."""

    base: dict[str, bytes]
    first: dict[str, np.ndarray]
    frozen: variables.FlatTree
    state: TrainState
    losses: list[float]
    traces: int


@functools.cache
def trained(name: str, dtype: str = "float32") -> Trained:
    model = attached(name, dtype=dtype)
    base = tiny.bits(model)
    step, state, frozen = trainer(model, first_method(name))
    first = arrays(state.trainable)
    state, losses = run(step, state, frozen, 3)
    return Trained(base, first, frozen, state, losses, step._cache_size())


NF4 = [name for name in GROUPED if name not in ("full", "lora-everything", "prefix-projection")]
IN_EACH = [
    *marked(GROUPED, "float32", quick=("full", *QUICKEST)),
    *marked(GROUPED, "bfloat16", quick=QUICKEST),
    *marked(NF4, "nf4", quick=("lora",)),
]


@pytest.mark.parametrize(("name", "dtype"), IN_EACH)
def test_training_is_traced_once_and_changes_and_keeps_moments_of_what_the_mask_says_and_nothing_else(
    name: str, dtype: str
) -> None:
    ran = trained(name, dtype)
    after = arrays(ran.state.trainable)
    assert np.isfinite(ran.losses).all()
    assert after.keys() == ran.first.keys()
    assert all((after[path] != ran.first[path]).any() for path in ran.first)
    frozen_base = [path for path in ran.base if path not in ran.first]
    assert all(tiny.in_bytes(ran.frozen[path]) == ran.base[path] for path in frozen_base)
    assert (name == "full") == (not frozen_base)
    moments = [leaf.size for leaf in jax.tree.leaves(ran.state.optimizer) if leaf.ndim]
    kept = CASES[name].moments if name in CASES else 2
    assert sum(moments) == kept * sum(value.size for value in after.values())
    assert ran.traces == 1


def test_the_number_of_trained_parameters_is_the_formulas(name: str) -> None:
    model = attached(name)
    if name == "full":
        counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    else:
        counted = adapters.count_trainable(model, "default")
    assert counted == CASES[name].trained


def differentiable(name: str, remat: str = "none") -> tuple[Callable, Callable, variables.FlatTree]:
    """A loss of the trainable parameters, its jitted gradient, and parameters with random values."""
    model = tiny.randomize(attached(name, remat=remat))
    graph, trainable, frozen = variables.split_by_kind(model, first_method(name).trains)
    loss = lambda tree: jnp.square(variables.join(graph, tree, frozen)(tiny.tokens())).mean()  # noqa: E731
    return loss, jax.jit(jax.grad(loss)), trainable


differentiated = functools.cache(differentiable)  # compiled once for several tests


@pytest.mark.parametrize("name", HEAVY)
def test_a_scan_equals_the_layers_one_by_one_with_and_without_remat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unrolled(block: Any, body: Callable, x: jax.Array, per_layer: Any, remat: str) -> tuple[jax.Array, Any]:
        graph, leaves = variables.flat(block)
        run = jax.jit(lambda one, x, inputs: body(variables.join(graph, one), x, inputs)[0])  # compiled for one layer
        for layer in range(L):
            inputs = jax.tree.map(lambda leaf, layer=layer: leaf[layer], per_layer)
            one = {
                path: leaf.get_value()[layer] if variables.is_stacked(leaf) else leaf.get_value()
                for path, leaf in leaves.items()
            }
            x = run(one, x, inputs)
        return x, None

    _, gradient, trainable = differentiated(name)
    scanned = arrays(gradient(trainable))
    rematerialised = arrays(differentiable(name, "block")[1](trainable))
    monkeypatch.setattr(decoder, "scan_stack", unrolled)
    _, gradient, trainable = differentiable(name)
    for path, expected in arrays(gradient(trainable)).items():
        np.testing.assert_allclose(scanned[path], expected, atol=1e-6, rtol=1e-4, err_msg=path)
        np.testing.assert_allclose(rematerialised[path], expected, atol=1e-6, rtol=1e-4, err_msg=path)


MESHES = marked(GROUPED, {"fsdp": 2, "tensor": 2}, "float32", quick=("full",))
MESHES += marked(("full", "lora", "oft", "bottlenecks", "prefix"), {"fsdp": 2, "tensor": 2}, "bfloat16", quick=())
MESHES += marked(("full", "lora"), {"data": 2, "fsdp": 2, "tensor": 2}, "float32", quick=("lora",))
MESHES += marked(("lora",), {"fsdp": 2, "tensor": 2}, "nf4", quick=())
MESHES += marked(
    ("full", "lora", "bottlenecks", "prefix", "prompt", "oft"),
    {"sequence": 2, "tensor": 2},
    "float32",
    quick=("lora",),
)
MESHES += marked(("lora",), {"data": 2, "sequence": 2, "tensor": 2}, "nf4", quick=())


@pytest.mark.parametrize(("name", "sizes", "dtype"), MESHES)
def test_sharded_training_equals_training_on_one_device(name: str, sizes: dict[str, int], dtype: str) -> None:
    one, mesh = trained(name, dtype), sharding.make_mesh(sizes)
    step, state, frozen = trainer(attached(name, dtype=dtype), first_method(name), mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((frozen, state.trainable)))
    state, losses = run(step, state, frozen, 3, mesh)
    if dtype == "bfloat16":  # sums in another order are rounded to 8 bits
        np.testing.assert_allclose(losses, one.losses, rtol=2e-3)
        assert all((value != one.first[path]).any() for path, value in arrays(state.trainable).items())
        return
    np.testing.assert_allclose(losses, one.losses, rtol=2e-5)
    expected = arrays(one.state.trainable)
    for path, value in arrays(state.trainable).items():
        np.testing.assert_allclose(value, expected[path], atol=2e-4, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["nf4", "int8"])
def test_several_methods_at_once_train_alike_on_a_quantized_base_whose_kernels_are_split_both_ways(
    format_: str,
) -> None:
    together = {
        "lora": methods.Lora(rank=4, targets=("q_proj", "gate_proj")),
        "dora": methods.Lora(rank=2, dora=True, dropout=0.25, targets=("o_proj", "down_proj", "embed_tokens")),
        "ia3": methods.Ia3(targets=("k_proj", "v_proj"), feedforward=()),
        "oft": methods.Oft(block_size=4, targets=("up_proj",)),
        "prefix": methods.PrefixTuning(tokens=3),
    }

    def train(mesh: Any) -> tuple[dict[str, np.ndarray], list]:
        model = tiny.quantized(tiny.model(hidden_size=128, intermediate_size=144, num_hidden_layers=2), format_)
        for name, method in together.items():
            adapters.attach(model, method, name, rngs=nnx.Rngs(1))
        adapters.use(model, tuple(together))
        step, state, frozen = trainer(model, together["lora"], mesh)
        kernel = frozen["blocks.feedforward.gate.kernel"]
        split = [leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(kernel)[:2]]
        assert all(split) == (mesh.size > 1)
        state, losses = run(step, state, frozen, 3, mesh)
        return arrays(state.trainable), losses

    (one, losses), (many, sharded) = (train(sharding.make_mesh(sizes)) for sizes in ({}, {"fsdp": 2, "tensor": 2}))
    np.testing.assert_allclose(sharded, losses, rtol=2e-5)
    for path, value in many.items():
        np.testing.assert_allclose(value, one[path], atol=2e-4, err_msg=path)


@pytest.mark.parametrize("name", marked(name for name in CASES if CASES[name].merges))
def test_merged_equals_attached_and_unmerging_restores_the_bits(name: str) -> None:
    model = tiny.randomize(attached(name))
    before, expected = tiny.bits(model), model(tiny.tokens())
    adapters.merge(model, "default")
    np.testing.assert_allclose(model(tiny.tokens()), expected, atol=2e-5)
    assert tiny.bits(model) != before
    if name != "trainable-tokens-tied":  # the compiled program is the base's; there the head now has a kernel
        structure = lambda model: nnx.split(adapters.active_view(model))[0]  # noqa: E731
        assert structure(model) == structure(tiny.model(**FIELDS.get(name, {})))
    adapters.unmerge(model, "default")
    assert tiny.bits(model) == before
    np.testing.assert_array_equal(model(tiny.tokens()), expected)


def test_full_fine_tuning_of_a_quantized_base_is_refused() -> None:
    with pytest.raises(ValueError, match="trains the base itself, which cannot be quantized"):
        attached("full", dtype="nf4")


MERGED_INTO_NF4 = [name for name in NF4 if all(CASES[part].merges for part in GROUPS.get(name, (name,)))]


@pytest.mark.parametrize("name", marked(MERGED_INTO_NF4, quick=("lora",)))
def test_merged_into_an_nf4_base_equals_attached_and_unmerging_restores_the_codes(name: str) -> None:
    model = tiny.randomize(attached(name, dtype="nf4"), scale=0.05)
    before, expected, parts = tiny.bits(model), model(tiny.tokens()), list(methods_of(name))
    for part in parts:
        adapters.merge(model, part)
    np.testing.assert_allclose(model(tiny.tokens()), expected, atol=2e-5 * np.abs(expected).max())
    for part in reversed(parts):
        adapters.unmerge(model, part)
    assert tiny.bits(model) == before


@pytest.mark.parametrize("name", PEFT_OF_EACH)
def test_detaching_gives_the_base_back(name: str) -> None:
    base = tiny.model(**FIELDS.get(name, {}))
    model = adapters.detach(tiny.randomize(attached(name)), "default")
    assert nnx.split(model)[0] == nnx.split(adapters.detach(attached(name), "default"))[0]
    assert variables.flat(model)[1].keys() == variables.flat(base)[1].keys()
    np.testing.assert_array_equal(model(tiny.tokens()), base(tiny.tokens()))


@pytest.mark.parametrize("name", PEFT_OF_EACH)
def test_two_adapters_under_names_take_turns(name: str) -> None:
    model = attached(name, adapter="first")
    base = tiny.model(**FIELDS.get(name, {}))(tiny.tokens())
    first = tiny.randomize(model, seed=1)(tiny.tokens())
    adapters.attach(model, CASES[name].method, "second", rngs=nnx.Rngs(9))
    if CASES[name].noop:
        np.testing.assert_array_equal(model(tiny.tokens()), base)
    np.testing.assert_array_equal(adapters.use(model, "first")(tiny.tokens()), first)
    np.testing.assert_array_equal(adapters.use(model, None)(tiny.tokens()), base)
    assert np.abs(first - base).max() > 1e-3


@pytest.mark.parametrize("name", PEFT_OF_EACH)
def test_switching_adapters_of_the_same_shapes_needs_no_new_compilation(name: str) -> None:
    model = attached(name, adapter="first")
    adapters.attach(model, CASES[name].method, "second", rngs=nnx.Rngs(9))
    graphs = [nnx.split(adapters.active_view(adapters.use(model, which)))[0] for which in ("first", "second")]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])


@pytest.mark.parametrize("name", HEAVY)
def test_a_population_under_vmap_equals_its_members_one_by_one(name: str) -> None:
    loss, alone, trainable = differentiated(name)
    members = [jax.tree.map(lambda leaf, factor=factor: leaf * factor, trainable) for factor in (0.5, 1.0, 1.5)]
    together = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *members))
    for index, member in enumerate(members):
        for path, expected in arrays(alone(member)).items():
            np.testing.assert_allclose(together[path][index], expected, atol=1e-5, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", marked(("full", "lora", "lora-dora", "prefix", "adalora-some"), quick=QUICKEST))
def test_a_checkpoint_brings_back_every_bit(name: str, tmp_path: Path) -> None:
    saved = flatten(trained(name).state)
    abstract = {
        key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for key, leaf in saved.items()
    }
    with Checkpoints(tmp_path, keep=1, keep_best=False) as checkpoints:
        checkpoints.save(1, saved, {}, identity={})
        restored = checkpoints.restore(abstract)
    assert restored is not None
    assert {key: np.asarray(leaf).tobytes() for key, leaf in saved.items()} == {
        key: np.asarray(leaf).tobytes() for key, leaf in restored.state.items()
    }


@pytest.mark.filterwarnings("ignore:adapter_config.json. .* describes how the adapter was trained")  # by an encoder
@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_file_brings_back_every_bit(name: str, tmp_path: Path) -> None:
    model = tiny.randomize(attached(name))
    save_adapter(model, tmp_path / "adapter")
    other = load_adapter(tiny.model(**FIELDS.get(name, {})), tmp_path / "adapter", name="back")
    if CASES[name].encoded:  # computed in one program with the model, or before it
        np.testing.assert_allclose(other(tiny.tokens()), model(tiny.tokens()), atol=1e-5)
    else:
        np.testing.assert_array_equal(other(tiny.tokens()), model(tiny.tokens()))
    save_adapter(other, tmp_path / "again", name="back")
    assert stored(tmp_path / "again", "back") == stored(tmp_path / "adapter", "default")


def stored(directory: Path, name: str) -> dict[str, bytes]:
    """The tensors of an adapter's file by key, without the adapter's name, which some formats have in it."""
    (file,) = directory.glob("*.safetensors")
    return {key.replace(f".{name}.", "."): value.tobytes() for key, value in load_file(file).items()}
