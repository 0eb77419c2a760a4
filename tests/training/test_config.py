import copy
import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from peftjax import methods
from peftjax.core import hf_names
from peftjax.core.config import defaults, help_text
from peftjax.core.errors import UserError
from peftjax.training import config
from peftjax.training.config import SCHEMA, Config

BASE = "from peftjax.core.config import defaults as get_config\n"
CHANGED = (
    "from peftjax.core.config import defaults\ndef get_config():\n    config = defaults()\n    {}\n    return config\n"
)


@pytest.fixture
def load(tmp_path: Path):
    """load(line, *overrides): a config file whose `config` was changed by `line`, and overrides."""

    def load(line: str = "pass", *overrides: str) -> Config:
        path = tmp_path / "some_config.py"
        path.write_text(CHANGED.format(line))
        return config.load(path, overrides)

    return load


def error_of(load, line: str = "pass", *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(line, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_default_passes_its_own_checks_and_has_a_meaning():
    resolved = config.validate(defaults())
    assert resolved == config.validate({})
    assert all(field.help for field in SCHEMA.fields.values())


def test_defaults_as_get_config_is_a_config_file(tmp_path):
    path = tmp_path / "base.py"
    path.write_text(BASE)
    assert config.load(path).train.steps == 1000


def test_a_file_changes_fields_and_the_rest_keeps_its_defaults(load):
    resolved = load("config.optim.learning_rate = 3e-4; config.data.train = ['a.jsonl', 'b.jsonl']")
    assert resolved.optim.learning_rate == 3e-4
    assert resolved.data.train == ("a.jsonl", "b.jsonl")
    assert resolved.optim.b1 == 0.9


def test_a_file_may_leave_out_fields_and_sections(tmp_path):
    path = tmp_path / "short.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'train': {'steps': 3}})\n"
    )
    resolved = config.load(path)
    assert (resolved.train.steps, resolved.train.batch_size, resolved.seed) == (3, 8, 0)


def test_the_resolved_config_is_frozen(load):
    resolved = load()
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.train.steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolved.seed = 3


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("seed=7", "seed", 7),
        ("optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("data.pack=true", "data.pack", True),
        ("data.shuffle=False", "data.shuffle", False),
        ("data.train=a.jsonl", "data.train", ("a.jsonl",)),
        ("data.train=a.jsonl, b.jsonl", "data.train", ("a.jsonl", "b.jsonl")),
        ("data.train=('a,b.jsonl',)", "data.train", ("a,b.jsonl",)),
        ("data.train=2024", "data.train", ("2024",)),
        ("task.labels=0,1", "task.labels", ("0", "1")),
        ("data.train=", "data.train", ()),
        ("data.prompt_template=Q: {prompt} = ", "data.prompt_template", "Q: {prompt} = "),
        ("model.path=3", "model.path", "3"),
        ("model.revision=main", "model.revision", "main"),
        ("model.revision=none", "model.revision", None),
        ("mesh.fsdp=-1", "mesh.fsdp", -1),
        ("method.rank=64", "method.rank", 64),
        ("method.alpha=64", "method.alpha", 64.0),
        ("method.targets=(q|v)_proj", "method.targets", "(q|v)_proj"),
        ("method.targets=['q_proj', 'v_proj']", "method.targets", ("q_proj", "v_proj")),
        ("method.exclude=lm_head", "method.exclude", ("lm_head",)),
        ("method.exclude=.*mlp.*", "method.exclude", ".*mlp.*"),
        ("method.layers_to_transform=3", "method.layers_to_transform", (3,)),
        ("method.layers_to_transform=0,3", "method.layers_to_transform", (0, 3)),
        ("method.rank_pattern={'q_proj': 4}", "method.rank_pattern", (("q_proj", 4),)),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(load, override, field, value):
    section, _, name = field.rpartition(".")
    resolved = load("config.method.targets = ('q_proj',)", f"--config.{override}")
    found = getattr(getattr(resolved, section) if section else resolved, name)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_two_overrides_wins(load):
    assert load("config.seed = 1", "--config.seed=2", "--config.seed=3").seed == 3


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("optim.learning_rat=1", "'learning_rate'"),
        ("optm.learning_rate=1", "'optim.learning_rate'"),
        ("train.learning_rate=1", "'optim.learning_rate'"),
        ("learning_rate=1", "'optim.learning_rate'"),
        ("sed=1", "'seed'"),
        ("optim.lr=1", "Did you mean 'optim.learning_rate'?"),
        ("lr=1", "Did you mean 'optim.learning_rate'?"),
        ("train.max_seq_length=1", "Hugging Face's max_seq_length is called 'data.max_length' here."),
        ("method.lora_r=1", "Did you mean 'method.rank'?"),
        ("optim.xyz=1", "optim.learning_rate, optim.schedule"),
        ("method.rnk=4", "'rank'"),
        ("optim=1", "is a section"),
        ("optim.name.x=1", "'optim.name'"),
    ],
)
def test_an_unknown_override_is_refused_with_what_is_near(load, override, near):
    message = error_of(load, "pass", f"--config.{override}")
    assert message.startswith(f"--config.{override}: ")
    assert override.split("=")[0] in message
    assert near in message


def test_names_of_other_libraries_are_those_of_fields_that_exist():
    options = {f"method.{field.name}" for kind in methods.METHODS.values() for field in dataclasses.fields(kind)}
    assert {*hf_names.OURS.values(), *hf_names.COMMON.values()} <= {*SCHEMA.fields, *options, "workdir"}
    assert not {name.rpartition(".")[2] for name in SCHEMA.fields} & {*hf_names.OURS, *hf_names.COMMON}


def test_an_unknown_field_of_a_file_is_refused_with_the_file_and_what_is_near(load):
    message = error_of(load, "config.optim.learning_rat = 1e-3")
    assert "some_config.py: unknown field optim.learning_rat." in message
    assert "Did you mean 'learning_rate'?" in message


def test_a_section_cannot_be_replaced_by_a_value(load):
    assert "optim is a section; set one of its fields: optim.name" in error_of(load, "config.optim = 3")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=1.5", "an int, not '1.5'"),
        ("train.steps=many", "an int, not 'many'"),
        ("optim.learning_rate=fast", "a float, not 'fast'"),
        ("data.pack=maybe", "true or false, not 'maybe'"),
        ("data.pack=1", "true or false, not '1'"),
        ("data.train=(1, 2)", "a tuple of strings"),
        ("method.rank=1.5", "an int, not '1.5'"),
    ],
)
def test_an_override_of_the_wrong_type_is_refused(load, override, expected):
    message = error_of(load, "pass", f"--config.{override}")
    assert f"--config.{override}: {override.split('=')[0]} must be {expected}" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.train.steps = 1.5", "train.steps must be an int, not 1.5 (float)"),
        ("config.train.steps = True", "train.steps must be an int, not True (bool)"),
        ("config.optim.learning_rate = '1e-3'", "optim.learning_rate must be a float, not '1e-3' (str)"),
        ("config.data.train = 'a.jsonl'", "data.train must be a tuple of strings"),
        ("config.data.pack = 1", "data.pack must be true or false, not 1 (int)"),
        ("config.model.path = None", "model.path must be a string, not None"),
        ("config.model.revision = 3", "model.revision must be a string or None, not 3 (int)"),
        ("config.method.name = 3", "method.name must be a string, not 3 (int)"),
        ("config.method.targets = 3", "method.targets must be a string or a tuple, not 3 (int)"),
    ],
)
def test_a_file_with_a_value_of_the_wrong_type_is_refused(load, line, expected):
    message = error_of(load, line)
    assert "some_config.py: " in message
    assert expected in message


@pytest.mark.parametrize("name", [name for name, field in SCHEMA.fields.items() if field.choices])
def test_a_value_outside_of_a_closed_set_is_refused_with_the_set(load, name):
    message = error_of(load, "pass", f"--config.{name}=sideways")
    assert all(repr(choice) in message for choice in SCHEMA.fields[name].choices)


def test_a_near_miss_in_a_closed_set_is_suggested(load):
    assert "Did you mean 'adamw'" in error_of(load, "pass", "--config.optim.name=adam")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batch_size=0", "at least 1"),
        ("optim.final_fraction=1.5", "at least 0 and at most 1"),
        ("optim.learning_rate=-1e-3", "at least 0"),
        (f"seed={2**64}", f"at least 0 and at most {2**63 - 1}"),
        ("optim.learning_rate=nan", "at least 0"),
        ("optim.learning_rate=inf", "at least 0"),
        ("mesh.data=0", "at least 1 device, or -1"),
        ("mesh.data=-2", "at least -1"),
        ("train.accumulate=3", "train.batch_size=8 must be a multiple of train.accumulate=3"),
    ],
)
def test_a_number_out_of_range_is_refused(load, override, expected):
    assert expected in error_of(load, "pass", f"--config.{override}")


@pytest.mark.parametrize(
    ("line", "overrides", "sources"),
    [
        ("config.optim.warmup_steps = 2000", (), ["FILE"]),
        ("pass", ("optim.warmup_steps=2000",), ["--config.optim.warmup_steps=2000"]),
        ("config.optim.warmup_steps = 20", ("train.steps=10",), ["FILE", "--config.train.steps=10"]),
        ("config.train.steps = 99", ("optim.warmup_steps=20", "train.steps=10", "seed=1"),
         ["--config.optim.warmup_steps=20", "--config.train.steps=10"]),
        ("config.data.pack = True", ("model.attention=cudnn",), ["--config.model.attention=cudnn", "FILE"]),
        ("pass", ("method.rank=0",), ["--config.method.rank=0"]),
        ("config.method.rank = 0", ("seed=1",), ["FILE"]),
    ],
)  # fmt: skip
def test_a_contradiction_names_where_each_value_was_given(load, tmp_path, line, overrides, sources):
    message = error_of(load, line, *(f"--config.{override}" for override in overrides))
    expected = " and ".join(sources).replace("FILE", str(tmp_path / "some_config.py"))
    assert message.startswith((f"{expected}: optim.warmup_steps=", f"{expected}: model.", f"{expected}: method.rank"))


def test_one_axis_at_most_takes_the_devices_that_are_left(load):
    message = error_of(load, "pass", "--config.mesh.data=-1", "--config.mesh.fsdp=-1")
    assert "mesh.data and mesh.fsdp are -1" in message


def test_the_method_section_is_completed_by_the_methods_own_defaults(load):
    assert load("config.method.rank = 16").method == methods.Lora(rank=16)


@pytest.mark.parametrize("order", list(itertools.permutations(["--config.method.name=lora", "--config.method.rank=4"])))
def test_another_method_name_replaces_the_section_before_other_overrides(load, order):
    resolved = load("config.method = {'name': 'full'}", *order)
    assert resolved.method == methods.Lora(rank=4)


def test_another_method_name_forgets_what_the_file_set_for_the_first(load):
    assert load("config.method.rank = 16", "--config.method.name=full").method == methods.Full()


def test_the_name_of_the_method_that_is_there_keeps_its_options(load):
    assert load("config.method.rank = 16", "--config.method.name=lora").method.rank == 16


def test_values_by_name_change_a_config_as_overrides_do():
    lora = Config(method=methods.Lora(rank=16))
    assert config.changed(lora, {"method.name": "lora", "train.steps": 3}).method.rank == 16
    assert config.changed(lora, {"method.d_initial": 0.5, "method.name": "vera"}).method == methods.Vera(d_initial=0.5)
    assert config.changed(lora, {"mesh": {"fsdp": 2}}).mesh.fsdp == 2


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"trian.steps": 3}, "unknown field trian.steps. Did you mean 'train.steps'"),
        ({"seed.x": 3}, "unknown field seed.x"),
        ({"method.name": ["lora"]}, "method.name must be a string"),
    ],
)
def test_a_mistaken_value_by_name_is_refused(field, message):
    with pytest.raises(UserError, match=message):
        config.changed(Config(), field)


def test_an_unknown_method_is_refused_where_it_was_named(load):
    message = error_of(load, "pass", "--config.method.name=lorra")
    assert message.startswith("--config.method.name=lorra: method.name: 'lorra' is not a method. Did you mean 'lora'")
    assert "some_config.py: method.name" in error_of(load, "config.method.name = 'lorra'")
    assert "'LoRa' is not a method. Did you mean 'lora'? Methods" in error_of(load, "config.method.name = 'LoRa'")


def test_a_file_that_is_not_there_is_refused_with_a_near_name(tmp_path):
    (tmp_path / "quickstart.py").write_text(BASE)
    with pytest.raises(UserError, match=r"no such file\. Did you mean 'quickstart\.py'"):
        config.load(tmp_path / "quikstart.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\ny = (\n", "line 2: SyntaxError"),
        ("def get_config():\n    return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "needs a function get_config()"),
        ("def get_config():\n    return 3\n", "must return a ConfigDict, but returned 3"),
    ],
)
def test_a_file_that_fails_is_refused_with_its_line(tmp_path, text, expected):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    assert f"{path}" in str(caught.value)
    assert expected in str(caught.value)


def test_what_stands_behind_a_colon_is_the_argument(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def get_config(name='none'):\n    return {'data': {'text_field': name}}\n")
    assert config.load(path).data.text_field == "none"
    assert config.load(f"{path}:mrpc").data.text_field == "mrpc"
    with pytest.raises(UserError, match=r"b\.py: no such file\. Did you mean 'a\.py'"):
        config.load(f"{tmp_path / 'b.py'}:mrpc")


def test_a_config_that_is_no_python_yaml_or_json_file_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("seed = 1")
    with pytest.raises(UserError, match=r"ends in \.py, \.yaml or \.json"):
        config.load(path)


def test_validating_leaves_its_argument_alone():
    given = {"optim": {"learning_rate": 1}, "data": {"train": ["a"]}, "method": {"name": "lora"}}
    before = copy.deepcopy(given)
    resolved = config.validate(given)
    assert given == before
    assert (resolved.optim.learning_rate, resolved.data.train, resolved.method.rank) == (1.0, ("a",), 8)


def test_json_brings_the_config_back_equal(load):
    resolved = load("config.method.rank_pattern = (('q_proj', 4), ('v_proj', 2)); config.data.train = ('a', 'b')")
    stored = json.loads(config.to_json(resolved))
    assert config.validate(stored) == resolved
    assert config.differences(resolved, stored) == []


def test_options_of_a_method_that_mean_the_same_are_no_difference(load):
    resolved = load("config.method.targets = 'q_proj, v_proj'")
    stored = json.loads(config.to_json(resolved))
    stored["method"]["targets"] = "q_proj, v_proj"  # as earlier versions stored it
    assert config.differences(resolved, stored) == []


def test_differences_name_the_field_and_both_values(load):
    here, there = load(), load("config.optim.learning_rate = 2e-4; config.method.rank = 16; config.data.train = ('a',)")
    assert sorted(config.differences(here, config.to_dict(there))) == [
        "data.train: () here, ('a',) there",
        "method.rank: 8 here, 16 there",
        "optim.learning_rate: 0.0001 here, 0.0002 there",
    ]


def test_a_field_that_only_one_side_has_is_a_difference(load):
    full = load("pass", "--config.method.name=full")
    lines = config.differences(full, config.to_dict(load()))
    assert "method.rank: absent here, 8 there" in lines
    assert "method.name: 'full' here, 'lora' there" in lines


def test_a_stored_config_of_an_older_version_has_the_defaults_of_newer_fields(load):
    resolved = load()
    stored = config.to_dict(resolved)
    del stored["data"]["train_on"], stored["method"]["start_from"], stored["mesh"]
    assert config.differences(resolved, stored) == []
    lines = config.differences(load("config.data.train_on = 'all'"), stored)
    assert lines == ["data.train_on: 'all' here, 'completions' there"]


def test_the_help_text_shows_every_field():
    text = help_text()
    assert all(f"{name}={field.default!r}" in text and field.help in text for name, field in SCHEMA.fields.items())
