import datetime
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from huggingface_hub import RepoFile
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from peftjax.core.errors import UserError
from peftjax.data.hub_source import CONVERTED
from peftjax.data.source_strings import split_weight
from peftjax.data.sources import Source, open_source

RECORDS = [{"text": "one"}, {"text": "zwei é"}, {"text": "three"}]


def read(source: Source) -> list[dict[str, Any]]:
    return [source[i] for i in range(len(source))]


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


@pytest.fixture
def lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize("form", ["plain", "no final newline", "crlf", "byte order mark", "gz"])
def test_json_lines_are_records_in_their_order(form: str, lines: bytes, tmp_path: Path) -> None:
    path = tmp_path / ("a.jsonl.gz" if form == "gz" else "a.jsonl")
    content = {
        "no final newline": lines.rstrip(b"\n"),
        "crlf": lines.replace(b"\n", b"\r\n"),
        "byte order mark": b"\xef\xbb\xbf" + lines,
        "gz": gzip.compress(lines),
    }
    path.write_bytes(content.get(form, lines))
    source = open_source(str(path))
    assert read(source) == RECORDS
    assert names(source) == [f"{path.name}:{line}" for line in (1, 2, 3)]


def test_blank_lines_are_no_records_but_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\n  \n\n{"a": 2}\n\n')
    source = open_source(str(tmp_path / "a.jsonl"))
    assert read(source) == [{"a": 1}, {"a": 2}]
    assert names(source) == ["a.jsonl:2", "a.jsonl:5"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1,}', "(property name enclosed|Illegal trailing comma)"),  # as Python 3.13 says it
        (b"[1, 2]", "expected a JSON object .* found list"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "an integer has more than 4300 digits; write it as text"),
        (b'{"a": ' + b"[" * 100_000, "the values are nested too deeply"),
        (b'{"a": "\xed\xa0\x80", "b": ' + b"[" * 990 + b"]" * 990 + b"}", "the values are nested too deeply"),
    ],
)
def test_a_broken_line_is_an_error_with_file_line_and_reason(line: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + line + b"\n")
    source = open_source(str(tmp_path / "a.jsonl"))
    assert source[0] == {"a": 1}
    with pytest.raises(ValueError, match=rf"^a\.jsonl:2: .*{reason}"):
        source[1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_without_a_record_is_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    else:
        path.write_bytes(gzip.compress(b"\n\n") if name.endswith("gz") else b"")
    with pytest.raises(ValueError, match=rf"{name}' is empty: it has no records"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_damaged_file_is_an_error_with_its_name(name: str, lines: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(ValueError, match=rf"source .*{name}' cannot be read"):
        open_source(str(tmp_path / name))


def test_parquet_rows_are_records_with_their_nested_values(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"n": i, "messages": [{"role": "user", "content": f"é{i}"}]} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"))
    assert read(source) == rows
    assert names(source)[4] == "a.parquet:5"


def test_times_in_a_parquet_file_are_read_to_the_microsecond(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def opened(**columns: pyarrow.Array) -> Source:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], **columns}), tmp_path / "a.parquet")
        return open_source(str(tmp_path / "a.parquet"))

    nanoseconds = pyarrow.array([1500000000123456789], pyarrow.timestamp("ns"))  # pandas writes them
    expected = datetime.datetime(2017, 7, 14, 2, 40, 0, 123456)
    assert read(opened(at=nanoseconds)) == [{"text": "a", "at": expected}]
    with pytest.raises(UserError, match=r"^a\.parquet:1: field 'at' cannot be read: .*; remove it"):
        read(opened(at=pyarrow.array([10**18], pyarrow.timestamp("us"))))  # the year 33658


def test_a_pattern_makes_one_source_of_its_sorted_files(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl("b.jsonl", [{"n": 3}])
    write_jsonl("a.jsonl", [{"n": 1}, {"n": 2}])
    source = open_source(str(tmp_path / "*.jsonl"))
    assert read(source) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert names(source) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


def test_files_of_one_name_in_two_folders_keep_their_records_apart(tmp_path: Path) -> None:
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text('{"n": 1}\n')
    source = open_source(str(tmp_path / "*" / "train.jsonl"))
    assert names(source) == [f"{tmp_path}/x/train.jsonl:1", f"{tmp_path}/y/train.jsonl:1"]


def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text('{"n": 1}\n')
    assert len(open_source(str(tmp_path / "a[1].jsonl"))) == 1


def test_a_missing_file_is_an_error_that_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    with pytest.raises(ValueError, match=r"no such file. Did you mean 'train.jsonl'\?.*holds train.jsonl"):
        open_source(str(tmp_path / "data" / "trian.jsonl"))
    with pytest.raises(ValueError, match=r"no such file. Did you mean 'data'\?"):
        open_source(str(tmp_path / "dat" / "train.jsonl"))
    if sys.version_info < (3, 13):
        with pytest.raises(
            UserError, match=r"'\*\*' can only .* Write \*\* between slashes, as in data/\*\*/\*\.jsonl"
        ):
            open_source(str(tmp_path / "data" / "**.jsonl"))
    with pytest.raises(ValueError, match=r"is a directory; none of its files ends in \.jsonl, .* Use images:.* or hf:"):
        open_source(str(tmp_path))


def test_an_unknown_ending_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"the name must end in \.jsonl, .*\.csv, \.tsv or \.parquet"):
        open_source(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("form", ["list", "data", "lines", "list of lines", "csv", "upper case", "zst"])
def test_other_files_give_the_same_records(form: str, lines: bytes, tmp_path: Path) -> None:
    import pyarrow

    listed = json.dumps(RECORDS)
    name, content, first = {
        "list": ("a.json", b"\xef\xbb\xbf" + listed.encode(), 1),
        "data": ("a.json", f'{{"version": 1, "data": {listed}}}'.encode(), 1),
        "lines": ("a.json", lines, 1),
        "list of lines": ("a.jsonl", json.dumps(RECORDS, indent=1).encode(), 1),
        "csv": ("a.csv", b'\xef\xbb\xbftext\r\n"one"\r\nzwei \xc3\xa9\r\nthree\r\n', 2),
        "upper case": ("A.CSV", "text\none\nzwei é\nthree\n".encode(), 2),
        "zst": ("a.jsonl.zst", pyarrow.compress(lines, "zstd", asbytes=True), 1),
    }[form]
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path / name))
    assert read(source) == RECORDS
    assert names(source) == [f"{name}:{first + i}" for i in range(3)]


def test_the_lines_of_a_csv_file_are_counted_through_line_breaks_in_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b,c,d,e\n"1\n2",x,1,2.50,007\n\n3,"y, ""z""",-1,3,8\n')
    source = open_source(str(tmp_path / "a.csv"))
    rows = [["1\n2", "x", 1, "2.50", "007"], ["3", 'y, "z"', -1, "3", "8"]]  # a column of numbers holds numbers
    assert read(source) == [dict(zip("abcde", row, strict=True)) for row in rows]
    assert names(source) == ["a.csv:2", "a.csv:5"]


def test_a_tsv_file_is_a_csv_file_with_tabs(tmp_path: Path) -> None:
    (tmp_path / "a.TSV").write_text('a\tb, c\n"1\t2"\t0.5\n"3"\t4\n')
    assert read(open_source(str(tmp_path / "a.TSV"))) == [{"a": "1\t2", "b, c": 0.5}, {"a": "3", "b, c": 4}]


@pytest.mark.parametrize(
    "column",
    [
        ["1", "-2.5", "1e-07"],
        ["2.50", "1"],
        ["1,000"],
        ["nan"],
        ["-0"],
        ["9" * 5000],
        ["0.1000000000000000055"],
        ["1E5"],
    ],
)
def test_a_csv_value_prints_as_it_is_written(column: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "".join(f'"{text}"\n' for text in column))
    values = [record["a"] for record in read(open_source(str(tmp_path / "a.csv")))]
    assert [str(value) for value in values] == column
    assert all(isinstance(value, str) for value in values) == (len(column) < 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv:1: the header has 'a' twice; rename one of these columns"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "a.csv:3: 3 columns, but the header has 2; put a value that contains commas"),
        (
            "a.csv",
            "a;b\n1;2\n1,2;3\n",
            "a.csv:3: 2 columns, but the header has 1; its columns seem to be separated by semi",
        ),
        (
            "a.csv",
            "a\tb\n1,2\t3\n",
            "a.csv:2: 2 columns, but the header has 1; its columns seem to be separated by tabs",
        ),
        (
            "a.csv",
            "a\tb\n1,2\t3\n",
            "a.csv:2: 2 columns, but the header has 1; * tabs: give it a name that ends in .tsv",
        ),
        (
            "a.tsv",
            "a,b\n1\t2,3\n",
            "a.tsv:2: 2 columns, but the header has 1; * commas: give it a name that ends in .csv",
        ),
        (
            "a.tsv",
            "a\tb\n1\t2\t3\n",
            "a.tsv:2: 3 columns, but the header has 2; put a value that contains tabs or quotes",
        ),
        ("a.csv", 'a\n"1" 2\n', "a.csv:2: not valid CSV: "),
        ("a.json", '[{"a": 1},\n {"a": ]', "a.json:2: not valid JSON: "),
        ("a.json", "[" * 100_000, "source '*a.json' cannot be read: the values are nested too deeply"),
        ("a.json", f"[{'9' * 5000}]", "source '*a.json' cannot be read: an integer has more than 4300 digits"),
        ("a.json", "3", "a.json: expected a list of JSON objects, found int"),
        ("a.json", '[{"a": 1}, 2]', r"a.json:2: expected a JSON object {...}, found int"),
        ("a.csv", "a\né\n".encode("latin-1"), "source '*a.csv' is not valid UTF-8: *; convert the file to UTF-8"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), "a.jsonl:1: not valid UTF-8: *; convert the file to UTF-8"),
        ("a.jsonl", "[\n{}\n", "a.jsonl:3: not valid JSON: "),
        ("a.jsonl", "\ufeff{}\n".encode("utf-16-le"), "a.jsonl: the file is UTF-16; convert it to UTF-8"),
    ],
)
def test_a_broken_file_is_an_error_with_the_place(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="^" + re.escape(message).replace(r"\*", ".*")):
        read(open_source(str(tmp_path / name)))


def test_a_lone_surrogate_becomes_the_replacement_character_with_one_warning(tmp_path: Path) -> None:
    raw = b'{"a": ["x\xed\xa0\x80"]}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"a": ["\\ud83d\\ude00"]}\n{"a": ["x\\ud83d"]}\n' + raw)
    source = open_source(str(tmp_path / "a.jsonl"))
    assert source[0] == {"a": ["😀"]}
    with pytest.warns(UserWarning, match=r"^a\.jsonl:2: a lone surrogate .* is replaced by U\+FFFD"):
        assert source[1] == {"a": ["x\ufffd"]}
    assert source[2] == {"a": ["x\ufffd"]}


def test_a_directory_is_one_source_unless_it_has_several_splits(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    write_jsonl("train-1.jsonl", [{"n": 1}])
    (tmp_path / "train-0.json").write_text('[{"n": 0}]')
    (tmp_path / "README.md").touch()
    assert read(open_source(str(tmp_path))) == [{"n": 0}, {"n": 1}]
    write_jsonl("test.jsonl", [{"n": 2}])
    with pytest.raises(
        UserError, match=r"several splits \(test\.jsonl, train-1\.jsonl\); give the files of one, such as .*/test\*"
    ):
        open_source(str(tmp_path))


def write_parquet(root: Path, files: dict[str, int]) -> None:
    import pyarrow
    import pyarrow.parquet

    for file, number in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"n": [number]}), root / file)


@pytest.mark.parametrize(
    "layout", ["data/{}-0000{}-of-00002-a1b2.parquet", "sub/{}/000{}.parquet", "default/{}/000{}.parquet"]
)
def test_a_directory_with_the_layout_of_the_hub_is_read_by_split(layout: str, tmp_path: Path) -> None:
    files = {layout.format(split, i): n + i for split, n in (("train", 0), ("test_all", 10)) for i in range(2)}
    write_parquet(tmp_path, files)
    assert read(open_source(f"hf:{tmp_path}/train")) == [{"n": 0}, {"n": 1}]
    assert read(open_source(f"hf:{tmp_path}/test_all")) == [{"n": 10}, {"n": 11}]
    with pytest.raises(UserError, match=r"no split 'trian'\. Did you mean 'train'\? It has test_all, train"):
        open_source(f"hf:{tmp_path}/trian")


def test_a_split_of_a_dataset_of_the_hub_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's branch of converted files stands in for a dataset that has no Parquet files of its own."""
    branches = {
        None: ["README.md"],
        CONVERTED: ["one/train/0000.parquet", "one/test/0000.parquet", "two/train/0000.parquet"],
    }
    write_parquet(tmp_path, {"one/train/0000.parquet": 1, "two/train/0000.parquet": 2})
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, repo_type, revision: branches[revision])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "README.md"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read(open_source("hf:owner/data/two/train")) == [{"n": 2}]
    options = {"repo_type": "dataset", "revision": CONVERTED, "allow_patterns": ["two/train/0000.parquet"]}
    assert asked == [("owner/data", options)]
    with pytest.raises(UserError, match=r"name a configuration\. Write hf:NAME/CONFIG/SPLIT with one of one, two"):
        open_source("hf:owner/data/train")
    with pytest.raises(UserError, match=r"there is no configuration 'tow'\. Did you mean 'two'\?"):
        open_source("hf:owner/data/tow/train")
    with pytest.raises(UserError, match=r"must have the form hf:OWNER/NAME/SPLIT"):
        open_source("hf:train")
    with pytest.raises(UserError, match=r"there is no directory .*/owner/data$"):
        open_source(f"hf:{tmp_path}/owner/data/train")


CARD = """---
license: mit
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: [a/*.parquet, "b/**/x-?.parquet"]}
  - {split: audio, path: "*.wav"}
- config_name: lines
  data_dir: lines
  data_files: {dev: "1[0-9].jsonl"}
- {config_name: whole, data_files: lines/10.jsonl}
- {config_name: named, data_dir: named}
- {config_name: tabs, data_files: "*.tsv", sep: "\\t"}
---
# Numbers
"""


def write_dataset(root: Path, card: str = CARD) -> None:
    write_parquet(
        root, {"a/2.parquet": 2, "a/1.parquet": 1, "b/c/d/x-1.parquet": 3, "a/b/0.parquet": 0, "b/x-10.parquet": 0}
    )
    write_parquet(root, {"named/squad_train.parquet": 7, "named/squad_dev-v2.parquet": 8})
    (root / "lines").mkdir()
    for number in (10, 11, 20):
        (root / "lines" / f"{number}.jsonl").write_text(f'{{"n": {number}}}\n')
    (root / "README.md").write_text(card)


def test_the_configurations_of_readme_name_the_files_of_splits(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    for spec, numbers in {
        "train": [1, 2, 3],
        "main/train": [1, 2, 3],
        "lines/validation": [10, 11],
        "whole/train": [10],
        "named/train": [7],
        "named/dev": [8],
    }.items():
        assert [record["n"] for record in read(open_source(f"hf:{tmp_path}/{spec}"))] == numbers, spec
    for spec, message in {
        "test": "no split 'test'. It has train, audio",
        "audio": "README.md gives split 'audio' no files that exist and can be read",
        "tabs/train": "README.md: configuration 'tabs' sets sep, which is not supported",
    }.items():
        with pytest.raises(UserError, match=rf"^source 'hf:[^\n]*': {re.escape(message)}$"):
            open_source(f"hf:{tmp_path}/{spec}")
    for card, message in (
        ("---\nconfigs: [1]\n---\n", "configs must be a list of entries"),
        ("---\na: [\n---\n", "the metadata is not valid YAML"),
        ("---\nconfigs:\n- data_files: [{split: train}]\n---\n", "data_files of configuration 'default' must name"),
    ):
        (tmp_path / "README.md").write_text(card)
        with pytest.raises(UserError, match=rf"^source 'hf:[^\n]*': README\.md: {message}[^\n]*$"):
            open_source(f"hf:{tmp_path}/train")
    (tmp_path / "README.md").write_text("# Numbers")
    with pytest.raises(UserError, match=r"name a configuration.* a, .*, named$"):
        open_source(f"hf:{tmp_path}/train")
    assert read(open_source(f"hf:{tmp_path}/lines/train")) == [{"n": 10}, {"n": 11}, {"n": 20}]  # no name has a split
    assert read(open_source(f"hf:{tmp_path}/named/validation")) == [{"n": 8}]


def test_on_the_hub_the_readme_comes_first_and_converted_files_before_other_formats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_dataset(tmp_path)
    write_parquet(tmp_path, {"tabs/train/0000.parquet": 30})
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")]
    branches = {None: [file for file in files if "tabs" not in file], CONVERTED: ["tabs/train/0000.parquet"]}

    def listing(name: str, repo_type: str, revision: str | None) -> list[str]:
        if revision not in branches:
            raise RevisionNotFoundError("", response=Mock())
        return branches[revision]

    monkeypatch.setattr("huggingface_hub.list_repo_files", listing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "README.md"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert read(open_source("hf:owner/data/train")) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert read(open_source("hf:owner/data/tabs/train")) == [{"n": 30}]
    del branches[CONVERTED]
    with pytest.raises(UserError, match="sets sep, which is not supported"):
        open_source("hf:owner/data/tabs/train")
    branches[None] = ["lines/10.jsonl", "dataset_infos.json"]
    assert read(open_source("hf:owner/data/lines/train")) == [{"n": 10}]
    branches[None] = ["data.zip"]
    with pytest.raises(UserError, match=r"has no files that end in \.jsonl, .* and the hub has not converted it"):
        open_source("hf:owner/data/train")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "owner/data is gated: accept its terms"),
        (RepositoryNotFoundError, "owner/data is neither a local directory nor a dataset on the hub"),
    ],
)
def test_why_the_hub_refuses_to_give_a_dataset_is_told(
    error: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error("", response=Mock())

    monkeypatch.setattr("huggingface_hub.list_repo_files", refuse)
    with pytest.raises(UserError, match=f"^source 'hf:owner/data/train': {message}"):
        open_source("hf:owner/data/train")


def test_without_network_a_dataset_comes_from_the_cache_or_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, local_files_only: bool = False, **__: Any) -> Any:
        raise LocalEntryNotFoundError("") if local_files_only else ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(
        UserError,
        match=r"^source 'hf:owner/data/train': .*\(ConnectionError: no route to host\)[^\n]*$",
    ):
        open_source("hf:owner/data/train")
    write_parquet(tmp_path, {"data/train-00000-of-00001.parquet": 1})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert read(open_source("hf:owner/data/train")) == [{"n": 1}]
    with pytest.raises(UserError, match="no split 'trian'"):
        open_source("hf:owner/data/trian")


@pytest.mark.parametrize("tree", [True, False])
def test_an_incomplete_split_in_the_cache_is_an_error(
    tree: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: Any, local_files_only: bool = False, **__: Any) -> Any:
        raise IncompleteSnapshotError("", str(tmp_path)) if local_files_only else ConnectionError

    def listing(*_: Any, **__: Any) -> Any:
        if not tree:
            raise CachedRepoTreeNotFoundError
        names = [*(f"data/train-0000{i}-of-00003.parquet" for i in range(3)), "data/test-00000-of-00001.parquet"]
        return [RepoFile(path=name, size=1, oid="") for name in names]

    monkeypatch.setattr("huggingface_hub.list_repo_files", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.get_cached_repo_tree", listing)
    write_parquet(tmp_path, {f"data/train-0000{i}-of-00003.parquet": i for i in (0, 2)})
    with pytest.raises(
        UserError, match=r"failed \(ConnectionError: \), and 1 of the 3 files of this split are missing in the cache"
    ):
        open_source("hf:owner/data/train")
    write_parquet(tmp_path, {"data/train-00001-of-00003.parquet": 1})
    assert read(open_source("hf:owner/data/train")) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_weight_stands_after_an_at_sign() -> None:
    assert split_weight("a.jsonl@0.5") == ("a.jsonl", 0.5)
    assert split_weight("data/*.jsonl@2") == ("data/*.jsonl", 2.0)
    assert split_weight("me@home/a.jsonl") == ("me@home/a.jsonl", None)
    assert split_weight("tfds:mnist:3.0.1/train[:90%]@1e-1") == ("tfds:mnist:3.0.1/train[:90%]", 0.1)
    assert split_weight("data@1.2.3") == ("data@1.2.3", None)
    for weight in ("0", "-1"):
        with pytest.raises(ValueError, match="is not positive; use a finite number above 0"):
            split_weight(f"a.jsonl@{weight}")


@pytest.fixture(scope="session")  # a builder is registered once in a process; a worker may come back to this module
def tfds_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data_dir; and two builders are registered: one that generates its data, one that fails to fetch it."""
    import tensorflow_datasets as tfds

    class Greetings(tfds.core.GeneratorBasedBuilder):
        """Made up."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no checksum file beside the code

        def _info(self) -> Any:
            turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            features = {"prompt": tfds.features.Text(), "n": np.int64, "turns": tfds.features.Sequence(turn)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(20), "validation": self._generate_examples(3)}

        def _generate_examples(self, n: int) -> Iterator[Any]:
            for i in range(n):
                yield i, {"prompt": f"é{i}", "n": i, "turns": [{"role": "user", "content": "a"}]}

    class FarAway(Greetings):
        """Cannot be downloaded."""

        def _split_generators(self, _: Any) -> dict[str, Any]:
            raise ConnectionError("no route to host")

    return str(tmp_path_factory.mktemp("tfds"))


def test_a_tfds_dataset_is_generated_and_read_as_plain_python_values(tfds_folder: str) -> None:
    source = open_source("tfds:greetings/train", tfds_data_dir=tfds_folder)
    records = sorted(read(source), key=lambda record: record["n"])
    assert len(records) == 20
    assert records[3] == {"prompt": "é3", "n": 3, "turns": {"role": ["user"], "content": ["a"]}}
    assert names(source)[:2] == ["greetings/train:1", "greetings/train:2"]
    assert (Path(tfds_folder) / "greetings" / "1.0.0").is_dir()


@pytest.mark.parametrize(
    ("split", "count"), [("train[:90%]", 18), ("train[90%:]", 2), ("train[5:7]+validation", 5), ("validation", 3)]
)
def test_tfds_split_syntax_works(split: str, count: int, tfds_folder: str) -> None:
    assert len(open_source(f"tfds:greetings/{split}", tfds_data_dir=tfds_folder)) == count


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:greetings/trian", r"no split 'trian'. Did you mean 'train'\? It has train, validation"),
        ("tfds:greetings/train[x]", r"no split 'train\[x\]'"),
        ("tfds:greetings/train[:0%]", r"is empty"),
        ("tfds:greetings/train[5:2]", r"is empty"),
        ("tfds:greetings", r"must have the form tfds:NAME/SPLIT"),
        ("tfds:greeting/train", r"no dataset 'greeting'.*Did you mean 'greetings'"),
        ("tfds:rewrite_date/train", r"no dataset 'rewrite_date'.*Did you mean 'rewrite_dates'"),
        ("tfds:greetings/large/train", r"^[^\n]*BuilderConfig large not found[^\n]*$"),
        (
            "tfds:far_away/train",
            r"^[^\n]*not prepared in .*ConnectionError: no route to host.*Without network access[^\n]*$",
        ),
    ],
)
def test_a_tfds_mistake_is_an_error_that_names_what_is_near(spec: str, message: str, tfds_folder: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, tfds_data_dir=tfds_folder)
