from __future__ import annotations

import csv
import gzip
import json
import lzma

import pytest

from manylora.data.readers import read_rows
from manylora.errors import DataError, DataNotFound

ROWS = [{"prompt": "a\n", "completion": "b, \u2028 \u00e9"}, {"prompt": "c", "completion": 'say "d"\nagain'}]


def contents(name: str) -> str:
    match name.split(".")[1]:
        case "jsonl":
            return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"
        case "json":
            return json.dumps(ROWS, indent=2)
        case "csv" | "tsv" as ending:
            lines = [["prompt", "completion"], *([row["prompt"], row["completion"]] for row in ROWS)]
            separator = "," if ending == "csv" else "\t"
            return "".join(
                separator.join('"' + field.replace('"', '""') + '"' for field in line) + "\r\n" for line in lines
            )
    raise AssertionError(name)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("compressed", ["", ".gz", ".xz"])
def test_every_format_gives_the_same_rows_compressed_or_not(write, ending, compressed):
    data = contents(f"rows.{ending}").encode()
    data = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[compressed](data)
    rows = read_rows(write(f"rows.{ending}{compressed}", data))
    assert [dict(row.values) for row in rows] == ROWS


def test_a_row_knows_its_line_in_every_format(write):
    assert [row.line for row in read_rows(write("a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))] == [2, 4]
    assert [row.line for row in read_rows(write("a.json", '[\n {"a":\n  1},\n {"a": 2}, {"a": 3}\n]'))] == [2, 4, 4]
    nested = '{"version": {"data": [1]},\n "data": [\n{"a": "]"},\n\n{"a": 2}]\n, "end": 0}'
    assert [row.line for row in read_rows(write("b.json", nested))] == [3, 5]
    assert [row.line for row in read_rows(write("a.csv", 'a,b\n"1\n1",2\n\n3,4\n'))] == [2, 5]
    rows = read_rows(write("a.txt", "\n\none\ntwo\n \nthree"))
    assert [(row.line, row.values["text"]) for row in rows] == [(3, "one\ntwo"), (6, "three")]


def test_several_files_are_read_in_order(write):
    first, second = write("a.jsonl", '{"a": 1}'), write("b.csv", "a\n2\n")
    assert [row.where for row in read_rows([second, str(first)])] == [f"{second}:2", f"{first}:1"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(write):
    assert "a" in read_rows(write("a.csv", b"\xef\xbb\xbfa,b\n1,2\n"))[0].values


def test_columns_rename_and_take_the_old_name_away(write):
    path = write("a.jsonl", '{"question": "q", "answer": "a", "prompt": "old"}')
    rows = read_rows(path, columns={"prompt": "question", "completion": "answer"})
    assert dict(rows[0].values) == {"prompt": "q", "completion": "a"}


def test_columns_may_swap_names(write):
    rows = read_rows(write("a.jsonl", '{"a": 1, "b": 2}'), columns={"a": "b", "b": "a"})
    assert dict(rows[0].values) == {"a": 2, "b": 1}


def test_an_unknown_column_is_answered_with_near_names(write):
    path = write("a.jsonl", '{"question": "q"}\n{"question": "r"}')
    with pytest.raises(DataError) as caught:
        read_rows(path, columns={"prompt": "quetsion"})
    assert f"{path}:1" in str(caught.value)
    assert caught.value.nearest == ("question",)


BROKEN = {
    "broken JSON names line and character": ("a.jsonl", '{"a": 1}\n{"a": 1, b}', ":2: broken JSON at character 10"),
    "a JSONL line that is a list is refused": ("a.jsonl", "[1]", ":1: a list where a row is expected"),
    "a broken JSON file names line and character": (
        "a.json",
        '[{"a": 1},\n {"a" 2}]',
        ":2: broken JSON at character 7",
    ),
    "JSON Lines under .json get the hint": ("a.json", '{"a": 1}\n{"a": 2}', "name the file .jsonl"),
    "a JSON list of numbers is refused": ("a.json", '[{"a": 1},\n 3]', ":2: a number where a row"),
    "a JSON file without a list is refused": ("a.json", '{"rows": []}', "holds one object"),
    "an empty JSONL is refused": ("a.jsonl", " \n\n", "holds no rows"),
    "an empty JSON is refused": ("a.json", "", "holds no rows"),
    "an empty JSON list is refused": ("a.json", "[]", "holds no rows"),
    "a header alone is refused": ("a.csv", "a,b\n", "holds no rows"),
    "an empty CSV is refused": ("a.csv", "", "holds no rows"),
    "an empty text is refused": ("a.txt", "\n \n", "holds no rows"),
    "bad UTF-8 names the line": ("a.txt", b"good\ncaf\xe9\n", ":2: byte 0xe9 is not valid UTF-8"),
    "too many CSV fields name the line": ("a.csv", "a,b\n1,2\n1,2,3\n", ":3: 3 fields where the header has 2"),
    "too few CSV fields name the line": ("a.csv", "a,b\n\n1\n", ":3: 1 fields where the header has 2"),
    "an open quote is refused": ("a.csv", 'a,b\n1,"2\n', "broken CSV"),
    "a column named twice is refused": ("a.csv", "a,a\n1,2\n", "names the column 'a' twice"),
    "a column without a name is refused": ("a.csv", "a,\n1,2\n", "has no name"),
    "an unknown ending names those that are known": ("a.jsnl", "x", ".jsonl"),
    "no ending is refused": ("rows", "x", "no file ending"),
    "a cut gz is refused": ("a.jsonl.gz", gzip.compress(b'{"a": 1}')[:-6], "not a whole gz file"),
    "a gz that is none is refused": ("a.jsonl.gz", b"plain", "not a whole gz file"),
    "a cut xz is refused": ("a.jsonl.xz", lzma.compress(b'{"a": 1}' * 50)[:-20], "holds no rows|not a whole xz file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_refused(write, name):
    file, content, message = BROKEN[name]
    path = write(file, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)
    assert any(part in str(caught.value) for part in message.split("|"))


def test_a_missing_file_is_answered_with_near_names_of_its_folder(write):
    path = write("train.jsonl", "{}")
    with pytest.raises(DataNotFound) as caught:
        read_rows(path.parent / "trian.jsonl")
    assert caught.value.nearest == ("train.jsonl",)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_missing_folder_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(DataNotFound, match="does not exist"):
        read_rows(tmp_path / "no" / "train.jsonl")
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(DataNotFound, match="is a folder"):
        read_rows(tmp_path / "rows.json")
    with pytest.raises(DataError, match="no data file is given"):
        read_rows([])


def test_a_long_csv_field_is_read_and_the_global_limit_stays(write):
    before = csv.field_size_limit()
    assert len(read_rows(write("a.csv", "a,b\n" + "x" * 200_000 + ",y\n"))[0].values["a"]) == 200_000
    assert csv.field_size_limit() == before
