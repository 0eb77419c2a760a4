import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftjax.data.sources import Source, open_source, split_weight

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
    with pytest.raises(ValueError, match=r"is a directory; give its files"):
        open_source(str(tmp_path / "data"))


def test_an_unknown_ending_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"the name must end in \.jsonl, \.jsonl\.gz or \.parquet"):
        open_source(str(tmp_path / "a.csv"))


def test_a_weight_stands_after_an_at_sign() -> None:
    assert split_weight("a.jsonl@0.5") == ("a.jsonl", 0.5)
    assert split_weight("data/*.jsonl@2") == ("data/*.jsonl", 2.0)
    assert split_weight("me@home/a.jsonl") == ("me@home/a.jsonl", None)
    assert split_weight("tfds:mnist:3.0.1/train[:90%]@1e-1") == ("tfds:mnist:3.0.1/train[:90%]", 0.1)
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
