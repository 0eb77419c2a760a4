"""The plan: what it says before a run is what the run takes."""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from peftjax import adapters, methods
from peftjax.adapters import provenance
from peftjax.core import variables
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.core.terminal import make_console
from peftjax.io.adapter_save import save_adapter
from peftjax.io.adapter_size import weights_bytes
from peftjax.io.hf_config import read_fields, stored_quantization
from peftjax.io.load import load_model
from peftjax.io.save import save_model
from peftjax.models import from_hf_config
from peftjax.plan import __main__ as command
from peftjax.plan import advice, devices, measure, plan, search, tables, traced, variants, worker
from peftjax.plan.devices import Device
from peftjax.tasks import make_task
from peftjax.training import abstract, sweep_members
from peftjax.training import config as configs
from tests import tiny

SMALL = tiny.CONFIG | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}


def make_config(**fields: Any) -> Any:
    """LoRA on NF4 kernels, with other values of some fields (model__remat="none")."""
    config = defaults()
    config.method = methods.make_config("lora", rank=4, targets="all-linear")
    config.model.quantize, config.model.remat, config.data.max_length = "nf4", "block", 16
    return configs.changed(configs.validate(config), {name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture(scope="module")
def planned() -> tuple[plan.Plan, traced.TracedStep]:
    """A plan on one CPU device, and the traced step that it was made from."""
    steps = []

    def trace(*given: Any) -> traced.TracedStep:
        steps.append(traced.trace_step(*given))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "trace_step", trace)
        found = measure.measure(make_config(), SMALL, devices.find("cpu"))
    return found, steps[0]


def abstract_model(config: Any, hf_config: dict[str, Any]) -> Any:
    task = make_task(config.task, config.data, Path(config.model.path), hf_config=hf_config)
    return abstract.abstract_model(config, task, hf_config)


@pytest.fixture(scope="module")
def alone(planned: tuple[plan.Plan, traced.TracedStep]) -> plan.Plan:
    return planned[0]


@pytest.fixture(scope="module")
def together() -> plan.Plan:
    config = make_config(mesh={"data": 1, "fsdp": 4, "tensor": 2}, model__quantize="")
    return measure.measure(config, SMALL, devices.find("cpu:8"))


def printed(config: Any, found: plan.Plan, missing: str = "") -> str:
    file = io.StringIO()
    tables.show(make_console(file=file), config, found, missing)
    return file.getvalue()


# --- What is counted ---


@pytest.mark.parametrize("name", ["alone", pytest.param("together", marks=pytest.mark.slow)])
def test_the_arguments_by_shape_are_the_compilers(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    assert found.compiler == "XLA:CPU"
    assert found.padding == 0
    assert set(found.arguments) >= {"frozen base", "adapters", "optimizer state", "batch"}
    assert found.arguments["optimizer state"] == pytest.approx(2 * found.arguments["adapters"], abs=64)
    assert found.fits


@pytest.mark.slow  # compiles a step of three members
def test_members_share_the_base(alone: plan.Plan) -> None:
    config = make_config()
    several = measure.measure(config, SMALL, devices.find("cpu"), members=3)
    assert several.padding == 0  # the arguments are the compiler's
    for name, size in several.arguments.items():
        assert size == alone.arguments[name] * (1 if name == "frozen base" else 3)
    assert alone.temporaries < several.temporaries < 4 * alone.temporaries
    assert (several.positions, several.closed_flops) == (3 * alone.positions, 3 * alone.closed_flops)
    assert several.flops == pytest.approx(3 * alone.flops, rel=0.05)
    text = printed(config, several)
    assert "lora: 3 members trained together, each with" in text
    assert "adapter file of each member" in text


def test_collectives_are_found_on_several_devices(alone: plan.Plan, together: plan.Plan) -> None:
    assert alone.collectives == {}
    assert together.mesh == {"fsdp": 4, "tensor": 2}
    assert all(count > 0 and size > 0 for count, size in together.collectives.values())
    assert {"all-gather", "all-reduce"} <= set(together.collectives)


def test_products_are_those_of_the_passes_over_the_kernels(alone: plan.Plan) -> None:
    # forward, again, backward: three times 2 operations, less the last product of a block, which is not done again
    assert 1.2 * alone.closed_flops < alone.flops < 1.9 * alone.closed_flops


@pytest.mark.parametrize(
    "method", [methods.Lora(rank=4), methods.PromptTuning(tokens=3), methods.Houlsby(), methods.Vera(rank=4)]
)
def test_the_adapter_file_has_the_bytes_that_are_written(method: adapters.Method, tmp_path: Path) -> None:
    model = adapters.attach(tiny.model(), method, rngs=nnx.Rngs(0))
    written = save_adapter(model, tmp_path / "adapter", base="some/base").glob("*.safetensors")
    assert weights_bytes(model) == sum(file.stat().st_size for file in written)


@pytest.mark.parametrize(
    "method",
    [
        methods.Lora(rank=2, dora=True, dtype="bfloat16", layers_to_transform=(0, 2)),
        methods.Ia3(feedforward=("w2",)),
        methods.Vera(rank=4, targets=("experts.1.w1", "experts.down_proj")),
    ],
    ids=["dora", "ia3", "vera"],
)
def test_the_file_of_an_adapter_of_experts_has_the_bytes_that_are_written_after_training(
    method: adapters.Method, tmp_path: Path
) -> None:
    """With a tensor for each part of each expert."""
    model = tiny.model(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    model = tiny.randomize(adapters.attach(model, method, rngs=nnx.Rngs(0)))
    written = save_adapter(model, tmp_path / "adapter", base="some/base") / "adapter_model.safetensors"
    assert weights_bytes(model) == written.stat().st_size


def test_the_adapter_file_of_shapes_alone_has_the_bytes_of_a_real_one(alone: plan.Plan, tmp_path: Path) -> None:
    model = adapters.attach(tiny.quantized(tiny.model(**SMALL)), methods.Lora(rank=4), rngs=nnx.Rngs(0))
    written = save_adapter(model, tmp_path / "adapter", base="some/base") / "adapter_model.safetensors"
    assert alone.adapter_bytes == written.stat().st_size


def test_full_fine_tuning_is_counted_with_gradients_and_moments(alone: plan.Plan) -> None:
    assert alone.full_bytes == pytest.approx(16 * alone.base_parameters, abs=64)  # float32: 4 of each
    full = variants.full_fine_tuning(make_config())
    assert (full.method, full.model.quantize) == (methods.Full(), "")


def test_a_directory_that_is_quantized_is_planned_as_it_is() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    dense = make_config(model__quantize="")
    single = abstract_model(dense, SMALL | {"quantization_config": stored})
    assert single.blocks.attention.query.kernel.get_value().format == "nf4_single"
    nested = abstract_model(dense, SMALL | {"quantization_config": stored | {"bnb_4bit_use_double_quant": True}})
    assert nested.blocks.attention.query.kernel.get_value().format == "nf4"
    mixtral = SMALL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    experts = abstract_model(
        dense, mixtral | {"quantization_config": stored | {"bnb_4bit_use_double_quant": True}}
    ).blocks.feedforward.experts
    assert experts.gate_up.kernel.get_value().format == "nf4_single"
    assert experts.down.kernel.get_value().format == "nf4"


@pytest.mark.slow
def test_kernels_that_a_quantized_directory_stores_unquantized_are_planned_so(tmp_path: Path) -> None:
    mixtral = SMALL | {
        "num_hidden_layers": 1,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    model = tiny.quantized(tiny.make(from_hf_config(mixtral)))
    leaves = variables.flat(model)[1]
    dense = [path for path in leaves if "gate_up" in path or "query.kernel" in path]
    variables.update(model, {path: leaves[path].get_value().astype(np.float32) for path in dense})
    save_model(model, tmp_path / "model")
    loaded = provenance.formats(load_model(tmp_path / "model"))
    assert loaded
    assert not set(dense) & set(loaded)
    fields, named = read_fields(tmp_path / "model")
    formats = [
        provenance.formats(
            abstract_model(make_config(model__quantize=""), fields | {"quantization_config": quantization})
        )
        for quantization in (stored_quantization(tmp_path / "model"), named)
    ]
    assert formats[0] == loaded
    assert "model.layers.0.self_attn.q_proj" in named["llm_int8_skip_modules"]
    assert "blocks.attention.query.kernel" not in formats[1]  # known without weights, too


def test_experts_that_are_parameters_are_not_quantized_in_a_quantized_directory() -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    sizes = {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    model = abstract_model(make_config(model__quantize=""), SMALL | sizes | {"quantization_config": stored})
    formats = provenance.formats(model)
    assert "blocks.attention.query.kernel" in formats
    assert not [path for path in formats if "experts" in path]


def test_added_embedding_rows_are_planned(tmp_path: Path) -> None:
    directory, hf_config = tiny.directory(tmp_path / "model"), tiny.CONFIG | {"vocab_size": 200}
    for resize, rows in ((False, 200), (True, 257)):
        config = make_config(model__path=str(directory), model__resize_embeddings=resize)
        assert abstract_model(config, hf_config).embed.in_features == rows


def test_options_of_an_adapter_to_start_from_are_not_checked_as_new_ones() -> None:
    method = methods.make_config("lora", rank=4, init="loftq").to_dict()
    with pytest.raises(UserError, match="no kernel of this model is quantized"):
        abstract_model(make_config(method=method, model__quantize=""), SMALL)
    config = make_config(method=method | {"start_from": "adapter"}, model__quantize="")
    assert adapters.attached(abstract_model(config, SMALL))["default"].rank == 4


@pytest.mark.parametrize("fields", [{"init": "eva"}, {"init": "loftq"}, {"init": "pissa"}])
def test_a_method_that_begins_with_data_or_kernels_is_planned_without(fields: dict[str, Any]) -> None:
    method = methods.make_config("lora", rank=4, **fields).to_dict()
    config = make_config(method=method, model__quantize="nf4" if "loftq" in fields["init"] else "")
    assert adapters.attached(abstract_model(config, SMALL))["default"].rank == 4


@pytest.mark.slow
def test_options_that_depend_on_the_number_of_steps_are_set_as_in_training() -> None:
    method = methods.make_config("adalora", init_rank=4, target_rank=2).to_dict()
    lora = methods.make_config("lora", rank=4).to_dict()
    planned = [measure.measure(make_config(method=one), SMALL, devices.find("h100")) for one in (method, lora)]
    singular_values = 4 * 7 * SMALL["num_hidden_layers"]
    assert planned[0].trained_parameters == planned[1].trained_parameters + singular_values


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(UserError, match="exceeds the model's 64 positions"):
        measure.measure(make_config(data__max_length=65), SMALL, devices.find("cpu"))


# --- Against a run ---

# The train step, as large as a plan says, with real arrays. A first one makes the threads and what they keep; then all
# is given back, and VmHWM set back.
RUN = """
import ctypes, gc, json, sys
from pathlib import Path
import jax, numpy as np
from peftjax.plan import devices, measure
from peftjax.training import config as configs

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def keep(name):
    make = getattr(measure, name)
    def call(*given):
        kept[name] = make(*given)
        return kept[name]
    setattr(measure, name, call)

request = json.load(sys.stdin)
config, cpu, kept = configs.validate(request["config"]), devices.find("cpu"), {}
keep("trace_step")
keep("compile_step")
found = measure.measure(config, request["hf_config"], cpu)
traced, step = kept["trace_step"], kept["compile_step"]
rng = np.random.default_rng(0)

def fill(leaf):
    return jax.device_put(rng.integers(0, 2, leaf.shape, np.int8).astype(leaf.dtype), leaf.sharding)

def train():
    state, frozen, batch = jax.tree.map(fill, traced.arguments)
    jax.block_until_ready(step(state, frozen, batch))

train()
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
train()
print(json.dumps({"planned": found.needed, "grown": resident("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc of Linux")
def test_the_cpus_figure_is_the_growth_of_a_run() -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1024, "max_position_embeddings": 512}
    config = make_config(train__batch_size=16, data__max_length=512, model__quantize="")
    request = {"config": configs.to_dict(config), "hf_config": tiny.CONFIG | sizes}
    # one device, and a program that is compiled with care; what is freed is given back to the system
    own = {"XLA_FLAGS": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(request),
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["planned"] > 300e6  # else the scratch memory of XLA:CPU's threads would be a large part
    assert 0.8 < found["grown"] / found["planned"] < 1.35, found


# --- Without a compiler, and too large ---


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "missing", lambda self: 'pip install "peftjax[cuda-plan]"')


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_every_line_that_needs_one_says_estimate() -> None:
    config = make_config(mesh__fsdp=8)
    found = measure.measure(config, SMALL, devices.find("h100:8"))
    text = printed(config, found, devices.find("h100:8").missing())
    assert 'not compiled: pip install "peftjax[cuda-plan]"' in text
    assert "estimate: fits" in text
    for line in text.splitlines():
        if any(name in line for name in ("temporaries", "gradients", "traffic", "at most", "full fine-tuning")):
            assert "estimate" in line, line
    assert "needs the compiler" in next(line for line in text.splitlines() if "collectives" in line)
    assert found.seconds().keys() == {"products", "memory"}


@pytest.mark.usefixtures("no_compiler")
def test_of_experts_the_active_parameters_are_shown() -> None:
    experts, choices = 8, 2
    moe = SMALL | {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": choices}
    found = measure.measure(make_config(), moe, devices.find("h100"))
    each = 3 * SMALL["num_hidden_layers"] * SMALL["hidden_size"] * SMALL["intermediate_size"]
    assert found.base_parameters - found.active_parameters == (experts - choices) * each
    text = printed(make_config(), found)
    assert "active, nf4 kernels" in text
    assert "4 x active x positions" in text


def test_the_estimate_of_temporaries_is_near_what_the_compiler_says(
    planned: tuple[plan.Plan, traced.TracedStep],
) -> None:
    found, step = planned
    assert found.temporaries / 4 < step.temporary_bytes < 2 * found.temporaries


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiler")
def test_what_does_not_fit_is_told_with_what_to_change() -> None:
    config = make_config(
        method=methods.make_config("lora", rank=4, targets="q_proj").to_dict(),  # few operations to trace
        model__quantize="",
        model__remat="none",
        train__batch_size=16,
        data__max_length=64,
        train__loss_chunk=64,
    )
    device = dataclasses.replace(devices.find("a6000"), memory=600_000)
    found = measure.measure(config, SMALL, device)
    assert not found.fits
    saved = dict(found.advice)
    assert {"model.quantize=nf4", "model.remat=block", "train.accumulate=2", "train.batch_size=8"} <= set(saved)
    assert saved["optim.momentum_dtype=bfloat16"] == found.arguments["adapters"] // 2
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    text = printed(config, found)
    assert "does not fit" in text
    assert "--config.model.remat=block" in text


def test_more_devices_are_named_where_they_would_do(alone: plan.Plan) -> None:
    large = dataclasses.replace(alone, device="a6000", memory=devices.find("a6000").memory, temporaries=10**9)
    large = dataclasses.replace(large, arguments={"frozen base": 150 * 10**9})
    name, each = advice.more_devices(large) or ("", 0)
    assert name == "a6000:4"
    assert each == pytest.approx(150e9 / 4 + 1e9, rel=1e-3)


# --- Several of them ---


@pytest.mark.parametrize(
    ("kind", "field", "most", "first", "largest"),
    [
        ("batch", "batch_size", 100, 8, 96),  # in steps of 4 devices
        ("batch", "batch_size", 5, 8, 4),
        ("batch", "batch_size", 3, 8, None),
        ("length", "max_length", 1000, 64, 960),  # of 64
        ("rank", "rank", 77, 4, 72),
        ("members", "", 5, 1, 5),
    ],
)
def test_a_search_finds_the_largest_that_fits(
    kind: str, field: str, most: int, first: int, largest: int | None
) -> None:
    config = make_config()
    section = {"batch": "train", "length": "data", "rank": "method", "members": ""}[kind]

    def probe(config: Any, members: int) -> Any:
        return SimpleNamespace(fits=(vars(getattr(config, section))[field] if field else members) <= most)

    tried = {value: found.fits for value, found in search.search(kind, config, 4, probe)}
    assert next(iter(tried)) == first
    assert max((value for value, fits in tried.items() if fits), default=None) == largest
    assert len(tried) <= 9


@pytest.mark.parametrize(
    ("start", "most", "expected"),
    [(384, 514, [384, 514, 448, 512]), (64, 32, [32]), (1024, 512, [512])],
    ids=["no multiple of the step", "less than a step", "less than the start"],
)
def test_a_search_tries_no_length_twice_and_none_above_the_models(start: int, most: int, expected: list[int]) -> None:
    def probe(config: Any, members: int) -> Any:
        if config.data.max_length == 514:  # RoBERTa: two of its positions cannot be used
            raise UserError("exceeds the positions")
        return SimpleNamespace(fits=True)

    found = search.search("length", make_config(data__max_length=start), 1, probe, most=most)
    assert [value for value, _ in itertools.islice(found, 9)] == expected


def test_a_search_stops_at_what_the_model_refuses() -> None:
    def probe(config: Any, members: int) -> Any:
        if config.method.rank > 32:
            raise UserError("larger than the layer")
        return SimpleNamespace(fits=True)

    tried = dict(search.search("rank", make_config(), 1, probe))
    assert max(value for value, found in tried.items() if not isinstance(found, UserError)) == 32
    with pytest.raises(UserError, match="'bitfit' has no rank"):
        list(search.search("rank", make_config(method=methods.make_config("bitfit").to_dict()), 1, probe))


def test_methods_are_compared_with_the_configs_own() -> None:
    assert list(variants.comparison(make_config())) == ["full", "lora", "lora, nf4"]
    own = variants.comparison(make_config(method=methods.make_config("ia3").to_dict()))
    assert list(own) == ["full", "lora", "lora, nf4", "ia3, nf4 (the config)"]
    assert [config.method.method for config in own.values()] == ["full", "lora", "lora", "ia3"]
    own = variants.comparison(make_config(method=methods.make_config("ia3").to_dict() | {"start_from": "adapter"}))
    assert [config.start_from for config in own.values()] == ["", "", "", "adapter"]


# --- The command ---

CONFIG = """
from peftjax.core.config import defaults
from peftjax.methods import make_config

def get_config():
    config = defaults()
    config.model.path = {path!r}
    config.method = make_config("lora", rank=2)
    config.data.max_length = 16
    return config
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A config whose model's directory holds nothing but config.json."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(tmp_path / "model")))
    return tmp_path


def test_the_command_plans_in_another_process(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written / "plans" / "cpu.json"
    code = command.main([f"--config={written / 'config.py'}", "--device=cpu", f"--json={file}"])
    out = capsys.readouterr().out
    assert code == 0
    assert "compiled by XLA:CPU" in out
    assert "attention: xla (model.attention='auto')" in out
    assert "frozen base" in out
    assert "\x1b" not in out  # no terminal, no colours
    record = json.loads(file.read_text())
    assert record["fits"] is True
    assert record["needed"] == sum(record["arguments"].values()) + record["temporaries"] + record["others"]


def test_a_json_file_that_cannot_be_written_is_refused_before_the_plan(
    written: Path, monkeypatch: pytest.MonkeyPatch, alone: plan.Plan
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "ask", lambda *rest, **named: asked.append(rest) or alone)
    monkeypatch.setenv("HOME", str(written))
    arguments = [f"--config={written / 'config.py'}", "--device=cpu"]
    for file, words in (("", "--json= is empty"), (str(written), "is a directory; give the name of a file")):
        with pytest.raises(UserError, match=words):
            command.main([*arguments, f"--json={file}"])
    assert not asked
    command.main([*arguments, "--json=~/plan.json"])
    assert json.loads((written / "plan.json").read_text())["fits"] == alone.fits


def test_weights_that_are_there_decide_whether_the_base_is_quantized(
    written: Path, monkeypatch: pytest.MonkeyPatch, alone: plan.Plan
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(command, "ask", lambda config, fields, *rest, **named: asked.append(fields) or alone)
    arguments, file = [f"--config={written / 'config.py'}", "--device=cpu"], written / "model" / "config.json"
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(SMALL | {"quantization_config": nf4}))
    command.main(arguments)
    assert asked.pop()["quantization_config"] == nf4  # no weights: config.json decides
    save_file({"model.norm.weight": np.zeros(2, np.float32)}, file.with_name("model.safetensors"))
    with pytest.warns(UserWarning, match=r"ignoring quantization_config \(bitsandbytes, nf4\)"):
        command.main(arguments)
    assert not asked.pop()["quantization_config"]
    kernel = "model.layers.0.mlp.up_proj.weight"
    state = {f"{kernel}.{part}": np.zeros(2, np.uint8) for part in ("quant_state.bitsandbytes__nf4", "nested_absmax")}
    save_file(state, file.with_name("model.safetensors"))
    file.write_text(json.dumps(SMALL))
    with pytest.warns(UserWarning, match="it has no quantization_config, but the tensors are in nf4"):
        command.main(arguments)
    assert asked.pop()["quantization_config"]["bnb_4bit_use_double_quant"]


def test_of_a_hub_id_only_config_json_is_fetched(
    written: Path, monkeypatch: pytest.MonkeyPatch, alone: plan.Plan
) -> None:
    fetched = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append((name, revision, allow_patterns))
        return str(written / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(command, "ask", lambda *given, **named: alone)
    hub = ["--config.model.path=some/model", "--config.model.revision=main"]
    assert command.main([f"--config={written / 'config.py'}", "--device=cpu", *hub]) == 0
    assert fetched == [("some/model", "main", ["config.json"])]


def test_a_mistake_is_told_before_anything_is_compiled(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ask", lambda *given, **named: pytest.fail("it was compiled"))
    config = f"--config={written / 'config.py'}"
    for device, told in (("cpu:2", "is 2 devices"), ("v5x", "no such device")):
        with pytest.raises(UserError, match=told):
            command.main([config, f"--device={device}"])


def test_the_populations_of_a_sweep_are_planned_as_far_as_they_fit(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: plan.Plan
) -> None:
    asked: list[tuple[int, int, list[int]]] = []

    def ask(config: Any, fields: Any, device: Device, *, members: int, population: Any, advise: bool) -> plan.Plan:
        asked.append((config.data.max_length, members, [one.method.rank for one in population]))
        needed = {"frozen base": 10 * config.data.max_length * members}
        return dataclasses.replace(
            alone,
            device=device.name,
            members=members,
            arguments=needed,
            padding=0,
            temporaries=0,
            others=0,
            memory=1100,
        )

    monkeypatch.setattr(command, "ask", ask)
    swept = ["--sweep.method.rank=2,4,8", "--sweep.optim.learning-rate=1e-3,1e-2", "--sweep.data.max_length=16,32,200"]
    file = written / "plan.json"
    code = command.main([f"--config={written / 'config.py'}", "--device=h100", *swept, f"--json={file}"])
    assert code == 1  # not even one run of 200 tokens fits
    assert [(length, members) for length, members, _ in asked] == [
        (16, 1), (16, 2), (16, 4), (16, 6), (32, 1), (32, 2), (32, 4), (32, 3), (200, 1),
    ]  # fmt: skip
    assert {tuple(ranks) for _, _, ranks in asked} == {(2, 2, 4, 4, 8, 8)}
    out = capsys.readouterr().out
    assert "population 1 of 3: 6 runs" in out
    assert "runs side by side: 6 of 6" in out
    assert "runs side by side: 3 of 6" in out
    assert "not even one run fits" in out
    assert "step, at least" in out
    assert [record["members"] for record in json.loads(file.read_text())[0]] == [1, 2, 4, 6]
    with pytest.raises(UserError, match="a sweep cannot be combined with --members"):
        command.main([f"--config={written / 'config.py'}", "--device=cpu", *swept, "--members=2"])


def test_a_sweep_of_full_fine_tuning_is_planned_for_one_run_at_a_time_on_a_cpu(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: plan.Plan
) -> None:
    asked = list[int]()

    def ask(config: Any, fields: Any, device: Device, *, members: int, **named: Any) -> plan.Plan:
        asked.append(members)
        return dataclasses.replace(alone, device=device.name, members=members)

    monkeypatch.setattr(command, "ask", ask)
    given = [f"--config={written / 'config.py'}", "--config.method.name=full", "--sweep.optim.learning_rate=1e-3,1e-2"]
    command.main([*given, "--device=cpu"])
    assert asked == [1]
    assert "runs side by side: 1 of 2 (without a shared base" in capsys.readouterr().out
    command.main([*given, "--device=h100"])
    assert asked == [1, 1, 2]


def test_a_search_for_the_length_ends_at_the_models_positions(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: plan.Plan
) -> None:
    asked: list[int] = []

    def ask(config: Any, *given: Any, **named: Any) -> plan.Plan:
        asked.append(config.data.max_length)
        return alone

    monkeypatch.setattr(command, "ask", ask)
    given = [f"--config={written / 'config.py'}", "--device=h100", "--search=length", "--config.data.max_length=16"]
    assert command.main(given) == 0
    assert asked == [64]
    assert "largest length that fits: 64" in capsys.readouterr().out


def test_random_draws_and_the_sweep_of_the_config_file_are_planned_as_the_sweep_would_train_them(
    written: Path, monkeypatch: pytest.MonkeyPatch, alone: plan.Plan
) -> None:
    asked: list[tuple[int, list[tuple[float, int]]]] = []

    def ask(config: Any, fields: Any, device: Device, *, members: int, population: Any, advise: bool) -> plan.Plan:
        asked.append((members, [(one.optim.learning_rate, one.method.rank) for one in population]))
        return dataclasses.replace(alone, members=members)

    monkeypatch.setattr(command, "ask", ask)
    config = ["--device=cpu", f"--config={written / 'config.py'}"]
    fields = ["--sweep.optim.learning_rate=loguniform(1e-4,1e-2)", "--sweep.method.rank=2,4"]
    with pytest.raises(UserError, match=r"the range of optim\.learning_rate needs random search"):
        command.main([*config, *fields])
    with pytest.raises(UserError, match="nothing to sweep: the config file defines no search space"):
        command.main([*config, "--sweep"])
    command.main([*config, *fields, "--trials=3", "--search_seed=1"])
    runs = sweep_members.members(str(written / "config.py"), [], fields, written / "new", trials=3, seed=1)
    assert asked[-1] == (3, [(run.config.optim.learning_rate, run.config.method.rank) for run in runs])
    searched = written / "searched.py"
    searched.write_text(
        (written / "config.py").read_text() + "\n\ndef get_sweep():\n    return {'method.rank': [2, 4]}\n"
    )
    command.main(["--device=cpu", f"--config={searched}", "--sweep"])
    assert [rank for _, rank in asked[-1][1]] == [2, 4]
    command.main(
        [*config, "--sweep.method.rank=2,4", "--or", "--sweep.method.rank=8", "--sweep.optim.learning_rate=1e-3"]
    )
    assert [rank for _, rank in asked[-1][1]] == [2, 4, 8]


@pytest.mark.slow
def test_each_member_is_planned_with_the_ranks_and_layers_of_all() -> None:
    base = make_config()
    options = ({"rank": 4, "targets": "q_proj"}, {"rank": 2, "targets": "down_proj"}, {"rank": 3, "targets": "q_proj"})
    runs = [configs.changed(base, {f"method.{name}": value for name, value in each.items()}) for each in options]
    runs.append(configs.changed(runs[0], {"optim.name": "sgd"}))
    mesh = devices.find("cpu").mesh({})
    together = traced.trace_step(runs[1], SMALL, mesh, 2, runs)
    apart = [traced.trace_step(runs[index], SMALL, mesh) for index in (0, 1)]
    name = "adapters"
    assert together.argument_bytes[name] == 2 * sum(step.argument_bytes[name] for step in apart)
    assert together.argument_bytes["frozen base"] == apart[0].argument_bytes["frozen base"]
    moments = [step.argument_bytes["optimizer state"] - 16 for step in (together, *apart)]
    assert moments[0] == pytest.approx(2 * (moments[1] + moments[2]), rel=0.01)  # those of AdamW, also for SGD


def test_an_error_of_the_other_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], input: str, **options: Any) -> Any:  # noqa: A002  subprocess.run's name for it
        monkeypatch.setattr("sys.stdin", io.StringIO(input))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            worker.serve()
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(UserError, match="exceeds the model's 64 positions"):
        worker.ask(make_config(data__max_length=100), SMALL, devices.find("cpu"))


@pytest.mark.parametrize(
    ("code", "said", "told"),
    [(1, "Traceback\n  ...\nKeyError: 'x'\n", "code 1: KeyError: 'x'"), (-9, "", "code -9: it printed nothing")],
)
def test_a_process_that_ends_without_an_answer_is_told(
    code: int, said: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", lambda command, **given: subprocess.CompletedProcess(command, code, "", said))
    with pytest.raises(UserError, match=f"the process that compiles for cpu ended with {told}") as raised:
        worker.ask(make_config(), SMALL, devices.find("cpu"))
    assert str(raised.value.__cause__) == said


# --- The real compilers; the extras tpu and cuda-plan ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e", "v5p:2x2x1", "v6e:2x4", "a6000", "l4:2", "h100:8", "h200", "a100-40gb"])
def test_devices_that_are_not_there_are_compiled_for(name: str) -> None:
    device = devices.find(name)
    if missing := device.missing():
        pytest.skip(missing)
    config = make_config(mesh__fsdp=device.count, model__dtype="bfloat16", train__batch_size=device.count)
    found = worker.ask(config, SMALL, device)
    assert found.compiler == ("libtpu" if device.platform == "tpu" else "XLA:GPU")
    assert found.fits
    assert 0 <= found.padding < 2 * sum(found.arguments.values())
    assert found.moved > 0
    assert bool(found.collectives) == (device.count > 1)


GEMMA = {"model_type": "gemma2", "sliding_window": 100, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16}
GEMMA |= {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts", "fields", "kernel"),
    [
        ("v5e", {}, GEMMA, "splash"),
        ("v5e:2x2", {"sequence": 2, "fsdp": 2}, GEMMA, "splash"),
        ("v5e:2x2", {"data": 2, "tensor": 2}, GEMMA, "splash"),
        ("v6e", {}, GEMMA, "splash"),
        ("v6e:2x2", {"sequence": 2, "fsdp": 2}, GEMMA, "splash"),
        ("v6e:2x2", {"data": 2, "tensor": 2}, GEMMA, "splash"),
        ("h100", {}, {}, "triton"),
        ("h100:2", {"fsdp": 2}, GEMMA, "blockwise"),
    ],
)
def test_attention_without_scores_is_compiled_for_packed_sequences(
    name: str, parts: dict[str, int], fields: dict[str, Any], kernel: str
) -> None:
    device = devices.find(name)
    if missing := device.missing():
        pytest.skip(missing)
    config = make_config(
        data__pack=True, data__max_length=4096, model__dtype="bfloat16", train__batch_size=2, mesh=parts
    )
    model = SMALL | fields | {"max_position_embeddings": 4096}
    found, dense = (
        worker.ask(configs.changed(config, {"model.attention": attention}), model, device, advise=False)
        for attention in ("auto", "xla")
    )
    assert (found.attention, dense.attention) == (kernel, "xla")
    assert found.temporaries < dense.temporaries / 2


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu")
def test_a_program_that_the_tpu_compiler_refuses_does_not_fit() -> None:
    wide = SMALL | {"hidden_size": 8192, "intermediate_size": 32768, "num_hidden_layers": 16}
    found = worker.ask(make_config(model__quantize="", model__dtype="float32"), wide, devices.find("v5e"), advise=False)
    assert not found.fits
    assert "RESOURCE_EXHAUSTED" in found.refused
    assert found.needed > sum(found.arguments.values())
