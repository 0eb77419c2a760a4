"""T5 beside transformers and peft: states and logits, files both ways, generation, and steps of training."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax import adapters, methods
from peftjax.core import variables
from peftjax.decoding import generate_ids
from peftjax.nn.relative_bias import buckets_of_distances
from peftjax.totals import seq2seq_loss
from tests.interop.peers import STEPS, THEIRS, adamw, assert_close, assert_far, attached, shake, train_by_hand

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings(*THEIRS)]
torch.set_num_threads(1)

LAYERS, TOKENS = 3, 5
VARIANTS: dict[str, dict[str, Any]] = {
    "v1.0": {"d_kv": 8},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 6, "num_decoder_layers": 2},
}
# peft gives out a prefix in an order that is another for an even number of layers than for an odd one
EVEN = {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False, "d_kv": 8, "num_layers": 4}
BASES = VARIANTS | {"even": EVEN}


@pytest.fixture(scope="session")
def t5s(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random T5s of both versions, made once."""
    folder = tmp_path_factory.mktemp("t5s")

    def base(name: str) -> Path:
        if not (folder / name).exists():
            kind = (transformers.T5Config, transformers.T5ForConditionalGeneration)
            save_base(folder / name, *kind, BASES[name], own_head=name != "v1.0")
        return folder / name

    return base


def save_base(path: Path, make_config: Any, make_model: Any, fields: dict[str, Any], own_head: bool) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 32, "d_ff": 40, "num_layers": LAYERS, "num_heads": 4}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    model = make_model(make_config(**sizes | buckets | {"decoder_start_token_id": 0} | fields))
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(48, 32))
    shake(dict(model.named_parameters()), 0.1)
    model.save_pretrained(path)


def load_theirs(path: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(path).eval()


def inputs(seed: int = 3) -> dict[str, np.ndarray]:
    """Two texts, the second of them padded on the right, and two targets."""
    rng = np.random.default_rng(seed)
    mask = np.arange(20)[None] < np.array([[20], [13]])
    return {
        "tokens": rng.integers(2, 48, (2, 20)),
        "mask": mask,
        "decoder_tokens": np.pad(rng.integers(2, 48, (2, 15)), ((0, 0), (1, 0))),
    }


def real_tokens(given: dict[str, np.ndarray]) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(given["tokens"], given["mask"], strict=True)]


def call_theirs(model: Any, given: dict[str, np.ndarray], **options: Any) -> Any:
    return model(
        input_ids=torch.tensor(given["tokens"]),
        attention_mask=torch.tensor(given["mask"].astype(np.int64)),
        decoder_input_ids=torch.tensor(given["decoder_tokens"]),
        **options,
    )


def logits(model: Any) -> np.ndarray:
    if isinstance(model, nnx.Module):
        return np.asarray(model(**{name: jnp.asarray(value) for name, value in inputs().items()}))
    with torch.no_grad():
        return call_theirs(model, inputs()).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_state_and_the_logits_are_those_of_transformers(name: str, t5s: Callable) -> None:
    theirs, ours, given = load_theirs(t5s(name)), peftjax.load_model(t5s(name)), inputs()
    with torch.no_grad():
        expected = call_theirs(theirs, given, output_hidden_states=True)
    real = given["mask"]
    # Within the stack: the first blocks alone, with the bias that all share.
    places = {"encoder": 20, "decoder": 16}
    bias = {
        stack: getattr(ours, f"{stack}_bias")(jnp.arange(length), jnp.arange(length), jnp.float32)
        for stack, length in places.items()
    }
    for stack, length in places.items():
        attention = getattr(theirs, stack).block[0].layer[0].SelfAttention
        np.testing.assert_allclose(
            bias[stack], attention.compute_bias(length, length).detach(), atol=1e-6, err_msg=stack
        )
    first = {stack: first_layer(getattr(ours, stack)) for stack in places}
    keys = jnp.asarray(real)[:, None, None]
    before = [
        jnp.asarray(states[0].numpy()) for states in (expected.encoder_hidden_states, expected.decoder_hidden_states)
    ]
    after = [states[1].numpy() for states in (expected.encoder_hidden_states, expected.decoder_hidden_states)]
    encoded = jax.jit(lambda x: first["encoder"](x, keys, bias["encoder"]))(before[0])
    assert_close(np.asarray(encoded)[real], after[0][real])
    memory = jnp.asarray(expected.encoder_last_hidden_state.numpy())
    causal = jnp.tril(jnp.ones((16, 16), bool))[None, None]
    cross = first["decoder"].cross.keys_values(memory)
    decoded = jax.jit(lambda x: first["decoder"](x, causal, bias["decoder"], cross, keys, None, 0)[0])(before[1])
    assert_close(decoded, after[1])
    states = jax.jit(lambda tokens: ours.encode(tokens, mask=jnp.asarray(real))[0])(jnp.asarray(given["tokens"]))
    assert_close(np.asarray(states)[real], np.asarray(memory)[real])
    got = logits(ours)
    assert np.abs(expected.logits.numpy()).max() > 1
    assert np.abs(got - expected.logits.numpy()).max() < 1e-5


def first_layer(stack: Any) -> Any:
    graph, leaves = variables.flat(stack)
    values = {path: leaf.get_value() for path, leaf in leaves.items()}
    return variables.join(graph, jax.jit(partial(jax.tree.map, lambda leaf: leaf[0]))(values))


def test_scaling_and_a_head_of_its_own_are_read_and_written_as_transformers_does(tmp_path: Path) -> None:
    """Whether the head is tied the tensors say. mT5 never scales; T5 does unless its config.json says otherwise."""
    t5 = (transformers.T5Config, transformers.T5ForConditionalGeneration)
    mt5 = (transformers.MT5Config, transformers.MT5ForConditionalGeneration)
    for index, (kind, own_head) in enumerate([(t5, True), (mt5, True), (mt5, False)]):
        save_base(tmp_path / f"{index}", *kind, {"d_kv": 8}, own_head)
        ours = peftjax.load_model(tmp_path / f"{index}")
        assert ours.tied != own_head
        assert_close(logits(ours), logits(load_theirs(tmp_path / f"{index}")))
        peftjax.save_model(ours, tmp_path / f"saved {index}")
        assert_close(logits(load_theirs(tmp_path / f"saved {index}")), logits(ours))


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_what_we_save_and_generates_the_same(name: str, t5s: Callable, tmp_path: Path) -> None:
    ours = peftjax.load_model(t5s(name))
    peftjax.save_model(ours, tmp_path / "saved", source=t5s(name))
    theirs = load_theirs(tmp_path / "saved")
    assert_close(logits(theirs), logits(load_theirs(t5s(name))), 0.0)
    given = inputs()
    answers = theirs.generate(
        input_ids=torch.tensor(given["tokens"]),
        attention_mask=torch.tensor(given["mask"].astype(np.int64)),
        max_new_tokens=12,
        do_sample=False,
    )
    ended = [[*row.tolist()[1:], 1] for row in answers]  # after the start token; 1 is the end of text
    assert generate_ids(ours, real_tokens(given), max_new_tokens=12, stop=(1,)) == [
        row[: row.index(1)] for row in ended
    ]


def test_old_files_that_hold_the_embedding_under_other_names_load(t5s: Callable, tmp_path: Path) -> None:
    tensors = load_file(t5s("v1.0") / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    tensors["lm_head.weight"] = tensors["encoder.embed_tokens.weight"].copy()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(tensors | {unused: np.zeros((8, 4), np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((t5s("v1.0") / "config.json").read_text())
    model = peftjax.load_model(tmp_path)
    assert model.tied
    np.testing.assert_array_equal(logits(model), logits(peftjax.load_model(t5s("v1.0"))))


def test_the_buckets_are_those_of_transformers() -> None:
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for buckets, farthest in ((32, 128), (16, 128), (32, 64), (7, 20), (4, 1000)):
        distances = torch.arange(farthest + 1)
        expected = bucket(-distances, bidirectional=False, num_buckets=buckets, max_distance=farthest)
        np.testing.assert_array_equal(buckets_of_distances(buckets, farthest), expected.numpy())


# --- Adapters ---

PEERS: dict[str, tuple[adapters.Method, Callable[[], Any]]] = {
    "lora": (
        methods.Lora(rank=4, alpha=8, targets="all-linear"),
        lambda: peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    ),
    "ia3": (
        methods.Ia3(targets=("k", "v", "wo"), feedforward=("wo",)),
        lambda: peft.IA3Config(target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
    ),
    "prompt": (methods.PromptTuning(tokens=TOKENS), lambda: peft.PromptTuningConfig(num_virtual_tokens=TOKENS)),
    "prefix": (methods.PrefixTuning(tokens=TOKENS), lambda: peft.PrefixTuningConfig(num_virtual_tokens=TOKENS)),
}


def test_an_adapter_of_the_shared_embedding_is_said_to_be_without_effect_in_peft(t5s: Callable, tmp_path: Path) -> None:
    method = methods.Lora(rank=4, targets=("q",), modules_to_save=("shared",))
    with pytest.warns(UserWarning, match=r"peft will not apply the adapter of shared, because .*encoder\.embed_tokens"):
        peftjax.save_adapter(attached(t5s("v1.1"), method), tmp_path)
    table = peftjax.load_model(t5s("v1.1")).embed.embedding.get_value()
    model = peft.PeftModel.from_pretrained(load_theirs(t5s("v1.1")), tmp_path)
    np.testing.assert_array_equal(model.base_model.model.encoder.embed_tokens.weight.detach().numpy(), table)


def test_the_trained_tokens_of_all_tied_embeddings_are_read(t5s: Callable, tmp_path: Path) -> None:
    theirs = adapted(t5s("v1.0"), peft.TrainableTokensConfig(token_indices=[7, 3]))
    theirs.save_pretrained(tmp_path)
    model = peftjax.load_model(t5s("v1.0"))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)


@pytest.mark.parametrize(("container", "layer"), [("layer", 0), ("layer", 2), ("block", 1)])
def test_layers_pattern_numbers_the_sublayers_or_the_blocks(
    container: str, layer: int, t5s: Callable, tmp_path: Path
) -> None:
    """The feed-forward sublayer is 1 in the encoder and 2 in the decoder, the cross-attention 1."""
    config = peft.LoraConfig(r=4, target_modules=["q", "wo"], layers_to_transform=layer, layers_pattern=container)
    theirs = adapted(t5s("v1.0"), config)
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_adapter(peftjax.load_model(t5s("v1.0")), tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))
    peftjax.save_adapter(model, tmp_path / "ours")
    assert_close(logits(load_into_theirs(t5s("v1.0"), tmp_path / "ours")), logits(theirs))


def adapted(base: Path, config: Any) -> Any:
    """Their model with their adapter, of which whatever would be trained has moved."""
    config.task_type = "SEQ_2_SEQ_LM"
    model = peft.get_peft_model(load_theirs(base), config).eval()
    shake({path: p for path, p in model.named_parameters() if p.requires_grad}, 0.1)
    return model


def load_into_theirs(base: Path, adapter: Path) -> Any:
    model = peft.PeftModel.from_pretrained(load_theirs(base), adapter).eval()
    used = peft.get_peft_model_state_dict(model)
    file = load_file(adapter / "adapter_model.safetensors")
    assert used.keys() == file.keys()
    for key, value in file.items():
        np.testing.assert_array_equal(used[key].detach().numpy(), value, err_msg=key)
    return model


CASES = [("lora", "v1.1"), ("ia3", "v1.1"), ("prompt", "v1.1"), ("prefix", "v1.0"), ("prefix", "even")]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_adapters_go_both_ways_between_peft_and_us(method: str, name: str, t5s: Callable, tmp_path: Path) -> None:
    ours, make_theirs = PEERS[method]
    theirs = adapted(t5s(name), make_theirs())
    theirs.save_pretrained(tmp_path / "theirs")
    model = peftjax.load_model(t5s(name))
    before = logits(model)
    peftjax.load_adapter(model, tmp_path / "theirs")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), before)
    assert adapters.count_trainable(model) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    peftjax.save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, value in load_file(tmp_path / "theirs" / "adapter_model.safetensors").items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)

    model = attached(t5s(name), ours)
    peftjax.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert_close(logits(model), logits(load_into_theirs(t5s(name), tmp_path / "ours")))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_text_generated_with_virtual_tokens_is_what_peft_finds_likeliest(
    method: str, t5s: Callable, tmp_path: Path
) -> None:
    """By its forward passes: its `generate` forgets the prefix under transformers 5.24."""
    theirs, given = adapted(t5s("even"), PEERS[method][1]()), inputs()
    theirs.save_pretrained(tmp_path)
    target = np.zeros((2, 1), np.int64)
    with torch.no_grad():
        for _ in range(10):
            last = call_theirs(theirs, given | {"decoder_tokens": target}).logits[:, -1]
            target = np.concatenate([target, last.argmax(-1, keepdim=True).numpy()], axis=1)
    model, prompts = peftjax.load_model(t5s("even")), real_tokens(given)
    plain = generate_ids(model, prompts, max_new_tokens=10)
    assert generate_ids(peftjax.load_adapter(model, tmp_path), prompts, max_new_tokens=10) == target[:, 1:].tolist()
    assert target[:, 1:].tolist() != plain


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_steps_of_adamw_equal_those_of_torch_and_peft(method: str, t5s: Callable, tmp_path: Path) -> None:
    """In evaluation, which is without dropout, for random bits are each library's own."""
    theirs = adapted(t5s("v1.0"), PEERS[method][1]())
    theirs.save_pretrained(tmp_path / "start")
    model = peftjax.load_adapter(peftjax.load_model(t5s("v1.0")), tmp_path / "start")
    batches = [inputs(seed) for seed in range(STEPS)]
    targets = [np.roll(batch["decoder_tokens"], -1, axis=1) for batch in batches]

    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer, expected = adamw(parameters), []
    for batch, target in zip(batches, targets, strict=True):
        optimizer.zero_grad()
        loss = call_theirs(theirs, batch, labels=torch.tensor(target)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        expected.append(loss.item())

    steps = [
        batch | {"targets": target, "loss_weights": np.ones(target.shape, np.float32)}
        for batch, target in zip(batches, targets, strict=True)
    ]
    np.testing.assert_allclose(train_by_hand(model, steps, seq2seq_loss), expected, rtol=1e-5)
    peftjax.save_adapter(model, tmp_path / "end")
    moved = peft.get_peft_model_state_dict(theirs)
    for key, value in load_file(tmp_path / "end" / "adapter_model.safetensors").items():
        np.testing.assert_allclose(value, moved[key].detach().numpy(), atol=1e-4, rtol=0, err_msg=key)
