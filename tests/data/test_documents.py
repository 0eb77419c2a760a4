"""What each kind of task makes of a record. That pairs are cut as transformers does it: tests/interop/test_tokenizer.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import processors

from peftjax.core.config import defaults
from peftjax.data.batches import Batching, train_batches
from peftjax.tasks import Task, make_task
from peftjax.training import config as configs
from peftjax.training.config import Config

Make = Callable[..., Path]
SIZES = {"max_length": 16, "max_target_length": 8}


def as_bert(data: dict[str, Any]) -> None:
    """A tokenizer that puts <s> and </s> around a text, and tells the second of a pair by its token types."""
    around = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    data["post_processor"] = json.loads(around.__getstate__())


def make(
    kind: str, labels: tuple[str, ...] = (), multi_label: bool = False, router_aux_loss_coef: float = 0.0, **data: Any
) -> Config:
    config = defaults()
    config.task.kind, config.task.labels, config.task.multi_label = kind, labels, multi_label
    config.task.router_aux_loss_coef = router_aux_loss_coef
    config.data.update(SIZES | {"prompt_template": "{text}"} | data)
    return configs.validate(config)


def task_of(config: Config, directory: Path) -> Task:
    return make_task(config.task, config.data, directory)


def shapes(row: dict[str, Any]) -> dict[str, tuple]:
    return {name: (array.shape, array.dtype.name) for name, array in row.items()}


def test_a_text_with_a_class_is_read_between_its_special_tokens(make_directory: Make) -> None:
    task = task_of(make("classification", ("no", "yes")), make_directory(as_bert))
    for label in (1, "yes", True):
        arrays = task.document({"text": "hello", "label": label}, "a:1").arrays
        assert arrays["tokens"].tolist() == [1, *task.tokenizer.encode("hello", bos=False, eos=False), 2]
        assert arrays["mask"].all()
        assert not arrays["token_types"].any()
        assert (arrays["labels"], arrays["loss_weights"]) == (1, 1.0)
    assert task.labels == ("no", "yes")
    assert shapes(task.empty_row()) == {
        "tokens": ((16,), "int32"), "token_types": ((16,), "int32"), "mask": ((16,), "bool"),
        "labels": ((), "int32"), "loss_weights": ((), "float32"),
    }  # fmt: skip
    empty = task.empty_row()
    assert (empty["tokens"] == task.tokenizer.pad_id).all()
    assert not empty["mask"].any()
    assert empty["loss_weights"] == 0


def test_a_pair_is_told_apart_by_token_types_and_cut_where_it_is_longer(make_directory: Make) -> None:
    task = task_of(make("classification", ("no", "yes"), pair_template="{other}"), make_directory(as_bert))
    record = {"text": "yes", "other": "no" * 30, "label": 0}
    document = task.document(record, "a:1")
    first = task.tokenizer.encode("yes", bos=False, eos=False)
    assert document.too_long == f"{len(first) + 3 + 30} tokens exceed data.max_length=16"
    assert document.arrays["tokens"].tolist()[: len(first) + 2] == [1, *first, 2]
    assert document.arrays["tokens"][-1] == 2
    assert document.arrays["token_types"].tolist() == [0] * (len(first) + 2) + [1] * (14 - len(first))


def test_a_text_may_have_several_classes(make_directory: Make) -> None:
    task = task_of(make("classification", ("a", "b", "c"), multi_label=True), make_directory(as_bert))
    assert task.document({"text": "x", "label": [0, "c"]}, "a:1").arrays["labels"].tolist() == [1, 0, 1]
    assert task.document({"text": "x", "label": []}, "a:1").arrays["labels"].tolist() == [0, 0, 0]
    assert shapes(task.empty_row())["labels"] == ((3,), "float32")
    with pytest.raises(ValueError, match=r"a:1: field 'label' must hold a list of classes .* not 'a'"):
        task.document({"text": "x", "label": "a"}, "a:1")


def test_a_text_may_have_a_number(make_directory: Make) -> None:
    task = task_of(make("regression", label_field="score"), make_directory(as_bert))
    label = task.document({"text": "x", "score": 2.5}, "a:1").arrays["labels"]
    assert (label, label.dtype, task.labels) == (2.5, np.float32, ())
    assert task.document({"text": "x", "score": "2.50"}, "a:1").arrays["labels"] == label  # as in a CSV file
    for wrong in ("high", "nan", True, float("nan"), None):
        with pytest.raises(ValueError, match="a:1: field 'score' must hold a finite number, not "):
            task.document({"text": "x", "score": wrong}, "a:1")


def test_the_class_of_a_word_stands_at_its_first_token(make_directory: Make) -> None:
    task = task_of(make("token_classification", ("O", "NAME")), make_directory(as_bert))
    words = ["hello", "zzz", "fox"]
    arrays = task.document({"words": words, "label": [0, "NAME", 0]}, "a:1").arrays
    # each word of a list is one in the middle of a text, after a space
    lengths = [len(task.tokenizer.encode(f" {word}", bos=False, eos=False)) for word in words]
    assert lengths[1] > 1
    first = [1, 1 + lengths[0], 1 + lengths[0] + lengths[1]]
    assert np.flatnonzero(arrays["loss_weights"]).tolist() == first
    assert np.flatnonzero(arrays["labels"]).tolist() == first[1:2]
    with pytest.raises(ValueError, match=r"a:1: 3 words \('words'\) with 2 classes"):
        task.document({"words": words, "label": [0, 1]}, "a:1")
    with pytest.raises(ValueError, match="a:1: field 'words' must hold a list with one entry per word, not 'a b'"):
        task.document({"words": "a b", "label": [0, 1]}, "a:1")


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_completion_after_its_start_token(
    make_directory: Make,
) -> None:
    directory = make_directory(as_bert, config={"decoder_start_token_id": 3})
    task = task_of(make("seq2seq", prompt_template="say {prompt}"), directory)
    record = {"prompt": "yes", "completion": "no yes"}
    arrays = task.document(record, "a:1").arrays
    answer = [
        *task.tokenizer.encode("no yes"),
    ]
    assert arrays["tokens"].tolist() == task.tokenizer.encode("say yes")
    assert arrays["targets"].tolist() == answer
    assert answer[-1] == 2
    assert arrays["decoder_tokens"].tolist() == [3, *answer[:-1]]
    assert shapes(task.empty_row())["decoder_tokens"] == ((8,), "int32")
    prompt = task.prompt(record, "a:1")
    assert (prompt.tokens, prompt.prompt, prompt.expected) == (arrays["tokens"].tolist(), "say yes", "no yes")
    long = task.document({"prompt": "yes", "completion": "no" * 30}, "a:1")
    assert len(long.arrays["targets"]) == 8
    assert long.too_long.endswith("tokens exceed data.max_target_length=8")


@pytest.mark.parametrize(
    ("too_long", "told"),
    [
        ("truncate", "2 records in 2 rows, 1 cut to 16 tokens (targets to 8), 0 dropped, "),
        ("drop", "3 records in 2 rows, 1 dropped (1 longer than 16 tokens or with a target longer than 8), "),
    ],
)
def test_targets_that_are_too_long_are_told_with_their_length(
    too_long: str, told: str, make_directory: Make, tmp_path: Path
) -> None:
    records = [{"prompt": "yes", "completion": "no" * 30}, *[{"prompt": "yes", "completion": "no"}] * 2]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = (str(tmp_path / "a.jsonl"),)
    config = make("seq2seq", prompt_template="{prompt}", too_long=too_long, train=source, shuffle=False)
    batches = train_batches(config.data, task_of(config, make_directory(as_bert)), Batching(2), seed=0)
    next(batches)
    assert told in batches.summary_text()


def test_classes_are_those_of_the_checkpoints_own_head_where_the_config_names_none(make_directory: Make) -> None:
    stored = {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "good", "0": "bad"}}
    directory = make_directory(as_bert, config=stored)
    assert task_of(make("classification"), directory).labels == ("bad", "good")
    with pytest.raises(ValueError, match=r"task\.labels is empty, and the checkpoint in .* has no head"):
        task_of(make("token_classification"), directory)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("Yes", r"a:1: field 'label' has the class 'Yes', .* Did you mean 'yes'\? Classes: 'no', 'yes'"),
        (2, "a:1: field 'label' has the class 2; it must be a whole number from 0 to 1 or one of the 2 names"),
        (-1, "a:1: .* class -1; .* names in task.labels; records of GLUE's test splits have no labels"),
        (1.0, "a:1: field 'label' has the class 1.0"),
        (1.0, "names in task.labels; pandas turns a column with a missing value into floats"),
        (
            "1",
            "a:1: .* class '1', which is not in .* Classes: 'no', 'yes'; it is text, as all values of a CSV column are if",
        ),
        ("1.0", "Classes: 'no', 'yes'; it is text, as all values"),
        ("", "Classes: 'no', 'yes'$"),
    ],
)
def test_a_class_that_there_is_not_is_an_error_that_names_the_record(
    label: Any, message: str, make_directory: Make
) -> None:
    task = task_of(make("classification", ("no", "yes")), make_directory(as_bert))
    with pytest.raises(ValueError, match=message):
        task.document({"text": "x", "label": label}, "a:1")


def test_a_number_is_a_name_if_all_names_are_numbers(make_directory: Make) -> None:
    task = task_of(make("classification", ("1", "2", "3")), make_directory(as_bert))
    given = [task.document({"text": "x", "label": label}, "a:1").arrays["labels"] for label in (1, "1", 3)]
    assert [int(label) for label in given] == [0, 0, 2]
    with pytest.raises(ValueError, match=r"a:1: .* class '0', which is not in task\.labels\. Classes: '1', '2', '3'$"):
        task.document({"text": "x", "label": 0}, "a:1")


def test_words_with_the_label_that_transformers_ignores_are_not_counted(make_directory: Make) -> None:
    task = task_of(make("token_classification", ("O", "NAME")), make_directory(as_bert))
    arrays = task.document({"words": ["a", "b", "c"], "label": ["NAME", -100, 0]}, "a:1").arrays
    whole = task.document({"words": ["a", "b", "c"], "label": ["NAME", 0, 0]}, "a:1").arrays
    first = np.flatnonzero(whole["loss_weights"])
    assert np.flatnonzero(arrays["loss_weights"]).tolist() == [first[0], first[2]]
    np.testing.assert_array_equal(arrays["labels"], whole["labels"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pair_template": "{other}"}, r"no field 'other' \(set by data\.pair_template\)"),
        ({"prompt_template": "{other}"}, r"no field 'other' \(set by data\.prompt_template\)"),
        ({"label_field": "other"}, r"no field 'other' \(set by data\.label_field\)\. Its fields: text, label$"),
    ],
)
def test_a_missing_field_is_an_error_that_names_its_setting(
    fields: dict[str, str], message: str, make_directory: Make
) -> None:
    task = task_of(make("classification", ("no", "yes"), **fields), make_directory(as_bert))
    with pytest.raises(ValueError, match=message):
        task.document({"text": "x", "label": 0}, "a:1")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "classification", "labels": ("a", "a")}, r"task\.labels has 'a' twice"),
        ({"kind": "regression", "labels": ("a",)}, "a regression has no classes; leave it empty"),
        (
            {"kind": "seq2seq", "pack": True},
            r"data\.pack=True .* for task.kind='causal_lm' only, not for 'seq2seq'",
        ),
        (
            {"kind": "seq2seq", "too_long": "split"},
            r"data\.too_long='split' is for raw text only .*, not for task\.kind='seq2seq'; set it to 'truncate' or 'drop'",
        ),
        (
            {"kind": "causal_lm", "format": "chat", "too_long": "split"},
            r"\(task\.kind='causal_lm' with data\.format='text'\), not for data\.format='chat'; set it to",
        ),
        (
            {"kind": "regression", "multi_label": True},
            "multi_label=True requires task.kind='classification', not 'regression'; set it to False",
        ),
        (
            {"kind": "seq2seq", "router_aux_loss_coef": 0.1},
            "router_aux_loss_coef=0.1 requires task.kind='causal_lm', not 'seq2seq'",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_an_error(config: dict, message: str, make_directory: Make) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(make(**config), make_directory(as_bert))
