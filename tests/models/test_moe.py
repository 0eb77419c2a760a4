"""Mixture-of-experts models: files with missing experts, quantized experts, several devices, dense layers."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
import tests.tiny as tiny
from peftjax import adapters, methods, sharding
from peftjax.core import variables
from peftjax.core.errors import UserError
from peftjax.data.config import DataConfig
from peftjax.models import from_hf_config
from peftjax.quant.base import Quantized
from peftjax.tasks import TaskConfig, make_task

CONFIG: dict[str, Any] = tiny.CONFIG | {
    "model_type": "qwen2_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 16,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
LLAMA4 = tiny.CONFIG | {
    "model_type": "llama4_text", "num_hidden_layers": 4, "num_local_experts": 4, "interleave_moe_layer_step": 2,
    "intermediate_size": 64, "intermediate_size_mlp": 64, "attention_chunk_size": 5, "floor_scale": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "model"
    peftjax.save_model(tiny.model(**CONFIG), path)
    return path


def logits(model: Any) -> jax.Array:
    return model(tiny.tokens())


@pytest.mark.slow
def test_a_model_on_eight_devices_computes_what_it_does_on_one(directory: Path) -> None:
    """Each device reads the experts that it holds."""
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    model = peftjax.load_model(directory, mesh=mesh)
    assert model.blocks.feedforward.experts.down.kernel.get_value().sharding.spec == jax.P(None, "tensor", None, "fsdp")
    expected = logits(peftjax.load_model(directory))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(model), expected, atol=1e-5)


@pytest.mark.slow
def test_quantized_experts_compute_what_their_decoded_kernels_do(directory: Path, tmp_path: Path) -> None:
    model, plain = peftjax.load_model(directory, quantize="nf4"), peftjax.load_model(directory)
    kernels = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()}
    kernels = {path: kernel for path, kernel in kernels.items() if isinstance(kernel, Quantized)}
    assert {"blocks.feedforward.experts.gate_up.kernel", "blocks.feedforward.experts.down.kernel"} <= kernels.keys()
    assert not any("router" in path or "shared_gate" in path for path in kernels)
    variables.update(plain, {path: kernel.astype(jnp.float32) for path, kernel in kernels.items()})
    np.testing.assert_allclose(logits(model), logits(plain), atol=1e-5)
    with pytest.raises(
        UserError,
        match=r'experts.gate_up.kernel is quantized in nf4, and cannot be divided .*; load .* with quantize="nf4"',
    ):
        peftjax.save_model(model, tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "float16"},
            r"experts.1.up_proj.weight is nf4_single of float16 \[64, 32\], and .*0.gate_proj.weight is ",
        ),
        (
            None,
            r"experts.0.gate_proj.weight is stored in NF4, and .*experts.1.up_proj.weight is not quantized: all experts",
        ),
    ],
)
def test_experts_of_several_formats_are_refused(change: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    peftjax.save_model(tiny.quantized(tiny.model(**CONFIG), "nf4_single"), tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors = {key: array.copy() for key, array in load_file(file).items()}
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if change:
        fields = json.loads(tensors[state].tobytes()) | change
        tensors[state] = np.frombuffer(json.dumps(fields).encode(), np.uint8)
    else:
        tensors = {key: array for key, array in tensors.items() if not key.startswith(name)}
        tensors[name] = np.zeros((64, 32), np.float32)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message) as error:
        peftjax.load_model(tmp_path)
    assert "\n" not in str(error.value)


def test_methods_that_cannot_adapt_experts_say_so(directory: Path) -> None:
    model = peftjax.load_model(directory)
    kinds = "LoHa LoKr RandLora FourierFT Miss Oft Boft Hra VbLora"
    for method in (getattr(methods, kind) for kind in kinds.split()):
        with pytest.raises(
            UserError,
            match=rf"names experts \(model.layers.0.mlp.experts.gate_up_proj\), which {method.method} cannot adapt; use lora, "
            "ia3 or vera, or name other layers",
        ) as error:
            peftjax.attach(model, method(targets=("gate_up_proj",)), rngs=nnx.Rngs(0))
        assert "\n" not in str(error.value)
    for options, what in (
        ({"lora_bias": True}, "lora_bias=True adds its bias to a Linear's output"),
        ({"init": "pissa"}, "init='pissa'"),
    ):
        with pytest.raises(UserError, match=f"method.{what}.*; leave model.layers.0.mlp.experts.down_proj out"):
            peftjax.attach(model, peftjax.Lora(targets=("experts.down_proj",), **options), rngs=nnx.Rngs(0))


def test_gate_and_up_of_an_expert_have_no_separate_inputs_to_scale(directory: Path) -> None:
    for feedforward in (("gate_up_proj", "down_proj"), ("up_proj",), r".*\.experts\.3\.gate_proj"):
        method = methods.Ia3(feedforward=feedforward)
        with pytest.raises(
            UserError,
            match=r"method.feedforward names \S*experts.[03].(gate|up)_proj, whose input .* alone: gate_proj and up_proj of",
        ):
            peftjax.attach(peftjax.load_model(directory), method, rngs=nnx.Rngs(0))


@pytest.mark.slow_cases
@pytest.mark.parametrize("fields", [GPT_OSS, LLAMA4], ids=["gpt-oss", "llama4"])
def test_what_needs_modules_is_refused_for_experts_that_are_always_one_parameter(fields: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"dora=True is not supported for .* one parameter: in peft, only modules have DoRA"
    ):
        peftjax.attach(tiny.model(**fields), peftjax.Lora(dora=True, targets=("down_proj",)), rngs=nnx.Rngs(0))
    for method in (methods.Ia3, methods.Vera):
        with pytest.raises(
            UserError,
            match=rf"experts \(.*\), which {method.method} cannot adapt: in this model they are .* one parameter.*; use lora, or name",
        ):
            peftjax.attach(tiny.model(**fields), method(targets=("down_proj",)), rngs=nnx.Rngs(0))
        assert not any("experts" in site.path for site, _ in method().chosen(tiny.model(**fields)))


def test_ranks_of_single_experts(directory: Path) -> None:
    """Padding is zero and has the scale 0. An entry without the word "experts" is for dense layers."""
    model = peftjax.load_model(directory)
    both = ("gate_up_proj", "shared_expert.gate_proj")
    method = peftjax.Lora(
        rank=2,
        targets=both,
        rank_pattern={r"0\.mlp\.experts\.3\.\w+": 4, "gate_proj": 1},
        alpha_pattern={"experts.1.gate_proj": 4.0, "experts.1.up_proj": 4.0},
    )
    lora = peftjax.attach(model, method, rngs=nnx.Rngs(0)).blocks.feedforward.experts.gate_up.adapters.default
    ranks = np.array([[2, 2, 2, 4], [2, 2, 2, 2]])
    within = np.arange(4) < ranks[..., None]
    assert lora.ranks == (4, 2)
    np.testing.assert_array_equal(np.asarray(lora.a.get_value() != 0).all(axis=-2), within)
    alphas = np.array([8.0, 4.0, 8.0, 8.0])[None, :, None]
    np.testing.assert_array_equal(lora.scale.get_value(), within * alphas / ranks[..., None])
    for options, message in (
        (
            {"rank_pattern": {"experts.1.gate_proj": 4}},
            r"rank_pattern has 4 for model.layers.0.mlp.experts.1.gate_proj and 8 for \S*experts.1.up_proj, which share A",
        ),
        (
            {"alpha_pattern": {r"experts\.1\.up_proj": 4.0}},
            "alpha_pattern has 8.0 for .*gate_proj and 4.0 for .*up_proj",
        ),
        ({"rank_pattern": {"experts.4.gate_proj": 4}}, "rank_pattern: 'experts.4.gate_proj' matches no target"),
        ({"rank_pattern": {r"experts\.1\.\w+": 33}}, "rank=33 exceeds the smaller dimension"),
    ):
        with pytest.raises(UserError, match=message):
            peftjax.attach(model, peftjax.Lora(targets=both, **options), "other", rngs=nnx.Rngs(0))


def test_loras_of_experts_are_not_combined(directory: Path) -> None:
    model = peftjax.load_model(directory)
    for name in ("one", "two"):
        model = peftjax.attach(model, peftjax.Lora(rank=2, targets=("experts.down_proj",)), name, rngs=nnx.Rngs(0))
    with pytest.raises(
        UserError, match=r"combine: adapter 'one' has a LoRA on .*, and LoRAs on experts cannot be combined"
    ):
        peftjax.combine(model, ["one", "two"], [0.5, 0.5], name="both")


def test_all_linear_leaves_routers_out_and_takes_experts_if_the_method_can_adapt_them(directory: Path) -> None:
    model = peftjax.load_model(directory)
    lora, ia3, vera, other = (
        {site.path.removeprefix("blocks.") for site, _ in method.chosen(model)}
        for method in (peftjax.Lora(), peftjax.Ia3(), peftjax.Vera(), peftjax.Oft(block_size=8))
    )
    assert lora == ia3 == vera
    assert lora - other == {"feedforward.experts.gate_up", "feedforward.experts.down"}
    assert other == {f"attention.{name}" for name in ("query", "key", "value", "out")} | {
        f"feedforward.shared.{name}" for name in ("gate", "up", "down")
    }


def test_missing_experts_are_named(directory: Path, tmp_path: Path) -> None:
    stored = load_file(directory / "model.safetensors")
    del stored["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight; .* 4 experts"):
        peftjax.load_model(tmp_path)


# --- Models in which some layers are dense ---

DENSE = CONFIG | {"num_hidden_layers": 4, "decoder_sparse_step": 2}  # layers 1 and 3 have experts


@pytest.mark.slow
@pytest.mark.parametrize("config", [DENSE, LLAMA4], ids=["qwen2-moe", "llama4"])
def test_dense_layers_compute_the_same_quantized_and_on_eight_devices(config: dict[str, Any], tmp_path: Path) -> None:
    peftjax.save_model(tiny.model(**config), tmp_path / "model")
    plain = peftjax.load_model(tmp_path / "model")
    expected = logits(plain)
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    sharded = peftjax.load_model(tmp_path / "model", mesh=mesh)
    assert sharded.sparse.experts.down.kernel.get_value().sharding.spec == jax.P(None, "tensor", None, "fsdp")
    assert sharded.dense.down.kernel.get_value().sharding.spec == jax.P(None, "tensor", "fsdp")
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(logits(sharded), expected, atol=1e-5)
    for form in ("nf4", "int8"):
        model = peftjax.load_model(tmp_path / "model", quantize=form)
        kernels = {path: leaf.get_value() for path, leaf in variables.flat(model)[1].items()}
        kernels = {path: kernel for path, kernel in kernels.items() if isinstance(kernel, Quantized)}
        assert {"sparse.experts.gate_up.kernel", "dense.gate.kernel", "blocks.attention.out.kernel"} <= kernels.keys()
        variables.update(plain, {path: kernel.astype(jnp.float32) for path, kernel in kernels.items()})
        np.testing.assert_allclose(logits(model), logits(plain), atol=1e-5)


@pytest.mark.slow
def test_dense_layers_have_the_same_gradients_recomputed_and_under_vmap() -> None:
    found = {}
    for remat in ("none", "block"):
        method = peftjax.Lora(rank=2, rank_pattern={"2.mlp.gate_proj": 3}, layers_to_transform=(1, 2))
        model = peftjax.attach(tiny.model(**DENSE, remat=remat), method, rngs=nnx.Rngs(0))
        assert model.dense.gate.adapters.default.ranks == (0, 3)
        assert model.sparse.experts.down.adapters.default.ranks == (2, 0)
        model = tiny.randomize(model)
        graph, trainable, frozen = variables.split_by_kind(model)

        def loss(trainable: Any, frozen: Any = frozen, graph: Any = graph) -> jax.Array:
            return jnp.mean(jnp.square(logits(variables.join(graph, trainable, frozen))))

        found[remat] = jax.jit(jax.grad(loss))(trainable)
    both = jax.jit(jax.vmap(jax.grad(loss)))(jax.tree.map(lambda leaf: jnp.stack([0 * leaf, leaf]), trainable))
    for path, expected in found["none"].items():
        if not isinstance(expected, jax.Array):
            continue
        for other in (found["block"][path], both[path][1]):
            np.testing.assert_allclose(other, expected, atol=1e-6, rtol=1e-4, err_msg=path)
    assert any(np.abs(leaf).max() > 1e-6 for path, leaf in found["none"].items() if path.startswith("dense."))


@pytest.mark.parametrize(("field", "value"), [("decoder_sparse_step", 3), ("mlp_only_layers", [0, 1])])
def test_models_without_experts_are_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{field}=.* leave none of the 2 layers with experts; use model_type 'qwen2'"):
        from_hf_config(CONFIG | {field: value})


def test_llama4_has_no_load_balancing_loss(tmp_path: Path) -> None:
    task = make_task(TaskConfig(router_aux_loss_coef=0.1), DataConfig(), tmp_path, loss_chunk=4)
    with pytest.raises(UserError, match="is a Llama4, for which no load-balancing loss is defined; set it to 0"):
        task.require(from_hf_config(LLAMA4).abstract(), "llama4")


def test_targets_from_a_file_of_single_experts_name_all_of_them_where_they_can(tmp_path: Path) -> None:
    """Mixtral's file has the names of transformers 4."""
    method = methods.Ia3(
        targets=("v_proj", "experts.down_proj", "w1"), feedforward=("down_proj",), exclude=("1.mlp.experts.2.w1",)
    )
    model = tiny.model(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=2)
    path = peftjax.save_adapter(peftjax.attach(model, method, rngs=nnx.Rngs(0)), tmp_path / "adapter")
    fields = json.loads((path / "adapter_config.json").read_text())
    assert "model.layers.0.block_sparse_moe.experts.2.w1" in fields["target_modules"]
    again = adapters.attached(peftjax.load_adapter(model, path, "again"))["again"]
    singles = {"experts.0.w1", "experts.1.w1", "experts.3.w1", "model.layers.0.mlp.experts.2.w1"}
    attention = {f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)}
    assert set(again.targets) == {"experts.down_proj", *singles, *attention}
    assert again.feedforward == ("experts.down_proj",)
    assert adapters.count_trainable(model, "again") == adapters.count_trainable(model, "default")


def test_files_of_single_experts_that_do_not_fit_are_refused(directory: Path, tmp_path: Path) -> None:
    model = peftjax.load_model(directory)
    model = peftjax.attach(model, peftjax.Lora(rank=2, targets=("gate_up_proj",)), rngs=nnx.Rngs(0))
    path = peftjax.save_adapter(model, tmp_path / "single", single_experts=True) / "adapter_model.safetensors"
    tensors, first = load_file(path), "base_model.model.model.layers.0.mlp.experts.0.gate_proj.lora_A.weight"
    assert tensors[first].shape == (2, 32)  # of an adapter that has not been trained: its rank, and both layers
    assert len(tensors) == 2 * 4 * 2 * 2
    for change, message in (
        ({first: None}, r"experts\.0\.gate_proj\.lora_A\.weight is missing, but this model, with 4 experts, .* require \(2, 32\)"),
        ({first: np.ones((3, 32), np.float32)}, r"experts\.0\.gate_proj\.lora_A\.weight has shape \(3, 32\), but"),
        ({first.replace("experts.0", "experts.4"): tensors[first]}, r"experts\.4\.gate_proj\.lora_A\.weight has shape"),
        ({first.replace("layers.0", "layers.7"): tensors[first]}, "this model has no experts .*layers.7"),
    ):  # fmt: skip
        save_file({key: value for key, value in (tensors | change).items() if value is not None}, path)
        with pytest.raises(UserError, match=message):
            peftjax.load_adapter(model, path.parent, "other")
    spell = lambda path, **fields: path.write_text(json.dumps(json.loads(path.read_text()) | fields))  # noqa: E731
    spell(path.parent / "adapter_config.json", use_dora=True)
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"experts\.0\.gate_proj\.lora_magnitude_vector is missing, .* require \(64,\)"):
        peftjax.load_adapter(model, path.parent, "other")
    whole = peftjax.save_adapter(model, tmp_path / "whole")
    spell(whole / "adapter_config.json", use_dora=True)
    with pytest.raises(
        UserError, match=r"use_dora=true is not supported for parameters, .*layers.0.mlp.experts.lora_A"
    ):
        peftjax.load_adapter(model, whole, "other")
    assert list(adapters.attached(model)) == ["default"]
    for other, method, message in (
        (
            tiny.model(),
            peftjax.Lora(rank=2),
            "single_experts=True requires adapted experts, and adapter 'default' has none",
        ),
        (tiny.model(**GPT_OSS), peftjax.Lora(rank=2), "GptOss has no modules of single experts; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            peftjax.save_adapter(peftjax.attach(other, method, rngs=nnx.Rngs(0)), tmp_path / "x", single_experts=True)
