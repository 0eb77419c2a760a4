"""Encoders without torch: what their config.json and checkpoints may hold, new heads, and training with a head.

Equality with transformers and peft is in tests/interop/test_encoders.py.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax import sharding
from peftjax.adapters import count_trainable
from peftjax.core import variables
from peftjax.models import from_hf_config
from peftjax.totals import Totals
from peftjax.training.step import Objective, init_state, make_train_step
from tests import tiny

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
CLASSIFIER = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the directories of a model without a head, "base", and of one that classifies sequences, "classifier"."""
    path = tmp_path_factory.mktemp("bert")
    for name, fields in {"base": {}, "classifier": CLASSIFIER}.items():
        model = tiny.make(from_hf_config(CONFIG | fields))
        rng = np.random.default_rng(0)
        moved = {  # the biases and the norms' scales too
            path: leaf.get_value() + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
            for path, leaf in variables.flat(model)[1].items()
            if type(leaf) is nnx.Param
        }
        variables.update(model, moved)
        peftjax.save_model(model, path / name)
    return path


def rewritten(source: Path, target: Path, change: Any, **fields: Any) -> Path:
    """A directory with its tensors changed, and fields of its config.json."""
    target.mkdir()
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def tokens() -> jax.Array:
    return tiny.tokens(shape=(2, 6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads=.* is not supported"),
        ({"architectures": ["BertForQuestionAnswering"]}, "'BertForQuestionAnswering' is not supported"),
        ({"hidden_act": "mish"}, "unknown hidden_act 'mish'"),
        ({"hidden_size": 15}, "hidden_size=15 is not a multiple of num_attention_heads=2"),
        (CLASSIFIER | {"id2label": {"no": 0, "yes": 1}}, "the keys of id2label must be the numbers of the labels"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not one of regression"),
        ({"embedding_size": 8}, "embedding_size=8: transformers reads this for model_type 'bert'"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"model_type": "xlm-roberta", "is_decoder": True}, "is_decoder=True is not supported"),
        ({"model_type": "distilbert"}, "'hidden_dim' is missing"),
        ({"model_type": "modernbert", "classifier_pooling": "max"}, "classifier_pooling='max' is neither"),
        (
            {"model_type": "modernbert", "layer_types": ["chunked_attention"] * 2},
            "layer_types must name sliding_attention",
        ),
        ({"model_type": "modernbert", "rope_parameters": {"rope_theta": 3.0}}, "rope_parameters has rope_theta"),
        ({"model_type": "deberta-v2", "conv_kernel_size": 4}, "conv_kernel_size=4 is even"),
        ({"model_type": "deberta-v2", "embedding_size": 8}, "embedding_size=8: transformers reads this"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(CONFIG | fields)


@pytest.mark.parametrize(
    ("fields", "asked", "labels"),
    [
        (CLASSIFIER, {}, ("no", "yes")),
        ({"architectures": ["BertForTokenClassification"]}, {}, ("LABEL_0", "LABEL_1")),  # the two that are left out
        ({}, {"head": "sequence_classification", "labels": 1}, ("LABEL_0",)),
        ({"id2label": {"0": "no", "1": "yes"}}, {"head": "sequence_classification"}, ("no", "yes")),
        (CLASSIFIER, {"head": "token_classification", "labels": 2}, ("LABEL_0", "LABEL_1")),
        (CLASSIFIER, {"head": "none"}, ()),
    ],
)
def test_the_labels_are_those_of_the_checkpoint_or_those_asked_for(fields: dict, asked: dict, labels: tuple) -> None:
    config = from_hf_config(CONFIG | fields, **asked)
    assert config.labels == labels
    again = from_hf_config(config.to_hf())
    assert (again.head, again.labels) == (config.head, labels)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"head": "sequence-classification"}, "Did you mean 'sequence_classification'"),
        ({"labels": 3}, "labels=3, but the checkpoint's head has 2"),
        ({"head": "token_classification"}, "give the number of labels of the new head"),
        ({"head": "none", "labels": 2}, "labels=2 needs head="),
    ],
)
def test_a_head_that_cannot_be_is_refused(asked: dict, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        peftjax.load_model(folder / "classifier", **asked)
    with pytest.raises(ValueError, match="'llama' has no task head to choose"):
        peftjax.load_model("embedded", **asked)


def test_a_checkpoint_may_have_the_prefix_old_names_and_heads_of_pretraining(folder: Path, tmp_path: Path) -> None:
    def older(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        named = {f"bert.{key}": value for key, value in tensors.items() if not key.startswith("pooler")}
        old = {key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): named[key] for key in named}
        return old | {
            "bert.embeddings.position_ids": np.arange(16)[None],
            "cls.predictions.bias": np.zeros(48, np.float32),
        }

    base = peftjax.load_model(folder / "base")
    path = rewritten(folder / "base", tmp_path / "old", older, architectures=["BertForPreTraining"])
    for head, labels in ((None, None), ("token_classification", 3)):
        model = peftjax.load_model(path, head=head, labels=labels)
        np.testing.assert_array_equal(model.hidden(tokens()), base.hidden(tokens()))
    twice = rewritten(folder / "base", tmp_path / "twice", lambda tensors: tensors | older(tensors))
    with pytest.raises(ValueError, match="are the same tensor"):
        peftjax.load_model(twice)


def test_a_checkpoint_with_a_head_of_another_kind_is_a_base(folder: Path, tmp_path: Path) -> None:
    def chooser(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        prefixed = {f"bert.{key}": value for key, value in tensors.items()}
        return prefixed | {"classifier.weight": np.ones((1, 16), np.float32), "classifier.bias": np.ones(1, np.float32)}

    base = peftjax.load_model(folder / "base")
    path = rewritten(folder / "base", tmp_path / "choice", chooser, architectures=["BertForMultipleChoice"])
    for head, labels in (("none", None), ("token_classification", 3)):
        with pytest.warns(UserWarning, match="the head of BertForMultipleChoice is not supported and is left out"):
            model = peftjax.load_model(path, head=head, labels=labels)
        np.testing.assert_array_equal(model.hidden(tokens()), base.hidden(tokens()))
        assert model.origin.drawn == (() if labels is None else ("classifier.bias", "classifier.kernel"))
        assert model.config.to_hf()["architectures"] == [
            "BertModel" if labels is None else "BertForTokenClassification"
        ]


def test_a_head_is_new_only_where_the_checkpoint_has_none(folder: Path, tmp_path: Path) -> None:
    made = [
        peftjax.load_model(folder / "base", head="sequence_classification", labels=3, seed=seed) for seed in (1, 1, 2)
    ]
    kernels = [model.classifier.kernel.get_value() for model in made]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0
    assert 0.1 < np.std(kernels[0]) < 0.3  # initializer_range
    base = peftjax.load_model(folder / "base")
    np.testing.assert_array_equal(made[0].pooler.kernel.get_value(), base.pooler.kernel.get_value())

    def without(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value for key, value in tensors.items() if key != "classifier.weight"}

    with pytest.raises(ValueError, match=r"1 missing: classifier.weight"):
        peftjax.load_model(rewritten(folder / "classifier", tmp_path / "headless", without))
    with pytest.raises(ValueError, match=r"1 missing: pooler.dense.bias"):
        peftjax.load_model(
            rewritten(
                folder / "base", tmp_path / "half", lambda t: {k: v for k, v in t.items() if k != "pooler.dense.bias"}
            )
        )
    other = peftjax.load_model(folder / "classifier", head="token_classification", labels=2)
    assert other(tokens()).shape == (2, 6, 2)


def test_sentence_transformers_say_the_pooling_and_get_it_back(folder: Path, tmp_path: Path) -> None:
    path = rewritten(folder / "base", tmp_path / "sentences", lambda tensors: tensors)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"path": place, "type": f"sentence_transformers.models.{kind}"} for kind, place in kinds.items()]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    pooling = path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    peftjax.save_model(peftjax.load_model(path), tmp_path / "saved")
    model = peftjax.load_model(tmp_path / "saved")
    first = model.hidden(tokens())[:, 0]
    expected = first / np.linalg.norm(first, axis=-1, keepdims=True)
    np.testing.assert_allclose(model.sentence_vectors(tokens()), expected, atol=1e-6)

    for mode, told in (
        ({"pooling_mode_max_tokens": True}, "pooling_mode_max_tokens"),
        ({"pooling_mode": "max"}, "max"),
    ):
        pooling.write_text(json.dumps(mode))
        with pytest.raises(ValueError, match=f"pooling '{told}' is not supported; supported: mean, cls"):
            peftjax.load_model(path)
    (path / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "models.Dense"}]))
    with pytest.raises(ValueError, match=r"module 'models.Dense' at '3_Dense' is not supported"):
        peftjax.load_model(path)


def test_more_tokens_than_positions_are_refused() -> None:
    model = tiny.make(from_hf_config(CONFIG | {"model_type": "roberta"}))
    model(jnp.full((1, 14), 5))  # 16 rows, of which the padding and what is before it take two
    with pytest.raises(ValueError, match="15 tokens exceed the model's 14 positions"):
        model(jnp.full((1, 15), 5))


# --- Families ---

FAMILIES: dict[str, dict[str, Any]] = {
    "distilbert": {"hidden_dim": 24, "intermediate_size": None},
    "modernbert": {"local_attention": 4},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
}


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("distilbert", peftjax.PrefixTuning(tokens=3)),
        ("modernbert", peftjax.PrefixTuning(tokens=3)),
        ("modernbert", peftjax.PromptTuning(tokens=3)),
        ("deberta-v2", peftjax.PromptTuning(tokens=3)),
        ("deberta-v2", peftjax.Lora(rank=2)),
    ],
)
def test_real_tokens_do_not_depend_on_padding(kind: str, method: Any) -> None:
    model = tiny.make(from_hf_config(CONFIG | {"model_type": kind} | FAMILIES[kind]))
    before = model(tokens()[:, :4])
    tiny.randomize(peftjax.attach(model, method, rngs=nnx.Rngs(1)))
    alone = model(tokens()[:, :4])
    np.testing.assert_allclose(model(tokens(), jnp.arange(6)[None] < 4)[:, :4], alone, atol=1e-5)
    assert np.abs(alone - before).max() > 0.01


def test_local_attention_sees_a_prefix_only_within_its_reach() -> None:
    fields = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "local_attention": 2}
    model = tiny.make(from_hf_config(CONFIG | {"model_type": "modernbert"} | fields))
    before = model(tokens())
    changed = np.abs(model_with_prefix(model)(tokens()) - before).max(axis=(0, 2))
    assert changed[0] > 0.01  # at distance 1 from the last of the three
    assert changed[1:].max() < 1e-5


def model_with_prefix(model: Any) -> Any:
    return tiny.randomize(peftjax.attach(model, peftjax.PrefixTuning(tokens=3), rngs=nnx.Rngs(1)))


def test_a_prefix_needs_attention_with_a_slot() -> None:
    model = tiny.make(from_hf_config(CONFIG | {"model_type": "deberta-v2"}))
    with pytest.raises(ValueError, match="prefix' needs attention layers with a slot"):
        model_with_prefix(model)


# --- Adapters beside a head ---


def classification_loss(model: Any, batch: Any) -> Totals:
    logits = model(batch["tokens"], batch["mask"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return Totals(losses.sum(), jnp.float32(len(losses)), (logits.argmax(-1) == batch["labels"]).sum().astype(float))


@pytest.mark.slow
def test_training_lowers_the_loss_and_moves_the_adapter_and_the_head_alone(folder: Path) -> None:
    model = peftjax.attach(peftjax.load_model(folder / "classifier"), peftjax.Lora(rank=2), rngs=nnx.Rngs(1))
    names = {path for path, leaf in variables.flat(model)[1].items() if type(leaf) is variables.PeftParam}
    assert {"classifier.adapters.default.kernel", "classifier.adapters.default.bias"} <= names
    assert count_trainable(model) == 2 * (2 * (4 * 32 + 2 * 40) + 32) + 16 * 2 + 2  # LoRA of rank 2, and the head
    before, base = model(tokens()), tiny.bits(model)
    rows = np.array(tiny.tokens(shape=(8, 6)))
    batch = {"tokens": rows, "mask": np.ones((8, 6), bool), "labels": rows[:, 0] % 2}
    first = classification_loss(model, batch).loss
    np.testing.assert_array_equal(before, peftjax.use(model, None)(tokens()))
    peftjax.use(model, "default")

    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    model.train()
    graph, leaves = variables.flat(model)
    _, trainable, frozen = variables.split_by_kind(model)
    keys = tuple(path for path, leaf in leaves.items() if isinstance(leaf, variables.DropoutKey))
    state = init_state(trainable, optax.adam(1e-2), seed=0)
    step = make_train_step(Objective(graph, classification_loss, dropout_keys=keys), optax.adam(1e-2), state)
    placed = sharding.shard_batch(batch, mesh)
    for _ in range(25):
        state, _ = step(state, frozen, placed)
    variables.update(model, state.trainable)
    model.eval()
    assert classification_loss(model, batch).loss < 0.5 * first  # without dropout
    assert tiny.bits(model) == base
    assert np.abs(model(tokens()) - before).max() > 0.1


@pytest.mark.slow_cases
@pytest.mark.parametrize("method", [peftjax.Lora(rank=2), peftjax.Houlsby(), peftjax.PromptTuning(tokens=3)])
def test_the_head_is_in_the_adapters_file_and_comes_back(method: Any, folder: Path, tmp_path: Path) -> None:
    model = peftjax.load_model(folder / "classifier")
    before = model(tokens())
    trained = tiny.randomize(peftjax.attach(model, method, rngs=nnx.Rngs(1)))
    peftjax.save_adapter(trained, tmp_path / "adapter")
    again = peftjax.load_adapter(peftjax.load_model(folder / "classifier"), tmp_path / "adapter")
    np.testing.assert_array_equal(again(tokens()), trained(tokens()))
    np.testing.assert_array_equal(peftjax.detach(trained)(tokens()), before)
    if not isinstance(method, peftjax.Houlsby):
        with pytest.raises(ValueError, match="task_type 'SEQ_CLS' needs a model with that task head"):
            peftjax.load_adapter(peftjax.load_model(folder / "base"), tmp_path / "adapter")


def test_a_merged_head_is_the_models_own(folder: Path) -> None:
    model = peftjax.attach(peftjax.load_model(folder / "classifier"), peftjax.Lora(rank=2), rngs=nnx.Rngs(1))
    expected = tiny.randomize(model)(tokens())
    np.testing.assert_allclose(peftjax.merge(model)(tokens()), expected, atol=1e-5)


@pytest.mark.slow
def test_rows_of_a_batch_have_their_own_adapters_and_heads(folder: Path) -> None:
    model = peftjax.load_model(folder / "classifier")
    for index, name in enumerate(("one", "two")):
        tiny.randomize(peftjax.attach(model, peftjax.Lora(rank=2), name, rngs=nnx.Rngs(index)), seed=index)
    mask = jnp.array([[True] * 6, [True] * 4 + [False] * 2])
    given = {"mask": mask, "token_types": mask.astype(int)}
    both = peftjax.rows(model, ("two", "one"))(tokens(), **given)
    for row, name in enumerate(("two", "one")):
        np.testing.assert_allclose(both[row], peftjax.use(model, name)(tokens(), **given)[row], atol=1e-5)
    with pytest.raises(ValueError, match="adapter 'one' has its own classifier, and heads cannot be combined"):
        peftjax.combine(model, ("one", "two"), (0.5, 0.5))


def test_a_hub_adapter_behind_the_norm_is_refused_where_the_norm_is_the_blocks_own(
    folder: Path, tmp_path: Path
) -> None:
    model = peftjax.load_model(folder / "base")
    peftjax.save_adapter(peftjax.attach(model, peftjax.Pfeiffer(), rngs=nnx.Rngs(0)), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"] |= {"original_ln_after": False, "residual_before_ln": False}
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="original_ln_after=False is not supported for a post-norm model, which normalizes"
    ):
        peftjax.load_adapter(peftjax.detach(model), tmp_path / "adapter")
