"""Model cards, and adapters that are uploaded to a stand-in for the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flax import nnx
from huggingface_hub import constants

import peftjax
from peftjax.core.errors import UserError
from peftjax.io.model_card import make_card
from peftjax.io.push import check_push
from peftjax.train import main as train_main
from peftjax.training import card as card_module
from peftjax.training import config as configs
from tests import hub as stand_in
from tests import runs, tiny
from tests.test_train import config

# Of huggingface_hub in its HTTP library, where it uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    """A hub on which ada is logged in, and to which HF_ENDPOINT points."""
    with stand_in.serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)  # read from HF_ENDPOINT on import
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in does not speak
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield server


def saved(directory: Path, base: str | None, method: Any = None) -> Path:
    model = peftjax.attach(tiny.model(), method or peftjax.Lora(rank=2, targets=r".*\.(q|v)_proj"), rngs=nnx.Rngs(0))
    return peftjax.save_adapter(model, directory, base=base)


def metadata(card: str) -> dict[str, Any]:
    empty, text, rest = card.split("---\n", 2)
    assert empty == ""
    assert rest.startswith("\n# ")
    return yaml.safe_load(text)


def test_an_adapter_without_a_card_is_uploaded_with_one_in_one_commit(hub: stand_in.Hub, tmp_path: Path) -> None:
    directory = saved(tmp_path / "adapter", "ada/tiny-llama")
    (directory / ".hidden").write_text("secret")
    assert peftjax.push_adapter(directory, "engines/first") == f"{hub.endpoint}/engines/first"
    files = hub.files["engines/first"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files[name] == (directory / name).read_bytes()
    card = files["README.md"].decode()
    assert metadata(card) == {
        "base_model": "ada/tiny-llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:ada/tiny-llama", "lora", "peftjax", "transformers"],
    }
    assert 'adapter = snapshot_download("engines/first")' in card
    assert 'model = AutoModelForCausalLM.from_pretrained("ada/tiny-llama")' in card
    assert "| Parameters | 672 |" in card  # 3 layers of 2 (32 + 32) and 2 (32 + 16)
    assert not (directory / "README.md").exists()

    (directory / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Mine: ORG/NAME\n")
    peftjax.push_adapter(directory, "engines/first")  # into the repository that is there now
    assert hub.files["engines/first"]["README.md"].decode().endswith("# Mine: engines/first\n")
    assert hub.commits == {"engines/first": 2}


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("adapter", r"cannot upload to 'adapter': the name must be ORG/NAME, such as my-name/my-adapter"),
        ("ada/a/b", r"the name must be ORG/NAME"),
        ("ada/a--b", r"the hub does not allow this name \(HFValidationError"),
        ("grace/adapter", r"ada is not a member of grace; choose one of ada, engines"),
    ],
)
def test_a_name_that_cannot_be_uploaded_to_is_refused(hub: stand_in.Hub, repo_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_push(repo_id)


def test_who_cannot_upload_is_told_why(hub: stand_in.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_push("ada/adapter")
    hub.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(UserError, match="ada/adapter: the token is read-only"):
        check_push("ada/adapter")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match=r"does not accept the token \(.*; log in again with `hf auth login`"):
        check_push("ada/adapter")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached \(Connect"):
        check_push("ada/adapter")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match="not logged in to the hub; run `hf auth login` or set HF_TOKEN"):
        check_push("ada/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        check_push("ada/adapter")


def test_a_refused_upload_is_one_line_with_the_cause(hub: stand_in.Hub, tmp_path: Path) -> None:
    directory = saved(tmp_path / "adapter", "ada/tiny-llama")
    (directory / "README.md").write_text("---\nbase_model: /home/ada/llama\n---\n")
    with pytest.raises(
        UserError, match=r"adapter could not be uploaded to ada/adapter: .*/home/ada/llama.*; try again with p"
    ):
        peftjax.push_adapter(directory, "ada/adapter")
    assert hub.files == {"ada/adapter": {}}


def test_a_directory_that_holds_no_adapter_is_not_uploaded(hub: stand_in.Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        peftjax.push_adapter(tmp_path, "ada/adapter")
    assert not hub.asked


def test_a_run_leaves_a_card_and_uploads_it(hub: stand_in.Hub, tmp_path: Path) -> None:
    made = config(tmp_path, train__steps=2, eval__exact_match=0, eval__samples=0)
    (tmp_path / "config.py").write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({configs.to_json(configs.validate(made))!r}))\n"
    )
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="must be ORG/NAME"):
        train_main([*arguments, "--push=adapter"])
    with pytest.raises(
        UserError, match=r"--push=ada/a uploads adapters, and method\.name='full' trains the whole model"
    ):
        train_main([*arguments, "--push=ada/a", "--config.method.name=full"])
    assert not (tmp_path / "run").exists()  # told before the training

    train_main([*arguments, "--push=ada/adapter"])
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    uploaded = hub.files["ada/adapter"]
    assert uploaded.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "peftjax.json"}
    assert uploaded["README.md"].decode() == card.replace("ORG/NAME", "ada/adapter")
    assert metadata(card) == {  # the base is a local directory, and no repository of the hub
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "peftjax", "transformers"],
    }
    assert str(tmp_path) not in card
    assert "| Base model | `model` |" in card
    assert "| Trainable parameters | 10,560 (28.23% of the base) |" in card
    assert "| Training data | `train.jsonl` |" in card
    assert "| Training | 2 steps of 8 sequences, at most 24 tokens each; seed 0 |" in card
    assert "tokens |" not in card.partition("## Scores")[2]  # a size is not a score
    assert "Measured on `eval.jsonl`.\n\n| Metric | Before training | After |\n| --- | --- | --- |\n| loss | " in card
    assert 'peftjax.load_model("path/to/base-model")' in card


def test_a_card_names_data_sources_without_the_folders_of_the_machine() -> None:
    sources = ("/home/ada/train.jsonl@0.5", "images:~/flowers", "tfds:glue/mrpc/train", "hf:/data/chats/train")
    assert card_module._sources(sources) == "`train.jsonl@0.5`, `images:flowers`, `tfds:glue/mrpc/train`, `hf:train`"


def test_the_card_of_a_bottleneck_adapter_is_for_the_library_adapters(tmp_path: Path) -> None:
    card = make_card(saved(tmp_path / "adapter", "embedded", peftjax.Pfeiffer()))
    assert metadata(card) == {
        "library_name": "adapter-transformers",
        "tags": ["pfeiffer", "peftjax"],
    }
    assert "# Pfeiffer adapter for the model bundled with peftjax" in card
    assert "model.set_active_adapters(model.load_adapter(adapter))" in card
    assert 'peftjax.load_model("embedded")' in card


@pytest.mark.slow
def test_the_command_uploads_to_the_hub_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in.serve() as server:
        for name, value in {
            "HF_ENDPOINT": server.endpoint, "HF_TOKEN": stand_in.TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        world = runs.make_world(tmp_path)
        overrides = ("--config.train.steps=2", "--config.optim.warmup_steps=0", "--config.eval.exact_match=0")
        printed = runs.finish(runs.start(world, tmp_path / "run", *overrides, "--push=engines/adapter"))
        assert f"{server.endpoint}/engines/adapter" in printed
        assert server.files["engines/adapter"].keys() == runs.files(tmp_path / "run" / "adapter").keys()
        ((code, printed),) = runs.ended(runs.start(world, tmp_path / "other", "--push=grace/adapter"))
    assert code == 2
    assert (
        "error: cannot upload to grace/adapter: ada is not a member of grace; choose one of ada, engines\n" in printed
    )
    assert not (tmp_path / "other").exists()
