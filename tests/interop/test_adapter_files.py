"""Adapter directories as peft and people leave them, each with the logits of peft."""

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from safetensors.numpy import load_file, save_file

import peftjax
from peftjax.adapters import count_trainable
from peftjax.io.adapter_as_lora import CONVERTED, OWN, SHARED
from peftjax.io.adapter_load import GENERAL_FIELDS
from peftjax.io.adapter_method import read_method
from peftjax.methods import METHODS
from tests.interop.peers import (
    THEIRS,
    adapted,
    assert_close,
    assert_far,
    load_into_theirs,
    load_theirs,
    logits,
    save_base,
    shake,
    tokens,
)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings(*THEIRS, "ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QV = ["q_proj", "v_proj"]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(QV)} | options)


def edit(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def rename(directory: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file({change(key): value for key, value in tensors.items()}, directory / WEIGHTS, metadata={"format": "pt"})


def load(base: Path, directory: Path, warning: str | None) -> Any:
    """Our model with the adapter; warning: a part of the one warning that loading it gives, None: it gives none."""
    model = peftjax.load_model(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peftjax.load_adapter(model, directory)
    messages = [str(entry.message) for entry in caught]
    assert len(messages) == (warning is not None), messages
    assert warning is None or re.search(warning, messages[0]), messages
    return model


# --- Fields and entries of the config that match nothing ---


def test_the_fields_of_peft_are_known() -> None:
    for method in METHODS.values():
        if method.peft_type:
            theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method.peft_type])}
            assert theirs - GENERAL_FIELDS <= method.hf_known(), method.peft_type
    for kind in CONVERTED:
        theirs = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        assert theirs <= OWN[kind].keys() | SHARED, kind


def test_every_method_of_peft_is_read_or_refused_as_the_documentation_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
    refused = set(re.findall(r"`(\w+Config)`", text.split("Not supported: ")[1].split("\n\n")[0]))
    read = {method.peft_type for method in METHODS.values()} | set(CONVERTED)
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        assert f"`{config.__name__}`" in text, kind
        assert (kind.value in read) != (config.__name__ in refused), kind
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": kind.value}))
        if kind.value not in read:
            with pytest.raises(ValueError, match=f"peft_type '{kind.value}' is not supported; supported: "):
                read_method(tmp_path)


ENTRIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "target_modules": ({"target_modules": [*QV, "v_porj"]}, "target_modules 'v_porj'"),
    "exclude_modules": ({"exclude_modules": ["layers.0.self_attn.q_proj", "vision"]}, "exclude_modules 'vision'"),
    "exclude_regex": ({"exclude_modules": "vision.*"}, r"exclude_modules 'vision\.\*'"),
    "exclude_string": ({"exclude_modules": "q_proj"}, r"exclude_modules '\(\?:q_proj\)'"),  # a regex for whole names
    "whole_names": ({"target_modules": [*QV, "lm_head"], "layers_to_transform": [1]}, None),  # lm_head, in no layer
    "modules_to_save": ({"modules_to_save": ["lm_head", "score2"]}, "modules_to_save 'score2'"),
    "patterns": (
        {"rank_pattern": {"k_proj": 2, "v_proj": 3}, "alpha_pattern": {"o_proj": 2}},
        "rank_pattern 'k_proj'; alpha_pattern 'o_proj'",
    ),
    "layers_to_transform": ({"layers_to_transform": [1, 40]}, "layers_to_transform 40"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "bias of targets": ({"bias": "lora_only"}, "bias='lora_only'"),
    "container": ({"modules_to_save": ["layers.1.mlp", "norm"]}, None),
    "container of a target": ({"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp"]}, None),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_entries_that_match_nothing_are_named_and_the_rest_computes_the_same(
    name: str, bases: Callable, tmp_path: Path
) -> None:
    options, warning = ENTRIES[name]
    theirs = adapted(bases("untied"), lora(**options))
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, warning)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))
    assert count_trainable(model) == sum(p.numel() for p in theirs.parameters() if p.requires_grad)


UNUSUAL: dict[str, Any] = {
    "alpha 0": lora(lora_alpha=0, modules_to_save=["norm"]),
    "alpha below 0": lora(lora_alpha=-8, lora_dropout=1.0),
    "alpha of some modules": lora(alpha_pattern={"v_proj": 0}),
    "adalora": peft.AdaLoraConfig(lora_alpha=-8, lora_dropout=1.0, target_modules=list(QV), total_step=9),
    "loha": peft.LoHaConfig(alpha=0, rank_dropout=1.0, module_dropout=1.0, target_modules=list(QV), modules_to_save=["norm"]),
    "vera": peft.VeraConfig(r=4, vera_dropout=1.0, target_modules=["q_proj", "o_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_values_that_a_new_adapter_may_not_have_are_read_from_files(name: str, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases("untied"), UNUSUAL[name])
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(bases("untied"), tmp_path / "theirs", None)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))
    back = load_into_theirs(bases("untied"), peftjax.save_adapter(model, tmp_path / "ours"))
    assert_close(logits(theirs), logits(back.eval()))


@pytest.mark.parametrize("saved", [["mlp", "down_proj"], ["down_proj", "layers.1.mlp"]])
def test_modules_to_save_inside_others_are_ignored_as_peft_ignores_them(
    saved: list[str], bases: Callable, tmp_path: Path
) -> None:
    theirs = adapted(bases("untied"), lora(modules_to_save=saved))
    base = load_theirs(bases("untied")).state_dict()
    for (
        name,
        value,
    ) in theirs.named_parameters():  # the copies that peft writes are not used, so training leaves them alone
        layer = re.search(r"layers\.(\d+)\.mlp\.down_proj", name)
        if layer and "modules_to_save" in name and (saved[0] == "mlp" or layer[1] == "1"):
            value.data = base[f"model.{layer[0]}.weight"].clone()
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(KeyError, match="down_proj"):
        load_into_theirs(bases("untied"), tmp_path / "theirs")
    model = load(bases("untied"), tmp_path / "theirs", "modules_to_save 'down_proj' also matches modules inside others")
    assert_close(logits(model), logits(theirs))
    back = load_into_theirs(bases("untied"), peftjax.save_adapter(model, tmp_path / "ours"))
    assert_close(logits(back.eval()), logits(theirs))


def test_a_string_of_feedforward_modules_is_a_regular_expression_for_whole_names(
    bases: Callable, tmp_path: Path
) -> None:
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules="down_proj")
    theirs = adapted(bases("untied"), config)
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, r"feedforward_modules '\(\?:down_proj\)'")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))


def test_biases_that_no_layer_has_are_ignored_for_every_method(bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases("untied"), peft.OFTConfig(oft_block_size=4, target_modules=list(QV), bias="all"))
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, "match nothing in this model: bias='all'")
    assert_close(logits(model), logits(theirs))


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"target_r": 8}, None),
        ({"alpha_pattern": {"q_proj": 3}, "use_rslora": True, "lora_bias": True}, "alpha_pattern"),
    ],
)
def test_options_that_peft_does_not_read_for_adalora_are_ignored(
    options: dict[str, Any], warning: str | None, bases: Callable, tmp_path: Path
) -> None:
    config = peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": 100, "target_modules": QV} | options)
    theirs = adapted(bases("untied"), config)
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, warning)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))


VARIANTS: dict[str, tuple[str, Callable[[], peft.PeftConfig], str | None]] = {
    "mica": ("untied", lambda: lora(init_lora_weights="mica"), "init_lora_weights='mica' describes how the adapter was trained"),
    "velora": ("untied", lambda: lora(velora_config=VeloraConfig(num_groups=4)), "velora_config"),
    "monteclora": ("untied", lambda: lora(monteclora_config=MontecloraConfig()), "monteclora_config"),
    "bdlora": (
        "untied",
        lambda: lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2)),
        "block-diagonal matrices become whole ones",
    ),
    "kasa": ("untied", lambda: lora(kasa_config=KasaConfig()), "removes the smallest singular values"),
    "kasa with patterns": (
        "biased",
        lambda: lora(
            kasa_config=KasaConfig(), use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2}, bias="lora_only",
            alpha_pattern={"v_proj": 3}, layers_to_transform=[1, 2], lora_bias=True, modules_to_save=["norm"],
        ),
        "removes the smallest singular values",
    ),
    "kasa of the head": (
        "untied",
        lambda: lora(kasa_config=KasaConfig(), target_modules=["down_proj", "lm_head"]),
        "removes the smallest singular values",
    ),
    "gralora": ("untied", lambda: peft.GraloraConfig(r=4, alpha=6, target_modules=["q_proj", "down_proj"]), "a LoRA .*of rank 8"),
    "gralora with a plain part": (
        "biased",
        lambda: peft.GraloraConfig(
            r=8, hybrid_r=3, gralora_k=4, target_modules=["v_proj", "up_proj"], bias="gralora_only", layers_to_transform=[0, 2],
            modules_to_save=["norm"],
        ),
        "a LoRA .*of rank 35",
    ),
    "delora": ("untied", lambda: peft.DeloraConfig(r=4, delora_lambda=3, target_modules=QV), "a LoRA with the same outputs"),
    "delora with patterns": (
        "biased",
        lambda: peft.DeloraConfig(
            r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.*q_proj": 2}, lambda_pattern={"down_proj": 2},
            bias="all", exclude_modules=["layers.0.self_attn.q_proj"], module_dropout=0.1,
        ),
        "a LoRA with the same outputs",
    ),
    "lora-ga": ("untied", lambda: lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()), "lora_ga"),
    "tied and dora": (
        "tied",
        lambda: lora(use_dora=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        None,
    ),
    "layers beside a regex": (
        "untied",
        lambda: peft.BOFTConfig(boft_block_size=4, target_modules=r".*\.[02]\..*q_proj", layers_to_transform=[0]),
        "layers_to_transform=.0. is ignored",
    ),
    "lokr with full and factored layers": (
        "untied",
        lambda: peft.LoKrConfig(r=8, alpha=3, target_modules=QV, rank_pattern={"layers.1.self_attn.q_proj": 2}),
        None,
    ),
    "lokr with two factored matrices": (
        "untied",
        lambda: peft.LoKrConfig(
            r=3, alpha=5, target_modules=QV, decompose_both=True, rank_pattern={"layers.[01].*": 4}, alpha_pattern={"v_proj": 2}
        ),
        None,
    ),
    "vera without projections": (
        "untied",
        lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "up_proj"], save_projection=False, projection_prng_key=7),
        None,
    ),
    "randlora without projections": (
        "untied",
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=9, target_modules=["q_proj", "up_proj"], save_projection=False),
        None,
    ),
    "sparse randlora without projections": (
        "untied",
        lambda: peft.RandLoraConfig(
            r=5, randlora_alpha=9, target_modules=["v_proj", "up_proj"], save_projection=False, very_sparse=True
        ),
        None,
    ),
    "vblora with the largest weights": (
        "untied",
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=9, vector_length=8, topk=3, target_modules=QV, save_only_topk_weights=True
        ),
        "save_only_topk_weights",
    ),
    "boft with biases": ("biased", lambda: peft.BOFTConfig(boft_block_size=4, target_modules=QV, bias="boft_only"), None),
    "oft with biases": ("biased", lambda: peft.OFTConfig(oft_block_size=4, target_modules=QV, bias="all"), None),
    "hra with biases": (
        "biased",
        lambda: peft.HRAConfig(r=4, target_modules=QV, bias="all", layers_to_transform=[1], modules_to_save=["layers.2.self_attn"]),
        None,
    ),
    "miss with biases": ("biased", lambda: peft.MissConfig(r=4, target_modules=QV, bias="MiSS_only"), None),
    "vera with biases": ("biased", lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], bias="vera_only"), None),
    "randlora with biases": (
        "biased",
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=9, target_modules=QV, bias="all", save_projection=True),
        None,
    ),
    "vblora with biases": (
        "biased",
        lambda: peft.VBLoRAConfig(r=2, num_vectors=9, vector_length=8, target_modules=QV, bias="vblora_only"),
        None,
    ),
    "fourierft with biases": ("biased", lambda: peft.FourierFTConfig(n_frequency=9, target_modules=QV, bias="fourier_only"), None),
    "adalora with biases": (
        "biased",
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=QV, bias="lora_only"),
        None,
    ),
    "lora with all biases": ("biased", lambda: lora(bias="all", modules_to_save=["layers.1.self_attn.o_proj"]), None),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_that_compute_what_a_plain_method_does_are_read(name: str, bases: Callable, tmp_path: Path) -> None:
    base, make, warning = VARIANTS[name]
    theirs = adapted(bases(base), make())
    theirs.save_pretrained(tmp_path / "theirs")
    reloaded = peft.PeftModel.from_pretrained(load_theirs(bases(base)), tmp_path / "theirs").eval()
    model = load(bases(base), tmp_path / "theirs", warning)
    assert_close(logits(model), logits(reloaded))
    assert_far(logits(model), logits(load_theirs(bases(base))))
    peftjax.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(load_theirs(bases(base)), tmp_path / "ours").eval()
    assert_close(logits(back), logits(reloaded))
    assert_close(logits(peftjax.merge(model)), logits(reloaded))


# --- Windows ---

WINDOW = 5


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mistral")
    save_base(path, kind="Mistral", sliding_window=WINDOW)
    return path


@pytest.mark.parametrize("tokens", [3, WINDOW, 8])
def test_a_sliding_window_hides_the_prefix_as_it_does_in_transformers(
    tokens: int, mistral: Path, tmp_path: Path
) -> None:
    theirs = adapted(mistral, peft.PrefixTuningConfig(num_virtual_tokens=tokens))
    theirs.save_pretrained(tmp_path)
    model = load(mistral, tmp_path, None)
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(mistral)))


# --- PiSSA and OLoRA ---


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "use_rslora": True},
        {"init_lora_weights": "pissa", "use_dora": True},
    ],
)
def test_the_residual_base_of_pissa_and_olora_is_recomputed(options: dict, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases("untied"), lora(**options))
    theirs.save_pretrained(tmp_path / "a")
    model = load(bases("untied"), tmp_path / "a", "subtracts the initial update from the base")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))
    peftjax.save_adapter(model, tmp_path / "plain")
    assert_close(logits(load(bases("untied"), tmp_path / "plain", None)), logits(model))
    with (
        pytest.warns(UserWarning, match="subtracts the initial update"),
        pytest.raises(ValueError, match="cannot be recomputed from nf4 kernels"),
    ):
        peftjax.load_adapter(peftjax.load_model(bases("wide"), quantize="nf4"), tmp_path / "a")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_copy_of_a_head_may_lack_its_initial_update(init: str, bases: Callable, tmp_path: Path) -> None:
    config = lora(init_lora_weights=init, target_modules=[*QV, "lm_head"])
    theirs = adapted(bases("untied"), config)
    theirs.save_pretrained(tmp_path)
    assert_close(logits(load(bases("untied"), tmp_path, "subtracts the initial update")), logits(theirs))
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.lm_head.base_layer.weight"
    save_file(tensors | {key: 1.1 * tensors[key]}, tmp_path / WEIGHTS)
    with (
        pytest.warns(UserWarning, match="subtracts the initial update"),
        pytest.raises(
            ValueError, match=r"lm_head\.base_layer\.weight differs .*: the adapter was trained on another base"
        ),
    ):
        peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)
    theirs = adapted(bases("tied"), config)
    base, changed = load_theirs(bases("tied")), theirs.get_input_embeddings().weight
    assert (base.get_input_embeddings().weight - changed).abs().max() > 0.1
    theirs.save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="subtracts the initial update"),
        pytest.raises(ValueError, match="lm_head as a target, which is tied to the embedding: peft subtracts"),
    ):
        peftjax.load_adapter(peftjax.load_model(bases("tied")), tmp_path)


def test_an_initial_update_of_more_ranks_than_a_layer_has_is_refused(bases: Callable, tmp_path: Path) -> None:
    adapted(bases("untied"), lora(r=20, init_lora_weights="olora")).save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="subtracts the initial update"),
        pytest.raises(
            ValueError, match=r"init_lora_weights='olora': method\.rank=20 exceeds the smaller dimension \(16\)"
        ),
    ):
        peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)


def test_a_randomized_initial_update_is_refused_because_peft_draws_another_one_too(
    bases: Callable, tmp_path: Path
) -> None:
    adapted(bases("untied"), lora(init_lora_weights="pissa_niter_4")).save_pretrained(tmp_path)
    one, other = (logits(peft.PeftModel.from_pretrained(load_theirs(bases("untied")), tmp_path).eval()) for _ in "12")
    assert_far(one, other)
    with pytest.raises(
        ValueError, match=r"init_lora_weights='pissa_niter_4' is not supported: .* differs every time peft computes it"
    ):
        peftjax.load_adapter(peftjax.load_model(bases("untied")), tmp_path)


# --- Spellings and sizes in which files differ ---

RENAMES: dict[str, tuple[Callable[[str], str], str | None]] = {
    "compiled": (lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."), "_orig_mod"),
    "distributed": (lambda key: f"module.{key}", "is read as base_model.model.model.layers"),
    "with the adapter's name": (lambda key: key.replace(".weight", ".default.weight"), "lora_A.default.weight"),
    "multimodal": (lambda key: key.replace("model.model.", "model.language_model.model."), "language_model"),
    "multimodal of transformers 5": (lambda key: key.replace("model.model.", "model.model.language_model."), "model"),
    "without peft's prefix": (lambda key: key.removeprefix("base_model.model."), "differ from peft's by a prefix"),
    "magnitudes in a module": (lambda key: key.replace("_magnitude_vector", "_magnitude_vector.weight"), None),
}


@pytest.mark.parametrize("name", RENAMES)
def test_keys_that_differ_by_a_prefix_are_read(name: str, bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(bases("untied"), lora(use_dora=True))
    theirs.save_pretrained(tmp_path)
    change, warning = RENAMES[name]
    rename(tmp_path, change)
    assert_close(logits(load(bases("untied"), tmp_path, warning)), logits(theirs))


def test_patterns_for_the_names_of_a_model_without_its_head_are_read(bases: Callable, tmp_path: Path) -> None:
    """As in an adapter of an embedding model, in which the layers of a Llama are `layers`, not `model.layers`."""
    base = transformers.LlamaModel.from_pretrained(bases("untied"))
    patterns = {"rank_pattern": {"^layers.1.self_attn.q_proj": 2}, "alpha_pattern": {r"^layers\.[12]\..*": 3}}
    theirs = peft.get_peft_model(base, lora(task_type="FEATURE_EXTRACTION", **patterns)).eval()
    shake({name: p for name, p in theirs.named_parameters() if p.requires_grad}, 0.1)
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, "keys differ from peft's by a prefix")
    with torch.no_grad():
        states = theirs(torch.tensor(tokens())).last_hidden_state
        expected = load_theirs(bases("untied")).lm_head(states).numpy()
    assert_close(logits(model), expected)


def test_the_tensors_name_the_targets_where_a_regular_expression_is_for_a_multimodal_model(
    bases: Callable, tmp_path: Path
) -> None:
    theirs = adapted(bases("untied"), lora())
    theirs.save_pretrained(tmp_path)
    rename(tmp_path, RENAMES["multimodal of transformers 5"][0])
    edit(tmp_path, target_modules=r"model\.language_model\..*(q_proj|v_proj)")
    model = peftjax.load_model(bases("untied"))
    with pytest.warns(UserWarning) as caught:  # noqa: PT030 - two
        peftjax.load_adapter(model, tmp_path)
    assert ["target_modules" in str(caught[0].message), "keys differ" in str(caught[1].message)] == [True, True]
    assert_close(logits(model), logits(theirs))


def test_a_boft_has_as_many_factors_as_its_tensors(bases: Callable, tmp_path: Path) -> None:
    theirs = adapted(
        bases("untied"), peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=list(QV))
    )
    theirs.save_pretrained(tmp_path)
    model = load(bases("untied"), tmp_path, "ignoring boft_n_butterfly_factor=2")
    assert_close(logits(model), logits(theirs))
    assert_far(logits(model), logits(load_theirs(bases("untied"))))


# --- New tokens ---


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory, bases: Callable) -> Callable[[str], Path]:
    """Bases with three more tokens, and peft's config of the base before."""
    folder = tmp_path_factory.mktemp("resized")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            model = load_theirs(bases(name))
            model.resize_token_embeddings(51)
            model.save_pretrained(folder / name)
        return folder / name

    return make


TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding and head": ("untied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head": ("untied", {"modules_to_save": ["lm_head"]}),
    "not trained": ("untied", {}),
    "targets": ("untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tokens": ("untied", {"trainable_token_indices": [48, 49, 3]}),
    "tokens of a tied base": ("tied", {"trainable_token_indices": [48, 49, 3]}),
    "tokens of the head": ("untied", {"trainable_token_indices": {"lm_head": [48, 3]}}),
    "tokens of a tied head": ("tied", {"trainable_token_indices": {"lm_head": [48, 3]}}),
    "tokens of both": ("untied", {"trainable_token_indices": {"embed_tokens": [48], "lm_head": [50, 3]}}),
    "other tokens of a tied head": ("tied", {"trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [50]}}),
    "the same tokens of a tied head": ("tied", {"trainable_token_indices": {"embed_tokens": [7], "lm_head": [7]}}),
    "tied, trained": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, named by the head": ("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tied, targets": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied, tokens": ("tied", {"trainable_token_indices": [48, 3], "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("name", TOKENS)
def test_the_copies_that_peft_writes_beside_new_tokens_are_accepted(
    name: str, bases: Callable, resized: Callable, tmp_path: Path
) -> None:
    base, options = TOKENS[name]
    theirs = adapted(resized(base), lora(base_model_name_or_path=str(bases(base)), **options))
    theirs.peft_config["default"].base_model_name_or_path = str(bases(base))
    theirs.save_pretrained(tmp_path / "a")
    model = load(resized(base), tmp_path / "a", None)
    assert_close(logits(model), logits(theirs))
    trained = {p.untyped_storage().data_ptr(): p.numel() for p in theirs.parameters() if p.requires_grad}
    assert count_trainable(model) == sum(trained.values())
    peftjax.save_adapter(model, tmp_path / "b")
    assert_close(logits(load(resized(base), tmp_path / "b", None)), logits(theirs))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_new_rows_of_the_file_replace_those_of_a_base_that_was_resized_again(
    name: str, bases: Callable, resized: Callable, tmp_path: Path
) -> None:
    theirs = adapted(resized(name), lora(base_model_name_or_path=str(bases(name))))
    theirs.peft_config["default"].base_model_name_or_path = str(bases(name))
    theirs.save_pretrained(tmp_path / "a")
    again = load_theirs(bases(name))
    again.resize_token_embeddings(51)
    for table in (again.get_input_embeddings(), again.get_output_embeddings()):
        table.weight.data[48:] = torch.randn(3, 32)
    again.save_pretrained(tmp_path / "base")
    model = peftjax.load_model(tmp_path / "base")
    with pytest.warns(
        UserWarning, match="the rows 48, 49, 50 of (model.embed_tokens|lm_head) differ from this model's"
    ):
        peftjax.load_adapter(model, tmp_path / "a")
    expected = logits(peft.PeftModel.from_pretrained(again, tmp_path / "a").eval(), 51)
    assert_close(logits(model, 51), expected)
    back = load_into_theirs(tmp_path / "base", peftjax.save_adapter(model, tmp_path / "b"))
    assert_close(logits(back.eval(), 51), expected)
