"""A step that cannot fit the memory is refused from shapes; one that might fit is not."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from peftjax import methods, sharding
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.core.memory import host_memory, most_memory
from peftjax.tasks import make_task
from peftjax.training import config as configs
from peftjax.training import memory
from peftjax.training.abstract import abstract_model, abstract_step, bytes_per_device
from peftjax.training.setup import check_fit, open_data
from tests import tiny
from tests.test_train import config

INPUTS = 4 * 3 * 64 * 64 * 32  # float32 inputs [B, T, D] of 3 layers


def refusal(monkeypatch: pytest.MonkeyPatch, room: int, **values: Any) -> str:
    """What `check_step` says where a device has `room` more bytes than the arguments of the step; empty: nothing."""
    config = defaults()
    config.method, config.data.max_length, config.model.remat = methods.make_config("lora", rank=2), 64, "block"
    for name, value in values.items():
        section, _, leaf = name.partition("__")
        config[section][leaf] = value
    valid = configs.validate(config)
    mesh = sharding.make_mesh(valid.mesh.sizes)
    task = make_task(valid.task, valid.data, Path("tiny"), hf_config=tiny.CONFIG)
    model = abstract_model(valid, task, tiny.CONFIG)
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(valid, task, model, mesh)
        monkeypatch.setattr(memory, "most_memory", lambda devices: bytes_per_device(arguments) + room)
        try:
            memory.check_step(valid, task, model, mesh, step, arguments)
        except UserError as error:
            return str(error)
    return ""


def test_a_step_is_refused_where_the_inputs_of_its_layers_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, INPUTS - 1, train__batch_size=64)
    assert message.startswith(
        "train.batch_size=64 and data.max_length=64: a step takes at least 1.7 MiB per device, 1.5"
    )
    assert message.endswith("lower train.batch_size or data.max_length, or raise train.accumulate")
    assert refusal(monkeypatch, INPUTS, train__batch_size=64) == ""


@pytest.mark.parametrize("values", [{"train__accumulate": 4}, {"mesh__data": 4}])
def test_microbatches_and_devices_divide_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, int]
) -> None:
    assert refusal(monkeypatch, INPUTS // 4, train__batch_size=64, **values) == ""
    assert "a step takes at least" in refusal(monkeypatch, INPUTS // 4 - 1, train__batch_size=64, **values)


def test_activations_that_are_kept_for_the_backward_pass_count_but_scores_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, scores = 4 * 3 * 64 * 64 * 40, 4 * 3 * 64 * 4 * 64 * 64
    kept, more = INPUTS + hidden, 2 * (INPUTS + hidden)
    assert "a step takes" in refusal(monkeypatch, kept - 1, train__batch_size=64, model__remat="none")
    assert more < scores  # the backward pass computes them again, layer by layer
    assert refusal(monkeypatch, more, train__batch_size=64, model__remat="none") == ""


def test_a_model_that_is_too_large_is_not_blamed_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(monkeypatch, -60_000, train__batch_size=1)
    assert message.startswith("model.path='embedded': the weights and the optimizer's state take ")
    assert "model.quantize" in message


def test_the_devices_of_a_host_share_its_memory() -> None:
    devices = jax.local_devices()
    assert most_memory(devices[:1]) >= host_memory() >= 2**28
    assert most_memory(devices[:4]) == most_memory(devices[:1]) // 4


def test_examples_are_counted_as_long_as_batches_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path, data__eval=(), data__max_length=64, train__batch_size=64, model__remat="block")
    made.method = methods.make_config("lora", rank=2)
    monkeypatch.setattr(memory, "bytes_per_device", lambda tree: 0)  # what is left are the inputs of the layers
    monkeypatch.setattr(
        memory, "most_memory", lambda devices: INPUTS // 2
    )  # those of 32 positions, the shortest length

    def check() -> None:
        mesh, valid = sharding.make_mesh(), configs.validate(made)
        task, batches = open_data(valid, mesh)
        with contextlib.closing(batches):
            check_fit(valid, task, batches, mesh)

    check()
    with monkeypatch.context() as small:
        small.setattr(memory, "swap_space", lambda: 0)
        small.setattr(memory, "host_memory", lambda: 65 * 12 * 32)  # of 64 rows of 32 tokens, and one of 64
        with pytest.raises(UserError, match=r"the batch alone takes 24.8 KiB, and this machine has 24.4 KiB"):
            check()
        small.setattr(memory, "host_memory", lambda: 66 * 12 * 32)
        check()
    made.data.pack = True
    with pytest.raises(UserError, match=r"data\.max_length=64: a step takes at least"):
        check()
    made.data.pack = False
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a" * 60, "completion": "b"}) + "\n")
    with pytest.raises(UserError, match=r"data\.max_length=64: a step takes at least"):
        check()
