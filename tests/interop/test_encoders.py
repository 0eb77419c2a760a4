"""Text encoders beside transformers, and their adapters beside peft, in float32."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file
from transformers.models.deberta_v2 import modeling_deberta_v2 as deberta

import peftjax
from peftjax import sharding, totals
from peftjax.adapters import count_trainable
from peftjax.core import variables
from peftjax.nn.disentangled import rows_of_positions
from peftjax.totals import Totals
from peftjax.training.step import Objective, init_state, make_train_step
from tests import tiny
from tests.interop.peers import (
    THEIRS,
    adamw,
    adapted,
    assert_close,
    assert_far,
    attached,
    batches,
    load_into_theirs,
    load_theirs,
    optimizer_for,
    shake,
    task_type,
    trainable_theirs,
)

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]

LENGTH, ROWS = 9, 2
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "num_labels": 3,
}

KINDS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "DistilBert": {
        "vocab_size": 48,
        "dim": 32,
        "hidden_dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        "num_labels": 3,
    },
    "ModernBert": SIZES | {"local_attention": 5, "num_hidden_layers": 4, "pad_token_id": 0},  # layers 0 and 3 are global
    "DebertaV2": SIZES | {
        "relative_attention": True,
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "position_biased_input": False,
    },  # as v3
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "ModernBert biased": {
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "classifier_activation": "relu",
        "hidden_activation": "silu",
        "classifier_pooling": "mean",
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "DebertaV2 convolution": {  # as v2-xlarge
        "conv_kernel_size": 3,
        "conv_groups": 2,
        "conv_act": "gelu",
    },
    "DebertaV2 own projections": {
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "position_buckets": -1,
        "max_relative_positions": 6,
        "position_biased_input": True,
        "type_vocab_size": 2,
        "pooler_hidden_act": "tanh",
        "cls_dropout": 0.3,
    },
    "DebertaV2 one term": {
        "share_att_key": False,
        "pos_att_type": ["c2p"],
        "num_labels": 1,
        "problem_type": "regression",
    },
    "DebertaV2 absolute": {"relative_attention": False, "position_biased_input": True},
}
SEQUENCES = "ForSequenceClassification"
CLASSIFIERS = ("BertForSequenceClassification", "RobertaForSequenceClassification")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model of a transformers class, or of a variant, saved by transformers; made once."""
    folder = tmp_path_factory.mktemp("encoders")

    def make(name: str, variant: str = "") -> Path:
        path = folder / name / variant.replace(" ", "_")
        if not (path / "config.json").exists():
            torch.manual_seed(0)
            fields = KINDS[kind_of(name)] | VARIANTS.get(variant, {})
            model = getattr(transformers, name)(getattr(transformers, f"{kind_of(name)}Config")(**fields))
            shake(dict(model.named_parameters()), 0.1)  # the biases and the norms' scales too
            model.save_pretrained(path)
        return path

    return make


def kind_of(name: str) -> str:
    return next(kind for kind in KINDS if name.startswith(kind))


def inputs(kind: str, vocab: int = 48) -> dict[str, np.ndarray]:
    """Two rows, the second one shorter, each of two sentences."""
    rng = np.random.default_rng(3)
    mask = np.ones((ROWS, LENGTH), bool)
    mask[1, 6:] = False
    tokens = np.where(mask, rng.integers(2, vocab, (ROWS, LENGTH)), int("Roberta" in kind))
    return {"tokens": tokens, "mask": mask, "token_types": np.tile(np.arange(LENGTH) > 3, (ROWS, 1)).astype(int)}


def ours(model: Any) -> np.ndarray:
    given = inputs("Roberta" if "roberta" in model.config.kind else "Bert")
    return real(np.asarray(model(**{name: jnp.asarray(value) for name, value in given.items()})))


def theirs(model: Any) -> np.ndarray:
    outputs = their_outputs(model)
    return real((outputs.logits if "logits" in outputs else outputs.last_hidden_state).numpy())


def real(outputs: np.ndarray) -> np.ndarray:
    """The outputs of real tokens. A padded position may see no token, and its output is then arbitrary."""
    return outputs[inputs("Bert")["mask"]] if outputs.ndim == 3 else outputs


def their_outputs(model: Any, **options: Any) -> Any:
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    kind = kind_of(type(base).__name__)
    given = {name: torch.tensor(value) for name, value in inputs(kind).items()}
    given = {
        "input_ids": given["tokens"],
        "attention_mask": given["mask"].long(),
        "token_type_ids": given["token_types"],
    }
    if kind in ("DistilBert", "ModernBert"):
        del given["token_type_ids"]
    with torch.no_grad():
        if not isinstance(model, peft.PeftModel) or model.active_peft_config.peft_type != "PREFIX_TUNING":
            return model(**given, **options)
        # peft 0.21 looks for an argument past_key_values, which encoders call cache since transformers 5.24
        cache = model.get_prompt(ROWS)
        given["attention_mask"] = torch.nn.functional.pad(given["attention_mask"], (cache.get_seq_length(), 0), value=1)
        return base(**given, cache=cache)


# --- Models ---


MODELS = [(kind + head, "") for kind in KINDS for head in ("Model", SEQUENCES, "ForTokenClassification")]
MODELS += [(kind_of(variant) + SEQUENCES, variant) for variant in VARIANTS]


@pytest.mark.parametrize(("name", "variant"), MODELS)
def test_logits_are_those_of_transformers_and_the_saved_model_is_read_back(
    name: str, variant: str, encoder: Callable, tmp_path: Path
) -> None:
    path = encoder(name, variant)
    model = peftjax.load_model(path)
    expected = theirs(load_theirs(path))
    assert np.abs(expected).max() > 0.5  # else a small difference says little
    np.testing.assert_allclose(ours(model), expected, atol=1e-5)

    peftjax.save_model(model, tmp_path / "saved")
    again, info = type(load_theirs(path)).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched, errors
    np.testing.assert_array_equal(theirs(again.eval()), expected)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written == json.loads((path / "config.json").read_text()) | {"saved_by": "peftjax"}


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_the_states_after_each_layer_are_those_of_transformers(kind: str, encoder: Callable) -> None:
    model = peftjax.load_model(encoder(f"{kind}Model"))
    outputs = their_outputs(load_theirs(encoder(f"{kind}Model")), output_hidden_states=True)
    given = {name: jnp.asarray(value) for name, value in inputs(kind).items()}
    x = model.embedded(given["tokens"], given["token_types"])
    np.testing.assert_allclose(x, outputs.hidden_states[0], atol=1e-5, err_msg="embeddings")
    graph, leaves = variables.flat(model.blocks)
    for layer, expected in enumerate(outputs.hidden_states[1:]):
        block = variables.join(graph, {path: leaf.get_value()[layer] for path, leaf in leaves.items()})
        x = jax.jit(lambda x, block=block: block(x, given["mask"][:, None, None]))(x)
        np.testing.assert_allclose(x, expected, atol=1e-5, err_msg=f"layer {layer}")
    np.testing.assert_allclose(model.pooled(x[:, 0]), outputs.pooler_output, atol=1e-5, err_msg="pooler")


PRETRAINED = ["BertForPreTraining", "RobertaForMaskedLM", "DistilBertForMaskedLM", "ModernBertForMaskedLM"]


@pytest.mark.parametrize("name", [*PRETRAINED, "DebertaV2ForMaskedLM"])
def test_a_pretrained_model_is_a_base_for_a_new_head(name: str, encoder: Callable, tmp_path: Path) -> None:
    model = peftjax.load_model(encoder(name), head="token_classification", labels=5)
    outputs = their_outputs(load_theirs(encoder(name)), output_hidden_states=True)
    hidden = model.hidden(*(jnp.asarray(value) for value in inputs(kind_of(name)).values()))
    np.testing.assert_allclose(real(hidden), real(outputs.hidden_states[-1].numpy()), atol=1e-5)
    peftjax.save_model(model, tmp_path / "saved")
    np.testing.assert_allclose(theirs(load_theirs(tmp_path / "saved")), ours(model), atol=1e-5)


def test_a_real_encoder_gives_the_states_and_the_sentence_vectors_of_torch(assets: Path) -> None:
    model, peer = peftjax.load_model(assets / "minilm_l6_fp16"), load_theirs(assets / "minilm_l6_fp16").float()
    given = inputs("Bert", vocab=30000)
    tokens, mask = jnp.asarray(given["tokens"]), jnp.asarray(given["mask"])
    with torch.no_grad():
        attention = torch.tensor(given["mask"]).long()
        states = peer(torch.tensor(given["tokens"]), attention_mask=attention).last_hidden_state
    np.testing.assert_allclose(model.hidden(tokens, mask)[given["mask"]], states[given["mask"]], atol=2e-5)
    mean = (states * attention[..., None]).sum(1) / attention.sum(1, keepdim=True)
    np.testing.assert_allclose(model.sentence_vectors(tokens, mask), mean, atol=2e-5)


# --- Adapters ---

PEERS: dict[str, tuple[peftjax.methods.Method, Callable[[], peft.PeftConfig]]] = {
    "lora": (
        peftjax.Lora(rank=4, alpha=8, targets="all-linear"),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    ),
    "ia3": (
        peftjax.Ia3(targets=("key", "value", "output.dense"), feedforward=("output.dense",)),
        lambda: peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
        ),
    ),
    "q_lin": (  # with "all-linear" peft fails: it adapts the first layer of the head, which it also saves
        peftjax.Lora(rank=4, targets=("q_lin", "lin1")),
        lambda: peft.LoraConfig(r=4, target_modules=["q_lin", "lin1"]),
    ),
    "pooler": (
        peftjax.Lora(rank=4, targets=("query_proj", "value_proj"), modules_to_save=("pooler",)),
        lambda: peft.LoraConfig(r=4, target_modules=["query_proj", "value_proj"], modules_to_save=["pooler"]),
    ),
    "prompt": (peftjax.PromptTuning(tokens=5), lambda: peft.PromptTuningConfig(num_virtual_tokens=5)),
    "prefix": (peftjax.PrefixTuning(tokens=5), lambda: peft.PrefixTuningConfig(num_virtual_tokens=5)),
}  # fmt: skip
CASES = [(method, name) for method in ("lora", "ia3", "prompt", "prefix") for name in CLASSIFIERS]
CASES += [("lora", "BertModel"), ("ia3", "BertForTokenClassification")]  # the other task types
CASES += [("lora", kind + SEQUENCES) for kind in ("XLMRoberta", "ModernBert", "DebertaV2")]
CASES += [("prompt", kind + SEQUENCES) for kind in ("ModernBert", "DebertaV2")]
CASES += [("q_lin", "DistilBert" + SEQUENCES), ("pooler", "DebertaV2" + SEQUENCES)]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_adapters_go_both_ways_between_here_and_peft(method: str, name: str, encoder: Callable, tmp_path: Path) -> None:
    base, (mine, config) = encoder(name), PEERS[method]
    peer = adapted(base, config())
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(base)
    before = ours(model)
    peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(ours(model), theirs(peer))
    assert_far(ours(model), before)
    assert count_trainable(model) == sum(p.numel() for p in peer.parameters() if p.requires_grad)

    model = attached(base, mine)
    peftjax.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == task_type(base)
    assert_close(theirs(load_into_theirs(base, tmp_path / "ours").eval()), ours(model))
    assert_far(ours(model), before)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_an_adapter_holds_the_pooler_of_a_new_deberta_head(method: str, encoder: Callable, tmp_path: Path) -> None:
    base, (mine, _) = encoder("DebertaV2Model"), PEERS[method]
    given = jnp.asarray(inputs("DebertaV2")["tokens"])
    model = peftjax.load_model(base, head="sequence_classification", labels=3)
    peftjax.save_adapter(tiny.randomize(peftjax.attach(model, mine, rngs=nnx.Rngs(0))), tmp_path / "ours")
    head = transformers.DebertaV2ForSequenceClassification.from_pretrained(base, num_labels=3)  # with another pooler
    peer = peft.PeftModel.from_pretrained(head, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = peer(torch.tensor(np.asarray(given)), attention_mask=torch.ones(given.shape)).logits
    assert_close(np.asarray(model(given)), expected.numpy())
    again = peftjax.load_model(base, head="sequence_classification", labels=3, seed=1)
    peftjax.load_adapter(again, tmp_path / "ours")  # it replaces the new head
    np.testing.assert_array_equal(again(given), model(given))


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("BertForTokenClassification", ("bert.pooler.dense",)), ("ModernBertModel", ("head.dense", "head.norm"))],
)
def test_a_part_of_the_head_that_the_checkpoint_lacks_is_random_unless_it_is_saved(
    name: str, lacking: tuple[str, ...], encoder: Callable, tmp_path: Path
) -> None:
    base, given = encoder(name), jnp.asarray(inputs(kind_of(name))["tokens"])
    options: dict[str, Any] = {"head": "sequence_classification", "labels": 5, "new_head": True}
    model = peftjax.load_model(base, **options)
    with pytest.warns(
        UserWarning, match=rf"has no {', '.join(lacking)}: random .* set method\.modules_to_save=\('{lacking[0]}'"
    ):
        peftjax.attach(model, peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    model = peftjax.load_model(base, **options)
    method = peftjax.Lora(rank=2, modules_to_save=lacking)
    peftjax.save_adapter(tiny.randomize(peftjax.attach(model, method, rngs=nnx.Rngs(0))), tmp_path / "ours")
    head = getattr(transformers, f"{kind_of(name)}ForSequenceClassification")
    peer = peft.PeftModel.from_pretrained(
        head.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True), tmp_path / "ours"
    ).eval()
    with torch.no_grad():
        expected = peer(torch.tensor(np.asarray(given)), attention_mask=torch.ones(given.shape)).logits
    assert_close(np.asarray(model(given)), expected.numpy())
    again = peftjax.load_model(base, **options, seed=1)  # with other random weights, all of which the file replaces
    peftjax.load_adapter(again, tmp_path / "ours")
    np.testing.assert_array_equal(again(given), model(given))


def test_an_adapter_without_a_task_leaves_the_head_as_it_is(encoder: Callable, tmp_path: Path) -> None:
    base = encoder(CLASSIFIERS[0])
    peer = peft.get_peft_model(load_theirs(base), peft.LoraConfig(r=4, target_modules=["query"])).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer))
    assert count_trainable(model) == sum(p.numel() for p in peer.parameters() if p.requires_grad)
    peftjax.save_adapter(model, tmp_path / "ours")  # and none is written
    assert_close(theirs(load_into_theirs(base, tmp_path / "ours").eval()), theirs(peer))


HEADS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["query", "classifier"], "lora_alpha": 7, "use_rslora": True},
    "lora of a layer": {"target_modules": ["query", "dense"], "alpha_pattern": {"classifier.dense": 3}},
    "biases": {"target_modules": ["query"], "bias": "all"},
    "lora and biases": {"target_modules": ["query", "classifier"], "bias": "all"},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_a_head_that_is_trained_in_part_is_read_as_a_whole(
    options: dict[str, Any], name: str, encoder: Callable, tmp_path: Path
) -> None:
    base = encoder(name + SEQUENCES)
    targets = [each if name == "Bert" or each != "classifier" else "out_proj" for each in options["target_modules"]]
    peer = peft.get_peft_model(load_theirs(base), peft.LoraConfig(r=4, **options | {"target_modules": targets})).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # alpha_pattern: BERT has no such layer
        peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(ours(model), theirs(peer))
    assert_far(ours(model), theirs(load_theirs(base)))
    peftjax.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(load_theirs(base), tmp_path / "ours").eval()
    assert_close(theirs(back), theirs(peer))


def test_a_lora_of_the_head_for_tokens_is_written_as_a_whole_head(encoder: Callable, tmp_path: Path) -> None:
    base = encoder("BertForTokenClassification")
    config = peft.LoraConfig(r=4, target_modules=["query", "classifier"])
    peer = peft.get_peft_model(load_theirs(base), config).eval()
    shake({name: p for name, p in peer.named_parameters() if p.requires_grad}, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path / "theirs")
    assert_close(ours(model), theirs(peer))
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(theirs(load_into_theirs(base, tmp_path / "ours").eval()), theirs(peer))


def test_another_adapter_of_the_head_is_refused(encoder: Callable, tmp_path: Path) -> None:
    base = encoder(CLASSIFIERS[0])
    config = peft.IA3Config(target_modules=["query", "classifier"], feedforward_modules=[])
    peft.get_peft_model(load_theirs(base), config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"has an adapter of the task head \(classifier\), which is trained in full here"
    ):
        peftjax.load_adapter(peftjax.load_model(base), tmp_path)


def test_trained_tokens_leave_the_head_as_it_is(encoder: Callable, tmp_path: Path) -> None:
    """The config of this method has no modules_to_save, so peft neither trains nor saves the head, whatever the task."""
    base = encoder(CLASSIFIERS[0])
    peer = adapted(base, peft.TrainableTokensConfig(token_indices=inputs("Bert")["tokens"][0, :2].tolist()))
    peer.save_pretrained(tmp_path)
    model = peftjax.load_adapter(peftjax.load_model(base), tmp_path)
    assert_close(ours(model), theirs(peer))
    assert_far(ours(model), theirs(load_theirs(base)))


@pytest.mark.parametrize("kind", ["Roberta", "ModernBert", "DebertaV2"])
def test_five_steps_of_adamw_equal_those_of_torch_and_peft(kind: str, encoder: Callable, tmp_path: Path) -> None:
    base = encoder(kind + SEQUENCES)
    mine, config = PEERS["lora"]
    model = peftjax.attach(peftjax.load_model(base), mine, rngs=nnx.Rngs(0))
    start = load_file(peftjax.save_adapter(model, tmp_path / "start") / "adapter_model.safetensors")
    peer = trainable_theirs(base, config(), tmp_path / "start").eval()  # without dropout, as ours is before train()

    parameters = [p for p in peer.parameters() if p.requires_grad]
    optimizer, expected = adamw(parameters), []
    for ids in map(torch.tensor, batches()):
        loss = peer(ids, labels=ids[:, 0] % 3).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())

    np.testing.assert_allclose(train(model), expected, rtol=1e-5)
    end = load_file(peftjax.save_adapter(model, tmp_path / "end") / "adapter_model.safetensors")
    for key, value in peft.get_peft_model_state_dict(peer).items():
        np.testing.assert_allclose(end[key], value.numpy(), atol=1e-4, rtol=0, err_msg=key)
    out = OUT + (".out_proj.weight" if kind == "Roberta" else ".weight")
    assert np.abs(end[out] - start[out]).max() > 10 * 1e-4


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression", "words"])
def test_the_loss_of_every_task_is_that_of_transformers(problem: str, encoder: Callable, tmp_path: Path) -> None:
    name = "BertForTokenClassification" if problem == "words" else "BertForSequenceClassification"
    given, rng = inputs("Bert"), np.random.default_rng(0)
    labels: dict[str, np.ndarray] = {
        "single_label": np.array([2, 0]),
        "multi_label": np.array([[1, 0, 1], [0, 1, 0]], np.float32),
        "regression": np.array([0.5, -2.0], np.float32),
        "words": rng.integers(0, 3, given["tokens"].shape),
    }
    loss = {
        "single_label": totals.classification_loss,
        "multi_label": totals.multi_label_loss,
        "regression": totals.regression_loss,
        "words": totals.classification_loss,
    }[problem]
    head = (
        {}
        if problem == "words"
        else {"problem_type": problem if problem == "regression" else f"{problem}_classification"}
    )
    base = encoder("BertForTokenClassification" if problem == "words" else "BertModel")
    if problem == "regression":
        head["num_labels"] = 1
    theirs = getattr(transformers, name).from_pretrained(base, **head).eval()
    theirs.save_pretrained(tmp_path / "model")
    weights = given["mask"].astype(np.float32) if problem == "words" else np.ones(ROWS, np.float32)
    told = np.where(weights > 0, labels[problem], -100) if problem == "words" else labels[problem]
    with torch.no_grad():
        expected = theirs(
            torch.tensor(given["tokens"]),
            attention_mask=torch.tensor(given["mask"]),
            token_type_ids=torch.tensor(given["token_types"]),
            labels=torch.tensor(told),
        ).loss
    model = peftjax.load_model(tmp_path / "model")
    logits = model(given["tokens"], mask=given["mask"], token_types=given["token_types"])
    found = loss(logits, {"labels": labels[problem], "loss_weights": weights})
    np.testing.assert_allclose(found.loss / found.tokens, float(expected), rtol=1e-5)


OUT = "base_model.model.classifier"


def train(model: Any) -> list[float]:
    """With the train command's own step."""
    mesh = sharding.make_mesh()
    sharding.place(model, mesh)
    graph, trainable, frozen = variables.split_by_kind(model)
    optimizer, losses = optimizer_for(model, trainable), []
    state = init_state(trainable, optimizer, seed=0)
    step = make_train_step(Objective(graph, cross_entropy), optimizer, state)
    for ids in batches():
        state, measured = step(state, frozen, sharding.shard_batch({"tokens": ids, "labels": ids[:, 0] % 3}, mesh))
        losses.append(float(measured["loss"]))
    variables.update(model, state.trainable)
    return losses


def cross_entropy(model: Any, batch: Any) -> Totals:
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["labels"])
    return Totals(losses.sum(), jnp.float32(len(losses)), jnp.float32(0))


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (4, 32), (32, 40), (0, 8)])
def test_the_buckets_of_deberta_are_those_of_transformers(buckets: int, furthest: int) -> None:
    length, span = 600, buckets or furthest
    query = torch.zeros(1, length, 1)
    relative = deberta.build_relative_position(query, query, buckets, furthest)[0]
    expected = torch.clamp(relative + span, 0, 2 * span - 1).numpy()
    np.testing.assert_array_equal(rows_of_positions(length, span, buckets, furthest), expected)
