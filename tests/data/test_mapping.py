"""data.map: a user's function that turns one record into another."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from peftjax import sharding
from peftjax.core.errors import UserError
from peftjax.data.mapping import Mapped
from peftjax.data.sources import open_source
from peftjax.training import config as configs
from peftjax.training.setup import open_data
from tests.test_train import config

CODE = """
import dataclasses

@dataclasses.dataclass
class Pair:
    question: "str"

def to_pair(record):
    pair = Pair(record.pop("q"))
    return {"prompt": pair.question, "completion": str(record["nested"].pop())}

def to_chat(record):
    return {"messages": [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": "yes"}]}

def to_list(record):
    return [record["q"]] * 100

def fails(record):
    return record["text"]
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_records.py").write_text(CODE)
    (tmp_path / "some.json").write_text(json.dumps([{"q": f"{n}+1=", "nested": [n + 1]} for n in range(4)]))
    return tmp_path


@pytest.mark.parametrize("place", ["my_records", "my_records.py", "{root}/my_records.py"])
def test_records_pass_through_the_function_which_may_change_them(root: Path, place: str) -> None:
    source = Mapped(open_source("some.json"), f"{place.format(root=root)}:to_pair")
    for _ in range(2):  # the source, which is in memory, keeps its records
        assert [source[index] for index in (0, 3)] == [
            {"prompt": "0+1=", "completion": "1"}, {"prompt": "3+1=", "completion": "4"},
        ]  # fmt: skip
    copied = pickle.loads(pickle.dumps(source))
    assert (copied[1], copied.name(1), len(copied)) == (source[1], "some.json:2", 4)


def test_a_file_that_has_changed_is_run_again_but_not_for_the_sources_that_are_open(root: Path) -> None:
    spec, file = "my_records.py:to_pair", root / "my_records.py"
    before = Mapped(open_source("some.json"), spec)
    assert Mapped(open_source("some.json"), spec)._function is before._function
    file.write_text(CODE.replace('"prompt"', '"question"'))
    after = Mapped(open_source("some.json"), spec)
    assert before[0] == {"prompt": "0+1=", "completion": "1"}
    assert after[0] == {"question": "0+1=", "completion": "1"}


def test_training_reads_what_the_function_returns_for_training_and_held_out_records(root: Path) -> None:
    made = config(root)
    made.data.train = made.data.eval = ("some.json",)
    made.data.map = "my_records.py:to_pair"
    plain = config(root, data__shuffle=False)
    mapped = [next(open_data(configs.validate(one), sharding.make_mesh())[1]) for one in (made, plain)]
    assert sorted(set(mapped[0].records)) == [f"some.json:{n}" for n in range(1, 5)]
    rows = {tuple(row) for row in mapped[0].arrays["tokens"]}
    assert rows == {tuple(row) for row in mapped[1].arrays["tokens"][:4]}  # "0+1=" and "1", as in the other file
    stored = configs.to_dict(configs.validate(plain))
    assert "data.map: 'my_records.py:to_pair' here, '' there" in configs.differences(configs.validate(made), stored)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("to_pair", r"data\.map='to_pair' must be MODULE:FUNCTION or FILE\.py:FUNCTION, for example"),
        ("my_recrods:to_pair", r"no module named 'my_recrods'\. Did you mean 'my_records'\? Use FILE\.py:FUNCTION"),
        ("my_recrods.py:to_pair", r"no such file: my_recrods\.py\. Did you mean 'my_records\.py'"),
        ("my_records:to_pear", r"my_records has no function 'to_pear'\. Did you mean 'to_pair'"),
        ("my_records.part:to_pair", r"no module named 'my_records\.part'"),
        ("broken.py:f", r"importing broken\.py failed at broken\.py, line 2: ModuleNotFoundError: No module named 'nothing_here'"),
        ("wrong.py:f", r"importing wrong\.py failed at wrong\.py, line 1: SyntaxError"),
        ("my_records:fails", r"^some\.json:1: data\.map=my_records:fails failed at my_records\.py, line 19: KeyError: 'text'$"),
        ("my_records:to_list", r"^some\.json:1: .* returned \['0\+1=', .*\.\.\. \(list\); it must return a dict"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_function_is_told_on_one_line(root: Path, spec: str, message: str) -> None:
    (root / "broken.py").write_text("\nimport nothing_here\n")
    (root / "wrong.py").write_text("def f(:\n")
    with pytest.raises(UserError, match=message) as caught:
        Mapped(open_source("some.json"), spec)[0]
    assert "\n" not in str(caught.value)


def test_a_record_on_which_the_function_fails_is_named_before_the_model_is_loaded(root: Path) -> None:
    made: Any = config(root, data__map="my_records.py:to_pair")
    with pytest.raises(UserError, match=r"train\.jsonl:1: data\.map=.* line 9: KeyError: 'q'"):
        open_data(configs.validate(made), sharding.make_mesh())
