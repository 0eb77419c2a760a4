"""The commands from end to end, in this process, on a tiny model. Resuming is tested in test_resume.py."""

import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import peftjax
from peftjax import evaluate, methods, sharding
from peftjax.core.config import defaults
from peftjax.core.errors import UserError
from peftjax.core.workdir import claim
from peftjax.generate import ModelSource, make_parser, stop_ids
from peftjax.io.load import load_model
from peftjax.log import read_metrics
from peftjax.models import from_hf_config
from peftjax.tasks import model as model_section
from peftjax.tasks.prompt_format import PromptFormat, read_prompt_format
from peftjax.train import train
from peftjax.training import config as configs
from peftjax.training import run as run_module
from peftjax.training.hooks import Hooks
from peftjax.training.trained import result_of, run_config
from tests import tiny
from tests.runs import files, in_process


def config(root: Path, method: str = "lora", **fields: Any) -> Any:
    made = defaults()
    made.model.path = str(tiny.directory(root / "model"))
    made.method = methods.make_config(method)
    made.data.train, made.data.eval = (str(root / "train.jsonl"),), (str(root / "eval.jsonl"),)
    made.data.format, made.data.max_length = "completion", 24
    made.optim.learning_rate = 1e-2
    made.train.steps, made.train.batch_size, made.train.log_every = 6, 8, 2
    made.train.eval_every = 0
    made.eval.exact_match, made.eval.samples, made.eval.max_new_tokens = 3, 2, 4
    made.checkpoint.every = 3
    for name, value in fields.items():
        section, _, field = name.partition("__")
        made[section][field] = value
    if not made.data.eval:
        made.eval.exact_match = made.eval.samples = 0
    for name, numbers in (("train", range(40)), ("eval", range(40, 50))):
        records = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in numbers]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def test_a_run_leaves_an_adapter_metrics_and_a_report_and_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, workdir, synced = config(tmp_path), tmp_path / "run", set[Path]()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    if Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", record)
    scores = train(configs.validate(made), workdir).scores
    if Path("/proc/self/fd").exists():
        names = {str(path.relative_to(workdir)) for path in synced}
        assert {
            ".",
            "metrics.jsonl",
            "config.json.partial",
            ".adapter.peftjax-tmp",
            "checkpoints",
            "checkpoints/6",
        } <= names
        assert {"checkpoints/3/about/metadata", "checkpoints/6/_CHECKPOINT_METADATA"} <= names
        files_of = ("adapter_config.json", "adapter_model.safetensors", "README.md")
        assert {f".adapter.peftjax-tmp/{name}" for name in files_of} <= names
    lines = read_metrics(workdir / "metrics.jsonl")
    before, after = (line for line in lines if line["kind"] == "eval")
    assert (before["step"], after["step"]) == (0, 6)
    assert after["eval_loss"] == scores["eval_loss"] < before["eval_loss"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6]
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 6
    page = (workdir / "report.html").read_text()
    assert "40+1=" in page
    assert "nats per token" in page
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]

    model = peftjax.load_adapter(load_model(made.model.path), workdir / "adapter")
    base = load_model(made.model.path)
    assert np.abs(model(tiny.tokens()) - base(tiny.tokens())).max() > 1e-3

    shutil.rmtree(workdir / "checkpoints")
    before = files(workdir)
    for steps in (6, 9):
        made.train.steps = steps
        with pytest.raises(ValueError, match=r"holds the result of a run, .*adapter, but no checkpoint to resume from"):
            train(configs.validate(made), workdir)
    assert files(workdir) == before


def test_an_empty_path_is_refused_by_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command, *arguments, name in (
        ("train", "--config=configs/quickstart.py", "workdir"), ("evaluate", "--workdir=run", "config"),
        ("generate", "--model=embedded", "--prompt=a", "adapter"), ("report", "workdir"),
    ):  # fmt: skip
        assert in_process(command, *arguments, f"--{name}=") == 2
        assert capsys.readouterr().err.startswith(f"error: --{name}= is empty; give a path")


def test_a_model_that_does_not_learn_the_task_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config(tmp_path, model__path=str(tmp_path / "bert"))
    fields = {
        "model_type": "bert", "vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    peftjax.save_model(tiny.make(from_hf_config(fields)), tmp_path / "bert")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bert" / file).write_bytes((tmp_path / "model" / file).read_bytes())
    with pytest.raises(
        ValueError, match=r"bert' is a Bert, which does not support task.kind='causal_lm'; it supports classif"
    ):
        train(configs.validate(made), tmp_path / "run")
    assert in_process("generate", f"--model={tmp_path / 'bert'}", "--prompt=one") == 2
    assert "bert is a Bert, which does not generate text" in capsys.readouterr().err


def test_an_adapter_is_written_with_every_checkpoint_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    save = run_module.write_adapter
    monkeypatch.setattr(
        run_module, "write_adapter", lambda *args, **options: written.append(save(*args, **options)) or written[-1]
    )
    made = config(tmp_path, checkpoint__adapter=True, data__eval=())
    train(configs.validate(made), tmp_path / "run")
    assert written == [tmp_path / "run" / "adapter"] * 2  # at steps 3 and 6
    peftjax.load_adapter(load_model(made.model.path), written[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("houlsby", {}),
        ("prefix", {"tokens": 4}),
        ("ia3", {}),
        ("ln_tuning", {}),
        ("lora", {"rank": 2, "init": "eva", "eva_batches": 2, "targets": ("q_proj", "o_proj")}),
    ],
)
def test_any_methods_run_leaves_an_adapter_that_changes_the_model(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = config(tmp_path, method, train__steps=2, data__eval=())
    made.method = methods.make_config(method, **options)
    train(configs.validate(made), tmp_path / "run")
    model = peftjax.load_adapter(load_model(made.model.path), tmp_path / "run" / "adapter")
    assert np.abs(model(tiny.tokens()) - load_model(made.model.path)(tiny.tokens())).max() > 1e-4


def test_full_fine_tuning_leaves_a_model_directory_and_has_no_second_copy_of_the_parameters(tmp_path: Path) -> None:
    made, workdir = config(tmp_path, "full", train__steps=2, eval__exact_match=0, eval__samples=0), tmp_path / "run"
    before, copies = jax.live_arrays(), []  # the list keeps them alive, so that no other array gets their ids

    def count(line: dict[str, Any]) -> None:
        new = [x for x in jax.live_arrays() if id(x) not in set(map(id, before))]
        copies.append(sum(x.shape == (257, 32) for x in new))

    train(configs.validate(made), workdir, Hooks(on_metrics=count))
    assert copies == [3] * 3  # the embedding and its two moments
    assert not (workdir / "adapter").exists()
    tuned, base = load_model(workdir / "model"), load_model(made.model.path)
    assert read_prompt_format(workdir / "model") == PromptFormat("causal_lm", "completion", "{prompt}", "prompt")
    assert (workdir / "model" / "tokenizer.json").exists()
    assert np.abs(tuned(tiny.tokens()) - base(tiny.tokens())).max() > 1e-3


def test_answers_scored_by_bleu_alone_are_neither_right_nor_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, train__steps=1, eval__metrics=("bleu",))
    assert "bleu" in train(configs.validate(made), tmp_path / "run").scores
    printed = capsys.readouterr().out
    assert [len(re.findall(rf"(?m)^{verdict}\b", printed)) for verdict in ("answer", "wrong", "right")] == [4, 0, 0]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [sample["correct"] for sample in report["before"] + report["after"]] == [None] * 4


@pytest.mark.slow
def test_evaluate_and_generate_read_what_train_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, workdir = config(tmp_path, train__steps=2, data__prompt_template="Q {prompt}"), tmp_path / "run"
    scores = train(configs.validate(made), workdir).scores
    evaluate.main([f"--workdir={workdir}"])  # the run's own config.json says the rest
    written = json.loads((workdir / "evaluation.json").read_text())
    assert written["eval_loss"] == pytest.approx(scores["eval_loss"], rel=1e-6)
    assert written["exact_match"] == scores["exact_match"]
    (tmp_path / "config.json").write_text(configs.to_json(configs.validate(made)))
    given = [f"--config={tmp_path / 'config.json'}", f"--workdir={workdir}", "--config.eval.exact-match=2"]
    evaluate.main([*given, "--config.train.epochs=3"])  # no warning: the run has the steps of its own config.json
    assert json.loads((workdir / "evaluation.json").read_text())["prompts"] == 2

    def answers(*arguments: str) -> tuple[str, list[str]]:
        """What is said before the answers, and the answers."""
        capsys.readouterr()
        assert not in_process("generate", *arguments, "--max_new_tokens=3")
        said, *answered = capsys.readouterr().out.split("\n> ")
        *answered, last = [text.split("\n", 1) for text in answered]
        assert "tokens/s" in last[1]
        return said, [text for _, text in answered] + [last[1].rsplit("\n\n", 1)[0] + "\n"]

    prompts, adapter = ["--prompt=1+1=", "--prompt=20+1="], f"--adapter={workdir / 'adapter'}"
    said, expected = answers(f"--workdir={workdir}", *prompts)
    assert said == f"applying the prompt template 'Q {{prompt}}', as in the training of {workdir}; --raw turns it off\n"
    assert answers(f"--workdir={workdir}", "--dtype=bfloat16", *prompts)[0] == said
    said, found = answers(adapter, *prompts)  # the adapter names its base, and has the template beside it
    assert said.startswith("applying the prompt template 'Q {prompt}', as in the training of")
    assert found == expected
    raw = ["--raw", "--prompt=Q 1+1=", "--prompt=Q 20+1="]
    assert answers(f"--model={made.model.path}", adapter, *raw) == ("", expected)
    assert answers(f"--model={made.model.path}", *prompts)[0] == ""
    (workdir / "adapter" / "peftjax.json").unlink()  # as one that save_adapter or peft has written
    assert answers(adapter, *raw[1:]) == ("", expected)


@pytest.mark.parametrize(
    ("flags", "formatted", "ends"),
    [([], False, (1,)), (["--chat"], False, (1, 2)), ([], True, (1, 2)), (["--raw"], True, (1,))],
)
def test_a_text_that_is_continued_as_it_is_does_not_end_with_a_turn_of_a_chat(
    flags: list[str], formatted: bool, ends: tuple[int, ...]
) -> None:
    options = make_parser().parse_args(["--prompt=a", *flags])
    tokenizer: Any = SimpleNamespace(stop_ids=lambda chat: (1, 2) if chat else (1,))
    prompts = PromptFormat("causal_lm", "chat", "{prompt}", "prompt") if formatted else None
    source = ModelSource("--model=a", tokenizer, prompts, lambda: None)  # type: ignore[arg-type, return-value]
    assert stop_ids(source, options) == ends


@pytest.mark.parametrize("terminal", [False, True])
def test_escape_sequences_are_shown_on_a_terminal_and_kept_elsewhere(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert not in_process("generate", "--model=embedded", "--prompt=a\x1b[2J\tb", "--max-new-tokens=1")
    said = capsys.readouterr().out
    assert (r"> a\x1b[2J" + "\tb\n" if terminal else "> a\x1b[2J\tb\n") in said
    assert ("0/2" in said) == terminal  # the bar, which names what runs: it compiles, then generates


def test_generate_refuses_what_does_not_say_what_to_generate_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = configs.validate(config(tmp_path, "full", eval__exact_match=0, eval__samples=0))
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(configs.to_json(made))
    tiny_lora = peftjax.attach(load_model(made.model.path), peftjax.Lora(rank=2), rngs=nnx.Rngs(0))
    for name, base in (("lost", str(tmp_path / "modl")), ("nameless", "")):
        peftjax.save_adapter(tiny_lora, tmp_path / name, base=base)
    for arguments, message in (
        ([], "nothing to generate with; give --workdir=DIR of a training run, --adapter=DIR or --model=DIR"),
        (["--workdir=run", "--adapter=a"], "--workdir names both the model and the adapter of a run; remove --model and"),
        (["--workdir=run", "--dtype=float16"], "--dtype=float16: attention in float16 is not supported on CPUs; use float32"),
        (["--model=embedded", "--config.seed=1"], "--config.seed=1 changes the config of a run; give the run with --workdir"),
        ([f"--workdir={tmp_path}"], "this directory holds several runs; give one of them: run"),
        (
            [f"--workdir={tmp_path / 'run'}", "--config.task.kind=regression"],
            "run: task.kind='regression' does not generate text; use peftjax evaluate",
        ),
        ([f"--adapter={tmp_path / 'lost'}"], f"lost without --model: {tmp_path / 'modl'}: no such directory. Did you mean"),
        ([f"--adapter={tmp_path / 'nameless'}"], "adapter_config.json does not name the base model; give --model=DIR"),
    ):  # fmt: skip
        assert in_process("generate", *arguments, "--prompt=a") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_a_directory_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    made, workdir = configs.validate(config(tmp_path)), tmp_path / "sweep" / "one"

    def refused(workdir: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            evaluate.main([f"--workdir={workdir}"])

    workdir.mkdir(parents=True)
    refused(tmp_path / "swep", r"swep: no such directory\. Did you mean 'sweep'\? Give the workdir of a run")
    refused(workdir, r"one: not the workdir of a run; it holds no files\. peftjax train writes config\.json there")
    refused(tmp_path / "model", r"model: not the workdir of a run; it holds config\.json, ")
    refused(tmp_path / "train.jsonl", r"train\.jsonl: this is a file")
    (workdir / "config.json").write_text(configs.to_json(made))
    refused(tmp_path / "sweep", r"sweep: this directory holds several runs; give one of them: one$")
    refused(workdir, r"adapter not found: training has not finished\. Run peftjax train again to finish it")
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    refused(workdir, r"has not finished; its newest checkpoint is from step 3 of 6\. Run peftjax train again")
    (workdir / "adapter").mkdir()  # with checkpoint.adapter
    with pytest.warns(UserWarning, match=r"training has not finished; this is the result of step 3 of 6"):
        assert result_of(made, workdir) == workdir / "adapter"
    (workdir / "checkpoints" / "6").mkdir()
    assert result_of(made, workdir) == workdir / "adapter"
    (workdir / "config.json").write_text(configs.to_json(configs.changed(made, {"model.dtype": "bfloat16"})))
    (tmp_path / "config.json").write_text(configs.to_json(made))
    assert made.model.dtype == "auto"
    assert run_config(workdir, str(tmp_path / "config.json")).model.dtype == "bfloat16"  # that of the run
    assert run_config(tmp_path / "none", str(tmp_path / "config.json")) == made


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_records(tmp_path: Path) -> None:
    made = config(
        tmp_path,
        optim__learning_rate=1e30,
        optim__clip_norm=0.0,
        train__log_every=4,
        eval__exact_match=0,
        eval__samples=0,
    )
    made.optim.schedule = "constant"
    with pytest.raises(
        ValueError, match=r"step [23]: (loss|grad_norm) is (nan|inf). Records of its batch: train.jsonl:\d+"
    ):
        train(configs.validate(made), tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_without_held_out_records_nothing_is_evaluated(tmp_path: Path) -> None:
    made = config(tmp_path, data__eval=(), train__steps=2)
    assert train(configs.validate(made), tmp_path / "run").scores == {}
    assert all(line["kind"] == "train" for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_target_that_matches_nothing_stops_before_anything_is_written(tmp_path: Path) -> None:
    made = config(tmp_path)
    made.method.targets = "q_porj"
    with pytest.raises(ValueError, match="'q_porj' matches no layer"):
        train(configs.validate(made), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_training_in_bfloat16_keeps_the_adapter_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = config(tmp_path, model__dtype="bfloat16", train__steps=2, eval__exact_match=0, eval__samples=0)
    made.model.quantize = "nf4"
    train(configs.validate(made), tmp_path / "run")
    assert "parameters in bfloat16, kernels in nf4, on 1 device" in capsys.readouterr().out
    model = load_model(made.model.path, dtype="bfloat16", quantize="nf4")
    model = peftjax.load_adapter(model, tmp_path / "run" / "adapter")
    assert model.blocks.attention.query.adapters.default.a.dtype == jnp.float32
    assert model.blocks.attention.query.kernel.dtype == jnp.bfloat16


def test_what_cannot_work_is_told_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(tmp_path)
    monkeypatch.setattr(model_section, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--workdir=.*run: .*file is a file; choose a directory that can be created"):
        train(configs.validate(made), tmp_path / "file" / "run")
    before, bundled = files(tmp_path), made.copy_and_resolve_references()
    bundled.model.path = "embedded"
    with pytest.raises(ValueError, match=r"--workdir=.*model is the directory of the base model"):
        train(configs.validate(made), tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds other files \(eval.jsonl, file, model and 2 more\) and no run"):
        train(configs.validate(bundled), tmp_path)
    with claim(tmp_path / "run"), pytest.raises(ValueError, match="run is in use by process"):
        train(configs.validate(made), tmp_path / "run")
    assert files(tmp_path) == before
    made.data.eval = (str(tmp_path / "evil.jsonl"),)
    with pytest.raises(ValueError, match=r"no such file\. Did you mean 'eval\.jsonl'"):
        train(configs.validate(made), tmp_path / "run")
    made.data.prompt_template = "{promt}"
    with pytest.raises(ValueError, match=r"train\.jsonl:1: the record has no field 'promt' .* Did you mean 'prompt'"):
        train(configs.validate(made), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_microbatch_that_the_mesh_does_not_divide_is_told_with_the_fix() -> None:
    made = configs.changed(configs.Config(), {"train.batch_size": 12, "train.accumulate": 3})
    given = [
        SimpleNamespace(config=made, mesh=sharding.make_mesh(sizes)) for sizes in ({"data": 4, "fsdp": 2}, {"data": 4})
    ]
    told, nothing = (list(run_module.Run._describe_mesh(each, {})) for each in given)
    assert told == [
        "a microbatch of 4 rows cannot be split over data x fsdp = 8 devices, so each of them computes all rows; make "
        "train.batch_size / train.accumulate a multiple of 8"
    ]
    assert nothing == []
