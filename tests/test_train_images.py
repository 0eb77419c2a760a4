"""The train and evaluate commands on a ViT and folders of images."""

import base64
import html
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import peftjax
from peftjax import evaluate, methods
from peftjax.core.config import defaults
from peftjax.log import read_metrics
from peftjax.models import from_hf_config
from peftjax.report.data import ReportData
from peftjax.train import train
from peftjax.training import config as configs
from tests import tiny
from tests.runs import is_measured

COLORS = {"blue": (30, 60, 220), "red": (220, 40, 30)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ViT and images of noisy colours, of many sizes."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    peftjax.save_model(tiny.make(from_hf_config(tiny.VIT)), root / "model")
    (root / "model" / "preprocessor_config.json").write_text(json.dumps({"size": 8}))
    for split, count in (("train", 12), ("eval", 5)):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = rng.integers(-25, 25, (*rng.integers(6, 14, 2), 3))
                Image.fromarray((color + noise).astype(np.uint8)).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture
def make_config(world: Path) -> Callable[..., Any]:
    def make(method: str = "lora", **options: Any) -> Any:
        made = defaults()
        made.model.path, made.task.kind = str(world / "model"), "image_classification"
        made.task.labels = tuple(COLORS)
        made.method = methods.make_config(method, **options)
        made.data.train, made.data.eval = (f"images:{world}/train",), (f"images:{world}/eval",)
        made.optim.learning_rate = 2e-2
        made.train.steps, made.train.batch_size, made.train.log_every = 6, 8, 2
        made.train.eval_every = 0
        made.checkpoint.every = 3
        return configs.validate(made)

    return make


@pytest.mark.slow
def test_lora_learns_the_classes_of_folders_and_a_resumed_run_ends_with_the_same_bits(
    make_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = make_config(targets="all-linear", dropout=0.1), tmp_path / "run"
    scores = train(made, run).scores
    lines = read_metrics(run / "metrics.jsonl")
    before, after = (line for line in lines if line["kind"] == "eval")
    assert after["eval_loss"] == scores["eval_loss"] < before["eval_loss"]
    assert (scores["accuracy"], scores["eval_labels"]) == (1.0, 10)
    assert all(line["images_per_second"] > 0 for line in lines if line["kind"] == "train")
    printed = capsys.readouterr().out
    assert "accuracy 1 " in printed
    assert "images/s" in printed
    assert "train: 48 images read" in printed
    page = (run / "report.html").read_text()
    assert "Images per second" in page
    assert "Accuracy" in page
    assert "token" not in page.split("<body>")[1].split("<details>")[0].lower()

    classes = ReportData.load(run).classes
    assert classes is not None
    assert [example.correct for example in classes.examples] == [True] * 3
    for example in classes.examples:
        assert example.record.startswith(f"{example.expected}/")
        with Image.open(io.BytesIO(base64.b64decode(example.image))) as image:
            np.testing.assert_allclose(np.asarray(image).mean((0, 1)), COLORS[example.expected], atol=25)
        assert f'<img src="data:image/jpeg;base64,{html.escape(example.image)}"' in page

    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "6")
    shutil.rmtree(tmp_path / "again" / "adapter")
    assert train(made, tmp_path / "again").scores == scores
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    same = [
        [{key: value for key, value in line.items() if not is_measured(key)} for line in read_metrics(path)]
        for path in (run / "metrics.jsonl", tmp_path / "again" / "metrics.jsonl")
    ]
    assert same[0] == same[1]


@pytest.mark.slow
def test_a_bottleneck_adapter_is_evaluated_as_it_was_trained(make_config: Callable[..., Any], tmp_path: Path) -> None:
    made, run = make_config("houlsby"), tmp_path / "run"
    fields = {"model.remat": "block", "train.accumulate": 2, "mesh.data": 2, "data.workers": 2}
    made = configs.changed(made, fields)
    scores = train(made, run).scores
    assert scores["accuracy"] == 1.0
    (tmp_path / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({configs.to_json(made)!r}))\n"
    )
    evaluate.main([f"--config={tmp_path / 'config.py'}", f"--workdir={run}"])
    written = json.loads((run / "evaluation.json").read_text())
    assert written == pytest.approx(scores, rel=1e-5)


def test_a_saved_model_takes_along_how_images_are_prepared(world: Path, tmp_path: Path) -> None:
    peftjax.save_model(peftjax.load_model(world / "model"), tmp_path / "saved", source=world / "model")
    assert (tmp_path / "saved" / "preprocessor_config.json").read_text() == '{"size": 8}'


def test_what_needs_words_is_refused(make_config: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs batches .* got pixels, labels, loss_weights: choose another init"):
        train(make_config(init="eva"), tmp_path / "run")
    with pytest.raises(ValueError, match="needs one token embedding with a slot, and this model has 0"):
        train(make_config("prompt"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"task\.kind='image_classification' does not generate text; set it to 0"):
        configs.changed(make_config(), {"eval.samples": 2})
    assert not (tmp_path / "run" / "config.json").exists()
