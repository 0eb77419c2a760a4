"""`peftjax.train`: the training of the train command from Python, with records, a loaded model, an optimizer and callbacks."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

import peftjax
from peftjax import decoding, evaluate
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.data import batches
from peftjax.data.source_strings import absolute
from peftjax.data.sources import open_source
from peftjax.decoding import generate_ids
from peftjax.log import read_metrics
from peftjax.train import train as train_by_config
from peftjax.trainer import _model_fields
from peftjax.training import config as configs
from peftjax.training.config import Config
from peftjax.training.hooks import Hooks

RECORDS = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(24)]
FIELDS: dict[str, Any] = {
    "data.format": "completion",
    "data.max_length": 32,
    "train.steps": 4,
    "train.batch_size": 4,
    "train.log_every": 2,
    "train.eval_every": 2,
    "optim.learning_rate": 1e-2,
    "optim.schedule": "constant",
    "optim.clip_norm": 0.0,
}
LORA = peftjax.Lora(rank=2, targets=("q_proj", "v_proj"))
WEIGHTS = "adapter_model.safetensors"


def test_it_is_the_training_of_the_config_and_evaluate_reads_its_workdir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, Any]] = []
    trained = peftjax.train(
        "embedded", LORA, RECORDS[:16], eval_data=RECORDS[16:], workdir=tmp_path / "run", config=FIELDS,
        on_metrics=lines.append,
    )  # fmt: skip
    assert lines == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["kind"]) for line in lines] == [
        (0, "eval"), (2, "train"), (2, "eval"), (4, "train"), (4, "eval"),
    ]  # fmt: skip
    assert trained.path == tmp_path / "run" / "adapter"

    sources = {f"data.{name}": (str(tmp_path / "run" / f"{name}.jsonl"),) for name in ("train", "eval")}
    same = train_by_config(configs.changed(configs.Config(method=LORA), FIELDS | sources), tmp_path / "same")
    assert trained.scores == same.scores
    assert (trained.path / WEIGHTS).read_bytes() == (same.path / WEIGHTS).read_bytes()

    capsys.readouterr()
    evaluate.main([f"--workdir={tmp_path / 'run'}"])
    assert f"{trained.scores['eval_loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_loaded_model_with_an_optax_optimizer_trains_as_the_config_that_describes_them_and_resumes(
    tmp_path: Path,
) -> None:
    described = peftjax.train("embedded", LORA, RECORDS, workdir=tmp_path / "described", config=FIELDS)
    steps = []

    def norm(model: Any, step: int) -> dict[str, float]:
        steps.append(step)
        leaves = nnx.to_flat_state(nnx.state(model, peftjax.PeftParam))
        return {"norm": np.sqrt(sum(np.square(leaf.get_value()).sum() for _, leaf in leaves))}

    adamw, whole = optax.adamw(1e-2, weight_decay=0.0), defaults()
    whole.method, whole.optim = configs.to_dict(Config(method=LORA))["method"], adamw  # in place of the section

    def own(count: int, method: Any = LORA, config: Any = FIELDS, **given: Any) -> Any:
        model, fields = peftjax.load_model("embedded"), config | {"train.steps": count}
        trained = peftjax.train(
            model, method, RECORDS, workdir=tmp_path / "own", config=fields, on_evaluate=norm, **given
        )
        assert trained.model is model
        return trained

    first, last = own(2, optimizer=adamw), own(4, config=FIELDS | {"optim": adamw})
    assert own(4, method=whole).scores == last.scores  # it had finished
    assert steps == [0, 2, 4]
    assert 0 < first.scores["norm"] < last.scores["norm"]
    tokens = np.arange(8)[None]
    np.testing.assert_allclose(last.model(tokens), described.model(tokens), atol=1e-5)
    assert np.abs(last.model(tokens) - peftjax.use(last.model, None)(tokens)).max() > 1e-3
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "train"]
              for name in ("described", "own")]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_records_absolute_paths_and_what_its_model_was_loaded_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:2]))
    vocab = peftjax.load_tokenizer("embedded").vocab_size

    def load(rows: int) -> Any:
        return peftjax.load_model("embedded", resize_embeddings=rows)

    message = rf"loaded with resize_embeddings={vocab + 9}, but its tokenizer has {vocab} tokens, .* resize_embeddings={vocab},"
    with pytest.raises(UserError, match=message):
        peftjax.train(load(vocab + 9), LORA, RECORDS, workdir="run", config=FIELDS)
    assert _model_fields(load(9), {})["model.resize_embeddings"] is False  # it has more rows
    opened: list[str] = []
    monkeypatch.setattr(
        batches, "open_source", lambda spec, **options: opened.append(spec) or open_source(spec, **options)
    )
    peftjax.train(load(vocab), LORA, RECORDS, eval_data="eval.jsonl", workdir="run", config=FIELDS)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"]["train"] == [str(tmp_path / "run" / "train.jsonl")]
    assert stored["data"]["eval"] == [str(tmp_path / "eval.jsonl")]
    assert stored["model"]["resize_embeddings"] is True
    assert opened.count(str(tmp_path / "eval.jsonl")) == 2  # for the check at the start, and for three evaluations
    assert [absolute(spec) for spec in ("hf:a/train", "tfds:a/b", "images:c@2", "/d/*.json")] == [
        "hf:a/train", "tfds:a/b", f"images:{tmp_path}/c@2", "/d/*.json",
    ]  # fmt: skip


def test_a_workdir_that_was_moved_resumes_with_the_same_records_only(tmp_path: Path) -> None:
    def train(name: str, steps: int, records: list[dict[str, str]] = RECORDS) -> Any:
        fields, data = FIELDS | {"train.steps": steps}, records[:16]
        return peftjax.train("embedded", LORA, data, eval_data=RECORDS[16:], workdir=tmp_path / name, config=fields)

    whole = train("whole", 4)
    train("first", 2)
    shutil.move(tmp_path / "first", tmp_path / "moved")
    with pytest.raises(UserError, match=r"moved/train.jsonl holds other records"):
        train("moved", 4, RECORDS[::-1])
    evaluate.main([f"--workdir={tmp_path / 'moved'}"])
    resumed = train("moved", 4)
    assert (resumed.path / WEIGHTS).read_bytes() == (whole.path / WEIGHTS).read_bytes()
    assert resumed.scores == whole.scores

    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    (tmp_path / "copied" / "train.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"holds a run with another configuration: data.train: .*copied.* here, .*moved"
    ):
        train("copied", 6, RECORDS[::-1])
    (tmp_path / "moved" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"another configuration: the records in .*moved/train.jsonl have changed"):
        train("moved", 6, RECORDS[::-1])


def refused(tmp_path: Path, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        peftjax.train(*arguments, workdir=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "adapter").exists()
    return str(error.value)


def test_mistakes_are_one_line_before_any_training(tmp_path: Path) -> None:
    model = peftjax.load_model("embedded")
    assert "model.dtype cannot change for a loaded model" in refused(
        tmp_path, model, LORA, RECORDS, config={"model.dtype": "bfloat16"}
    )
    peftjax.attach(model, LORA, "mine", rngs=nnx.Rngs(0))
    assert "already has adapters: ['mine']" in refused(tmp_path, model, LORA, RECORDS)
    assert "method must be a method such as peftjax.Lora" in refused(tmp_path, "embedded", "lora", "train.jsonl")
    assert "Did you mean 'train.steps'" in refused(tmp_path, "embedded", LORA, RECORDS, config={"trian.steps": 3})
    assert "Hugging Face's num_train_epochs is called 'train.epochs' here" in refused(
        tmp_path, "embedded", LORA, RECORDS, config={"train.num_train_epochs": 3}
    )
    assert 'Its fields: messages. For language modeling, data.format="chat" reads such records' in refused(
        tmp_path, "embedded", LORA, [{"messages": []}]
    )
    with pytest.raises(UserError, match=r"a path must be a string or a pathlib.Path, not None"):
        peftjax.load_model(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"quantize=True is not a format. Formats: nf4"):
        peftjax.load_model("embedded", quantize=True)  # type: ignore[arg-type]
    assert "Did you mean 'steps'" in refused(tmp_path, "embedded", LORA, RECORDS, config={"train.step": 3})
    assert "train record 1 cannot be written as JSON" in refused(tmp_path, "embedded", LORA, [{}, {"text": {1}}])
    assert "train record 0 must be a dict, not 3; or pass file names" in refused(tmp_path, "embedded", LORA, [3])
    frame = type("DataFrame", (list,), {})(["text", "label"])  # iterates over its columns, like those of pandas
    assert "the train data is a DataFrame; give its records" in refused(tmp_path, "embedded", LORA, frame)
    for data in ({"text": ["a", "b"]}, 7):
        assert "the train data must be a list of records, or names of files" in refused(
            tmp_path, "embedded", LORA, data
        )
    assert "optimizer must be an optax optimizer" in refused(tmp_path, "embedded", LORA, RECORDS, optimizer="adam")
    sgd = optax.sgd(1e-2)
    assert "two optimizers are given" in refused(
        tmp_path, "embedded", LORA, RECORDS, optimizer=sgd, config={"optim": sgd}
    )
    for name in ("on_metrics", "on_evaluate"):
        assert f"{name} must be a function, not 3" in refused(tmp_path, "embedded", LORA, RECORDS, **{name: 3})
    assert "unknown field 3" in refused(tmp_path, "embedded", LORA, RECORDS, config={3: 1})
    with pytest.raises(UserError, match="workdir must be the path of a directory, not None"):
        peftjax.train("embedded", LORA, RECORDS, workdir=None)  # type: ignore[arg-type]
    assert "config must be a mapping" in refused(tmp_path, "embedded", LORA, RECORDS, config=["train.steps"])
    assert "the record has no field 'prompt'" in refused(tmp_path, "embedded", LORA, [{"txt": "a"}] * 4, config=FIELDS)
    assert "optim.name='custom' stands for an optimizer given to peftjax.train" in refused(  # the records are replaced
        tmp_path, "embedded", LORA, RECORDS, config=FIELDS | {"optim.name": "custom"}
    )
    (tmp_path / "run" / "config.json").write_text(configs.to_json(Config()))  # a run has started
    assert "train.jsonl holds other records" in refused(tmp_path, "embedded", LORA, RECORDS[1:], config=FIELDS)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return a mapping from names to numbers, not None"),
        ({"bleu": "high"}, "must return a mapping from names to numbers, not {'bleu': 'high'}"),
        ({3: 1.0}, "a score with the name 3; a name must be a string"),
        ({"step": 1}, "returned ['step'], which are already logged"),
        ({"eval_loss": 1}, "returned ['eval_loss'], which are already logged"),
    ],
)
def test_scores_of_a_callback_are_numbers_with_names_of_their_own(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Hooks(on_evaluate=lambda model, step: returned).scores(nnx.Module(), 0, {"eval_loss": 2.0})  # type: ignore[arg-type]


def test_generate_takes_and_returns_texts_with_a_tokenizer() -> None:
    model, tokenizer = peftjax.load_model("embedded"), peftjax.load_tokenizer("embedded")
    texts = ["March 7th, 2024 ->", "7 March 2024 ->"]
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    ids = peftjax.generate(model, prompts, max_new_tokens=4, stop=tokenizer.eos_ids)
    answers = peftjax.generate(model, tokenizer, texts, max_new_tokens=4)
    assert answers == [tokenizer.decode(each) for each in ids]
    assert peftjax.generate(model, tokenizer, texts[0], max_new_tokens=4) == answers[0]
    arrays = [np.array(prompt) for prompt in prompts]
    assert peftjax.generate(model, arrays, max_new_tokens=4, stop=tokenizer.eos_ids) == ids  # type: ignore[arg-type]
    for mistaken in ((prompts, texts), (texts,), (texts[0],)):
        with pytest.raises(UserError, match="texts need a tokenizer"):
            peftjax.generate(model, *mistaken)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"PreTrainedTokenizer is not a peftjax tokenizer; use peftjax.load_tokenizer"):
        peftjax.generate(model, type("PreTrainedTokenizer", (), {"__call__": print})(), texts)  # type: ignore[call-overload]
    message = {"role": "user", "content": "March 7th, 2024"}
    for wrong in (3, [texts[0], 3], [message, 3], [[{"content": "March"}]], {"messages": 3}):
        expected = r"a prompt must be a string, or with chat=True a list of messages, not (3|\[?{'.*); give one, or a list of them"
        with pytest.raises(UserError, match=expected):
            peftjax.generate(model, tokenizer, wrong, chat=True)  # type: ignore[call-overload]
    for wrong in (prompts[0], 3, None, [[5.5]], [[True]], [[[5]]], np.ones((1, 2))):
        with pytest.raises(UserError, match="a list of token ids for each prompt"):
            peftjax.generate(model, wrong)  # type: ignore[call-overload]
    for wrong in ([5.5], [[5]], None):
        with pytest.raises(UserError, match="stop must be a list of token ids"):
            peftjax.generate(model, prompts, stop=wrong)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"seed=1\.5 must be an integer"):
        peftjax.generate(model, prompts, seed=1.5)  # type: ignore[call-overload]
    again = peftjax.generate(model, iter(prompts), max_new_tokens=4, stop=set(tokenizer.eos_ids))  # type: ignore[call-overload]
    assert again == ids
    with pytest.raises(UserError, match="stop takes token ids"):
        peftjax.generate(model, prompts, stop=["\n"])  # type: ignore[list-item]
    with pytest.raises(UserError, match="stop must be a list of token ids, not 1"):
        peftjax.generate(model, prompts, stop=tokenizer.eos_id)  # type: ignore[call-overload]
    with pytest.raises(UserError, match=r"sampling must be a peftjax.Sampling, .* not 0.7"):
        peftjax.generate(model, prompts, sampling=0.7)  # type: ignore[call-overload]


def test_generate_answers_conversations(tmp_path: Path) -> None:
    shutil.copytree(peftjax.load_tokenizer("embedded").directory, tmp_path / "chat")
    turn = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = "{{ tools or '' }}" + turn + "{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    model, tokenizer = peftjax.load_model("embedded"), peftjax.load_tokenizer(tmp_path / "chat")
    turns = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "7 March"}]
    tools = [{"type": "function", "function": {"name": "date"}}]
    rendered = [
        (turns, tokenizer.chat(turns, True)),
        ({"messages": turns, "tools": tools}, tokenizer.chat(turns, True, tools)),
        ("7 March", tokenizer.chat(turns[1:], True)),
    ]
    assert rendered[0][1] == "system: Brief.\nuser: 7 March\n>"
    ids = [tokenizer.encode(text, bos=False, eos=False) for _, text in rendered]
    expected = [
        tokenizer.decode(answer)
        for answer in peftjax.generate(model, ids, max_new_tokens=4, stop=tokenizer.stop_ids(chat=True))
    ]
    prompts: list[Any] = [prompt for prompt, _ in rendered]
    assert peftjax.generate(model, tokenizer, prompts, chat=True, max_new_tokens=4) == expected
    assert peftjax.generate(model, tokenizer, turns, chat=True, max_new_tokens=4) == expected[0]
    assert peftjax.generate(model, tokenizer, prompts[:2], chat=True, max_new_tokens=4) == expected[:2]
    with pytest.raises(UserError, match="messages are rendered with the chat template; set chat=True"):
        peftjax.generate(model, tokenizer, turns)
    image = [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(UserError, match=r"^generate: the prompt .*has a part of type 'image'; only text is supported"):
        peftjax.generate(model, tokenizer, image, chat=True)


def test_many_prompts_are_answered_in_batches_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, calls = peftjax.load_model("embedded"), [[5, 6], [7], [8, 9], [10], [11]], []

    def counted(*arguments: Any, **options: Any) -> list[list[int]]:
        calls.append((len(arguments[1]), options["seed"]))
        return generate_ids(*arguments, **options)

    monkeypatch.setattr(decoding, "generate_ids", counted)
    expected = peftjax.generate(model, prompts, max_new_tokens=3)
    assert peftjax.generate(model, prompts, max_new_tokens=3, batch_size=2, seed=7) == expected
    assert peftjax.generate(model, prompts[:1], max_new_tokens=3, batch_size=2) == expected[:1]
    assert calls == [(5, 0), (2, 7), (2, 8), (2, 9), (1, 0)]
    sampling = peftjax.Sampling(temperature=2.0)
    drawn = peftjax.generate(model, [[5, 6]] * 4, max_new_tokens=8, batch_size=2, sampling=sampling)
    assert drawn[:2] != drawn[2:]  # each batch draws anew
    for wrong in (0, 1.5):
        with pytest.raises(UserError, match=rf"batch_size={wrong} must be an integer of at least 1, or None"):
            peftjax.generate(model, prompts, batch_size=wrong)  # type: ignore[call-overload]
    with pytest.raises(UserError, match="every prompt needs at least one token"):
        peftjax.generate(model, [], batch_size=2)
