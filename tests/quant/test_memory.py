"""What the compiler says a train step over an NF4 base needs, from shapes alone."""

from pathlib import Path
from typing import Any

import jax
import pytest

from peftjax import methods, sharding
from peftjax.core.config import defaults
from peftjax.quant.base import Quantized
from peftjax.tasks import make_task
from peftjax.training import config as configs
from peftjax.training.abstract import abstract_model, abstract_step

pytestmark = pytest.mark.slow  # core has the same of one kernel (test_nf4.py)

WIDE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8,
}  # fmt: skip
LENGTH = 8
PARAMETERS = 4 * 1024 * 1024 + 3 * 1024 * 2048  # of one layer's kernels


@pytest.fixture(scope="module")
def steps() -> dict[int, tuple[Any, Any]]:
    """The compiled step of 2 and of 4 layers, each with its abstract arguments."""
    config = defaults()
    config.method = methods.make_config("lora", rank=2)
    config.model.quantize, config.model.remat = "nf4", "block"
    config.train.batch_size, config.data.max_length = 1, LENGTH
    config = configs.validate(config)
    mesh, made = sharding.make_mesh(), {}
    for layers in (2, 4):
        hf_config = WIDE | {"num_hidden_layers": layers}
        task = make_task(config.task, config.data, Path(config.model.path), hf_config=hf_config)
        model = abstract_model(config, task, hf_config)
        with jax.set_mesh(mesh):
            step, arguments = abstract_step(config, task, model, mesh)
            made[layers] = step.lower(*arguments).compile(), arguments
    return made


def test_twice_the_layers_grow_the_step_by_less_than_one_decoded_layer(steps: dict[int, tuple[Any, Any]]) -> None:
    few, many = (steps[layers][0].memory_analysis().temp_size_in_bytes for layers in (2, 4))
    assert many - few < 2 * PARAMETERS // 4  # of the two more layers, not even their codes once more


def test_a_quantized_parameter_is_an_argument_of_4_13_bits(steps: dict[int, tuple[Any, Any]]) -> None:
    compiled, arguments = steps[4]
    leaves = jax.tree.leaves(arguments, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    quantized = sum(leaf.size for leaf in leaves if isinstance(leaf, Quantized))
    others = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if not isinstance(leaf, Quantized))
    assert quantized == 4 * PARAMETERS
    bits = 8 * (compiled.memory_analysis().argument_size_in_bytes - others) / quantized
    assert 4.12 < bits <= 4.13
