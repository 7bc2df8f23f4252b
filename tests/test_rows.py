"""Rows of public data sets: every form of a released file, every place named, every failure in one line."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasc_ds.errors import DataError
from lorasc_ds.tasks.rows import Row, hub_rows, local_file, read_json, read_rows, read_table, read_under

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to(name: str, text: str) -> Path:
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return to


FORMS = {
    "a.jsonl": '{"a": "1", "b": "x"}\n\n{"a": "2", "b": "y\u2028z"}\n',
    "a.json": '[\n  {"a": "1", "b": "x"}\n ,{\n"a": "2", "b": "y\u2028z"}]',
    "a.csv": 'a,b\r\n1,x\r\n2,"y\u2028z"\r\n',
    "a.tsv": "a\tb\n1\tx\n2\ty\u2028z\n",
}
LINES = {"a.jsonl": (1, 3), "a.json": (2, 3), "a.csv": (2, 3), "a.tsv": (2, 3)}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_and_their_lines(write: Write, name: str, packed: str) -> None:
    path = write(name + packed, "\ufeff" + FORMS[name])
    rows = read_rows(path, "task.data_dir")
    assert [dict(row.fields) for row in rows] == [{"a": "1", "b": "x"}, {"a": "2", "b": "y\u2028z"}]
    assert [row.id for row in rows] == [f"{path}:{line}" for line in LINES[name]]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"a": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), "b": st.just("x")}
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_table_of_any_texts_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("table") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["a", "b"])
        writer.writeheader()
        writer.writerows(rows)
    assert [dict(row.fields) for row in read_rows(path, "key")] == rows


def test_a_quoted_cell_may_hold_lines_and_the_next_row_knows(write: Write) -> None:
    path = write("a.csv", 'a,b\n"one\ntwo\n",x\n3,y\n')
    assert [(row.id, row.text("a")) for row in read_rows(path, "key")] == [
        (f"{path}:2", "one\ntwo\n"),
        (f"{path}:5", "3"),
    ]
    assert [cells for _, cells in read_table(path, "key")] == [["a", "b"], ["one\ntwo\n", "x"], ["3", "y"]]


def test_a_quotation_mark_of_a_tsv_is_a_character(write: Write) -> None:
    path = write("a.tsv", 'a\tb\n"one\t1\ntwo"\t2\n')
    assert [row.text("a") for row in read_rows(path, "key")] == ['"one', 'two"']


ROW = Row(
    "f:3",
    {"text": "a", "list": ["b"], "no": 2, "yes": True, "row": {"x": 1}, "rows": [{"y": "z"}], "half": "\ud800"},
)


def test_fields_of_a_row() -> None:
    assert (ROW.text("text"), ROW.texts("list"), ROW.integer("no")) == ("a", ("b",), 2)
    assert ROW.row("row") == Row("f:3.row", {"x": 1})
    assert ROW.rows("rows") == [Row("f:3.rows[0]", {"y": "z"})]
    names = ("False", "True", "Maybe")
    assert (ROW.choice("yes", names), ROW.choice("no", names), ROW.choice("text", "xya")) == (1, 2, 2)
    assert Row("", {"a": "1"}).choice("a", names) == 1
    assert Row("", {"a": "1"}).choice("a", ("2", "1", "0")) == 1, "a name before an index"


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: ROW.text("no"), r"f:3: the row needs field 'no', a text .*, got 2$"),
        (lambda: ROW.text("none"), r"f:3: the row needs field 'none', a text .*, got none; it has text, list, no, "),
        (lambda: ROW.text("half"), r"without lone surrogates, got '\\ud800'$"),
        (lambda: ROW.integer("yes"), r"'yes', a whole number, got True$"),
        (lambda: ROW.texts("text"), r"'text', a list of one or more texts, got 'a'$"),
        (lambda: Row("f:1", {"a": []}).texts("a"), r"a list of one or more texts, got \[\]$"),
        (lambda: ROW.choice("text", ("x", "y")), r"'text', one of x, y, or its index from 0, got 'a'$"),
        (lambda: ROW.choice("no", ("x", "y")), r"one of x, y, or its index from 0, got 2$"),
        (lambda: Row("f:1", {"a": -1}).choice("a", ("x", "y")), r"got -1$"),
        (lambda: ROW.choice("yes", ("x", "y")), r"got True$"),
        (lambda: ROW.row("rows"), r"'rows', an object, got \["),
        (lambda: ROW.rows("list"), r"'list', a list of objects, got \['b'\]$"),
        (lambda: ROW.rows("rows")[0].text("x"), r"f:3\.rows\[0\]: the row needs field 'x'"),
    ],
)
def test_a_field_of_another_kind_is_named(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        ask()
    assert "\n" not in str(caught.value)


UNDER = '\n{"x": [\n1], "a": [{"b": "]\\n,"\n},\n\n{"b": ["}"]}\n, {}],\n"y": {"a": \n[2]}}'


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_under_a_name_know_their_lines(write: Write, indent: int | None) -> None:
    path = write("a.json.gz", UNDER)
    fields = [{"b": "]\n,"}, {"b": ["}"]}, {}]
    assert read_under(path, "key", "a") == [
        Row(f"{path}:{line}.a[{at}]", fields[at]) for at, line in enumerate((3, 6, 7))
    ]
    content = {"one": {"b": ["c"]}, "two\n": {"b": [{"d": []}]}, "three": {}}
    path = write("b.json", json.dumps(content, indent=indent))
    lines = (1, 1, 1) if indent is None else (2, 7, 14)
    assert read_under(path, "key") == [
        Row(f"{path}:{line}.{name}", content[name]) for name, line in zip(content, lines, strict=True)
    ]
    path = write("c.json", '{"a": [{}],\n"b": {},\n"a": [\n{},\n{}]}')
    assert [row.id for row in read_under(path, "key", "a")] == [f"{path}:4.a[0]", f"{path}:5.a[1]"], "the last counts"
    path = write("d.json", '{"a": [], "b": {}}')
    assert read_under(path, "key", "a") == []
    with pytest.raises(DataError, match=r"d\.json:1: the row needs field 'b', a list of objects, got \{\}"):
        read_under(path, "key", "b")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', r"a\.jsonl:2: not JSON \(.* at column 8\); mend the file"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"a\.jsonl:2: an object with named fields is needed, got \[2\]"),
        ("a.jsonl", "1" * 5000, r"a\.jsonl:1: not JSON"),
        ("a.json", '[{"a": 1},\n\n{"a" 2}]', r"a\.json:3: not JSON"),
        ("a.json", '{"a": 1}', r"a\.json:1: a list of rows is needed, got \{'a': 1\}"),
        ("a.json", '[{"a": 1},\n3]', r"a\.json:2: an object with named fields is needed, got 3"),
        ("a.csv", 'a,b\n1,2\n"3,4\n', r"a\.csv:3: not a row of a table"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: 1 cells, but the heading has 2"),
        ("a.csv", "a,b\n", r"task\.data_dir .*a\.csv has no row"),
        ("a.csv", "", r"has no row"),
        ("a.jsonl", "\n", r"has no row"),
        ("a.txt", "text", r"a\.txt: a file that ends in \.jsonl, \.json, \.csv or \.tsv"),
    ],
)
def test_bad_files_name_the_line(write: Write, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(name, text), "task.data_dir")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes('"é"'.encode("latin-1"))
    with pytest.raises(DataError, match=r"task\.data_dir .*latin\.json: byte 1 is not UTF-8"):
        read_json(tmp_path / "latin.json", "task.data_dir")
    whole = gzip.compress(b"[]" * 100)
    for number, data in enumerate((b"[]", whole[:-4], whole[:12] + b"\xff" + whole[13:])):
        (tmp_path / f"{number}.json.gz").write_bytes(data)
        with pytest.raises(DataError, match=rf"{number}\.json\.gz: not a whole gzip file .*download it again"):
            read_json(tmp_path / f"{number}.json.gz", "task.data_dir")
    with pytest.raises(DataError, match=r"none\.json': No such file or directory; give the path of a readable file"):
        read_json(tmp_path / "none.json", "task.data_dir")


def test_the_first_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    for name in ("train.jsonl", "RTE/val.jsonl.gz"):
        (tmp_path / name).touch()
    assert local_file(str(tmp_path), ["RTE/train.jsonl", "train.jsonl"]) == tmp_path / "train.jsonl"
    assert local_file(str(tmp_path), ["RTE/val.jsonl"]) == tmp_path / "RTE/val.jsonl.gz"
    with pytest.raises(DataError, match=r"task\.data_dir '.*' has none of a\.json, b\.json .* give the folder"):
        local_file(str(tmp_path), ["a.json", "b.json"])
    with pytest.raises(DataError, match=r"task\.data_dir '/nowhere' has none of a\.json"):
        local_file("/nowhere", ["a.json"])


def test_rows_of_the_hub_are_numbered_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        import datasets

        return datasets.Dataset.from_list([{"a": "x", "b": [1]}, {"a": "y", "b": [2, 3]}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    rows = hub_rows("aps/super_glue", "rte", "validation", "refs/convert/parquet")
    assert rows == [
        Row("aps/super_glue/rte/validation:1", {"a": "x", "b": [1]}),
        Row("aps/super_glue/rte/validation:2", {"a": "y", "b": [2, 3]}),
    ]
    assert asked == [(("aps/super_glue", "rte"), {"split": "validation", "revision": "refs/convert/parquet"})]
    assert hub_rows("google/boolq", None, "train", None)[0].id == "google/boolq/train:1"


def dataset_error(text: str) -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    return DatasetNotFoundError(text)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            ConnectionError("Couldn't reach 'o/d' on the Hub (OfflineModeIsEnabled)"),
            r"HF_HUB_OFFLINE is set .*unset it",
        ),
        (ConnectionError("Couldn't reach 'o/d' on the Hub (ConnectError)"), "try again with network"),
        (
            dataset_error("Dataset 'o/d' is a gated dataset on the Hub. You must be authenticated to access it."),
            r"accept its terms at https://huggingface\.co/datasets/o/d and log in with `hf auth login`",
        ),
        (dataset_error("Dataset 'o/d' doesn't exist on the Hub or cannot be accessed."), "log in with `hf auth login`"),
        (
            ValueError("Unknown split \"dev\". Should be one of ['train']."),
            r"Should be one of .*one that has split dev",
        ),
        (ValueError("BuilderConfig 'c' not found. Available: ['b']"), r"Available: \['b'\].* has configuration c"),
        (RuntimeError("Dataset scripts are no longer supported, but found d.py"), "revision to refs/convert/parquet"),
        (OSError("the disk\nis full\n" + 300 * "x"), r"OSError: the disk is full x+\.\.\.\): try again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=rf"split dev of o/d cannot be had from the hub .*{advice}") as caught:
        hub_rows("o/d", "c", "dev", None)
    assert "\n" not in str(caught.value)
    assert "or set task.data_dir to a folder with the files of its original release" in str(caught.value)


def test_the_library_itself_offline() -> None:
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set and the data set is not in the cache"):
        hub_rows("lorasc/none", None, "train", None)


def test_counts_of_the_real_files(shared_data: Path) -> None:
    counts = {
        "gsm8k/train.jsonl": 7473, "gsm8k/test.jsonl": 1319, "alpaca/random_9k.json": 9229,
        "superglue/RTE/train.jsonl": 2490, "superglue/RTE/val.jsonl": 277,
        "superglue/CB/train.jsonl": 250, "superglue/CB/val.jsonl": 56,
        "superglue/COPA/train.jsonl": 400, "superglue/COPA/val.jsonl": 100,
        "superglue/WSC/train.jsonl": 554, "superglue/WSC/val.jsonl": 104, "superglue/BoolQ/val.jsonl": 3270,
        "superglue/fewglue32/BoolQ/train.jsonl": 32, "superglue/fewglue32/BoolQ/dev32.jsonl": 32,
        "superglue/fewglue32/ReCoRD/train.jsonl": 32, "superglue/fewglue32/ReCoRD/dev32.jsonl": 32,
        "drop/drop_v0_dev.jsonl.gz": 9536, "humaneval/HumanEval.jsonl.gz": 164,
        "mmlu/dev/anatomy_dev.csv": 5, "mmlu/dev/abstract_algebra_dev.csv": 5,
        "mmlu/dev/high_school_us_history_dev.csv": 5,
    }  # fmt: skip
    assert {name: len(read_rows(shared_data / name, "key")) for name in counts} == counts


def test_the_line_of_every_row_of_a_real_json(shared_data: Path) -> None:
    """Read by another way: the text from a row's line on begins with that row."""
    path = shared_data / "alpaca" / "random_9k.json"
    lines = path.read_text().split("\n")
    rows = read_rows(path, "key")
    for row in [*rows[:50], *rows[-50:]]:
        at = int(row.id.rpartition(":")[2]) - 1
        text = "\n".join(lines[at : at + 60]).lstrip()
        assert json.JSONDecoder().raw_decode(text)[0] == row.fields
