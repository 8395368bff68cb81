from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import time
import tracemalloc
import types
import zipfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manylora.data.readers import read_rows
from manylora.data.readers.file import ENDINGS, read_file
from manylora.data.readers.json_list import json_list
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


def zipped(data: bytes, name: str = "rows.jsonl") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zip": zipped}


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize("compressed", PACK)
def test_every_format_gives_the_same_rows_compressed_or_not(write, ending, compressed):
    data = contents(f"rows.{ending}").encode()
    data = zipped(data, f"rows.{ending}") if compressed == ".zip" else PACK[compressed](data)
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
    "an open quote names the line where its record starts": ("a.csv", 'a,b\n1,2\n1,"2\n3,4\n', ":3: broken CSV"),
    "a quote within a quoted field is refused": ("a.csv", 'a,b\n1,"say "hi" x"\n', ":2: broken CSV"),
    "a blank line where the header should stand is refused": ("a.csv", "\na,b\n1,2\n", ":1: the first line is blank"),
    "a header that is no UTF-8 is refused": ("a.csv", b"a,caf\xe9\n1,2\n", ":1: byte 0xe9"),
    "a carriage return within a field is refused": ("a.csv", "a,b\n1\r1,2\n", ":2: broken CSV"),
    "lines that end as on old Macs are refused": ("a.csv", "a,b\r1,2\r", "carriage returns alone"),
    "UTF-16 is named": ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16"),
    "UTF-16 without a mark is named": ("a.csv", "text,label\n".encode("utf-16-le"), "is UTF-16"),
    "UTF-16 that begins with its high bytes is named": ("a.json", '[{"a": 1}]'.encode("utf-16-be"), "is UTF-16"),
    "UTF-32 is named": ("a.txt", "text".encode("utf-32"), "is UTF-32"),
    "a JSON list without its end is refused": ("a.json", '[{"a": 1},\n{"a": 2}', ":2: broken JSON at character 9"),
    "a comma before the end is refused": ("a.json", '[{"a": 1},\n]', ":2: broken JSON at character 1"),
    "text after a JSON list is refused": ("a.json", '[{"a": 1}]\n[]', ":2: broken JSON at character 1: Extra data"),
    "data that stands twice is refused": (
        "a.json",
        '{"data": [{}],\n "data": [{}]}',
        ":2: broken JSON at character 10",
    ),
    "an object in JSON without a comma is refused": ("a.json", '{"a": 1 "b": 2}', ":1: broken JSON at character 9"),
    "an object in JSON without a colon is refused": ("a.json", '{"a" 1}', ":1: broken JSON at character 6"),
    "an object in JSON without quotes is refused": ("a.json", "{a: 1}", ":1: broken JSON at character 2"),
    "a JSON file with one string is refused": ("a.json", '"a"', "holds one string"),
    "a JSON file with one empty object is refused": ("a.json", "{}", "holds one object"),
    "a JSON number beyond Python's limit is refused": (
        "a.json",
        f'[{{"a": 1{"0" * 5000}}}]',
        ":1: JSON that cannot be",
    ),
    "JSON nested without end is refused": ("a.json", "[" + "[" * 200_000, "recursion"),
    "a sentence of one column is refused": ("a.conll", "a\nb\n", ":1: 1 column where a token and its tag"),
    "an empty CoNLL file is refused": ("a.conll", "-DOCSTART- -X- O O\n\n# id = 3\n\n", "holds no rows"),
    "a parquet file that is none is refused": ("a.parquet", b"PAR1 and more", "not a whole parquet file"),
    "an empty parquet file is refused": ("a.parquet", b"", "not a whole parquet file"),
    "an arrow file that is none is refused": ("a.arrow", b"ARROW1 and more", "not a whole arrow file"),
    "a cut bz2 is refused": ("a.jsonl.bz2", bz2.compress(b'{"a": 1}' * 50)[:-9], "not a whole bz2 file"),
    "a cut zip is refused": ("a.jsonl.zip", zipped(b'{"a": 1}' * 50)[:-30], "not a whole zip file"),
    "a packed file must say what is inside": ("rows.gz", gzip.compress(b"{}"), "no file ending before .gz"),
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


def read_all(path):
    """Every row of a file, also those with a fault: (line, values or the fault's kind)."""
    return [(row.line, row.fault.kind if row.fault else dict(row.values)) for row in read_file(path)]


LAST = {"tokens": ["d"], "tags": ["O"]}
BAD_LINES = {
    "broken JSON": ("a.jsonl", '{"a": 1}\n{"a": }\n{"a": 3}\n', [(1, {"a": 1}), (2, "broken JSON"), (3, {"a": 3})]),
    "a torn last line": ("a.jsonl", '{"a": 1}\n{"a": "x', [(1, {"a": 1}), (2, "broken JSON")]),
    "a NUL byte in a JSON string": ("a.jsonl", '{"a": "x\0"}\n{"a": 2}', [(1, "broken JSON"), (2, {"a": 2})]),
    "a line of NUL bytes": ("a.jsonl", b'{"a": 1}\n\0\0\0\0\n', [(1, {"a": 1}), (2, "broken JSON")]),
    "a number beyond Python's limit": ("a.jsonl", f'{{"a": {"1" * 5000}}}\n{{}}', [(1, "broken JSON"), (2, {})]),
    "JSON nested without end": ("a.jsonl", "[" * 200_000 + "\n{}", [(1, "broken JSON"), (2, {})]),
    "a line that is no object": ("a.jsonl", '[1]\n"x"\n{"a": 1}', [(1, "no object"), (2, "no object"), (3, {"a": 1})]),
    "a key given twice": ("a.jsonl", '{"a": 1, "a": 2}\n{"a": {"b": 1, "b": 1}}\n{}',
                          [(1, "key given twice"), (2, "key given twice"), (3, {})]),
    "half of a surrogate pair": ("a.jsonl", r'{"a": "\ud83d"}' + "\n" + r'{"a": "\ud83d\ude00 \\ud83d"}',
                                 [(1, "half a character"), (2, {"a": "\U0001f600 \\ud83d"})]),
    "bytes that are not UTF-8": ("a.jsonl", b'{"a": "\xe9"}\n{"a": "\xc3\xa9"}',
                                 [(1, "not UTF-8"), (2, {"a": "\xe9"})]),
    "the same in a list": ("a.json", b'[{"a": "\xc3\xa9"},\n{"a": "\xe9"},\n{"a": 2}]',
                           [(1, {"a": "\xe9"}), (2, "not UTF-8"), (3, {"a": 2})]),
    "the same in a CSV record of several lines": ("a.csv", b'a,b\n"1\n\xe9",2\n3,4',
                                                  [(3, "not UTF-8"), (4, {"a": "3", "b": "4"})]),
    "the same in a paragraph": ("a.txt", b"one\n\xe9\n\ntwo", [(2, "not UTF-8"), (4, {"text": "two"})]),
    "the same in a sentence": ("a.conll", b"a O\n\xe9 O\n\nd O", [(2, "not UTF-8"), (4, LAST)]),
    "items of a list that are no rows": ("a.json", '[3,\n{"a": 1, "a": 1},\n{"a": "\\udc00"},\n{}]',
                                         [(1, "no object"), (2, "key given twice"), (3, "half a character"), (4, {})]),
    "too many CSV fields": ("a.csv", 'a,b\n1,2,3\n"x\ny",4\n',
                            [(2, "wrong number of fields"), (3, {"a": "x\ny", "b": "4"})]),
    "too few CSV fields": ("a.tsv", "a\tb\n1\n\n3\t4\n", [(2, "wrong number of fields"), (4, {"a": "3", "b": "4"})]),
    "a column too many in a sentence": ("a.conll", "a O\nb X O\nc O\n\nd O",
                                        [(2, "wrong number of fields"), (5, LAST)]),
    "a tag that is empty": ("a.conll", "a\tO\nb\t\n\nd\tO", [(2, "empty column"), (4, LAST)]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_one_bad_row_and_reading_goes_on(write, name):
    file, content, expected = BAD_LINES[name]
    assert read_all(write(file, content)) == expected


def test_reading_into_a_list_stops_at_the_first_fault_and_counts_its_like(write):
    with pytest.raises(DataError, match=r"a.jsonl:2: broken JSON at character 1.*\(the same in 2 of 4 rows\)"):
        read_rows(write("a.jsonl", "{}\nx\n[]\nx"))


def test_a_column_that_a_later_row_lacks_is_that_rows_fault(write):
    with pytest.raises(DataError, match=r"a.jsonl:2: .* 'question', a column that this row lacks") as caught:
        read_rows(write("a.jsonl", '{"question": 1}\n{"quetsion": 1}'), columns={"prompt": "question"})
    assert caught.value.nearest == ("quetsion",)


def test_values_stay_what_the_file_says(write):
    dates = '{"at": "2020-01-01 00:00:00", "n": "001", "x": "NA", "big": 12345678901234567890123, "f": 1.0}'
    assert read_rows(write("a.jsonl", dates))[0].values == json.loads(dates)
    assert read_rows(write("a.json", f"[{dates}]"))[0].values == json.loads(dates)
    rows = read_rows(write("a.csv", 'a,b,c,d\nNA,null,001,\n"",nan,1e5,2020-01-01\n'))
    assert rows[0].values == {"a": "NA", "b": "null", "c": "001", "d": ""}
    assert rows[1].values == {"a": "", "b": "nan", "c": "1e5", "d": "2020-01-01"}


@pytest.mark.parametrize("form", ["a.jsonl", "a.json"])
def test_keys_of_one_row_do_not_appear_in_another(write, form):
    calls = [{"arguments": {"city": "Paris"}}, {"arguments": {"x": [1, "a", None]}}]
    text = "\n".join(map(json.dumps, calls)) if form == "a.jsonl" else json.dumps(calls)
    assert [row.values for row in read_rows(write(form, text))] == calls


def test_marks_line_ends_and_separators_of_unicode_are_kept_out_of_or_in_the_values(write):
    marked = b"\xef\xbb\xbf"
    for name, text in {
        "a.jsonl": '{"text": "x\u2028\x85y"}\r\n',
        "a.json": '[{"text": "x\u2028\x85y"}\r\n]',
        "a.csv": "text\r\nx\u2028\x85y\r\n",
        "a.txt": "x\u2028\x85y\r\n",
    }.items():
        assert read_all(write(name, marked + text.encode()))[0][1] == {"text": "x\u2028\x85y"}
    assert read_all(write("a.conll", marked + "x\xa0y O\r\n\r\n".encode())) == [(1, {"tokens": ["x"], "tags": ["O"]})]
    assert read_all(write("b.csv", 'a\r\n"1\r\n2"\r\n\0')) == [(2, {"a": "1\r\n2"}), (4, {"a": "\0"})]


def test_conll_takes_the_first_column_and_the_last_and_leaves_comments_out(write):
    text = "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n# text = a b\n# new\na X Y O\n\n\n"
    assert read_all(write("a.conll", text)) == [
        (3, {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}),
        (8, {"tokens": ["a"], "tags": ["O"]}),
    ]
    tabs = "# 1 O\n#\tO\nNew York\tB-place\n"
    assert read_all(write("a.bio", tabs)) == [(2, {"tokens": ["#", "New York"], "tags": ["O", "B-place"]})]


def test_a_hash_that_is_a_token_of_a_sentence_is_no_comment(write):
    assert read_all(write("a.iob", "# O\n1 O\n# O\n")) == [(1, {"tokens": ["#", "1", "#"], "tags": ["O", "O", "O"]})]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def json_rows(data: bytes, chunk: int, monkeypatch):
    monkeypatch.setattr("manylora.data.readers.json_list.CHUNK_BYTES", chunk)
    return [(row.line, row.values) for row in json_list(io.BufferedReader(io.BytesIO(data)), "a.json")]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    items=st.lists(st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3), max_size=4),
    chunk=st.integers(1, 40), indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), wrapped=st.booleans(),
)  # fmt: skip
def test_a_list_read_in_pieces_equals_the_list_read_at_once(monkeypatch, items, chunk, indent, ascii_only, wrapped):
    items = json.loads(json.dumps(items))
    whole = {"n": -1.5e-3, "data": items, "end": [True]} if wrapped else items
    data = json.dumps(whole, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert [values for _, values in json_rows(data, chunk, monkeypatch)] == items


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunk=st.integers(1, 40), place=st.integers(0, 60), sign=st.sampled_from('"{}[]:,x1 \n\\'))
def test_a_broken_list_read_in_pieces_is_refused_as_at_once_with_the_same_place(monkeypatch, chunk, place, sign):
    text = '[{"a": "b\\u00e9", "c": [1.5, true]},\n {"d": null, "e": "f"},\n {}]'
    text = text[:place] + sign + text[place:]
    expected, broken = None, None
    try:
        expected = json.loads(text)
    except json.JSONDecodeError as error:
        broken = f"a.json:{error.lineno}: broken JSON at character {error.colno}: "
    if broken:
        with pytest.raises(DataError, match=re.escape(broken)):
            json_rows(text.encode(), chunk, monkeypatch)
    elif isinstance(expected, list) and all(isinstance(item, dict) for item in expected):
        assert [values for _, values in json_rows(text.encode(), chunk, monkeypatch)] == expected


def test_what_was_read_before_the_damage_is_given(write):
    rows = read_file(write("a.json", '[{"a": 1},\n{"a": 2},\n{"a": b}]'))
    assert [next(rows).line, next(rows).line] == [1, 2]
    with pytest.raises(DataError, match=":3: broken JSON at character 7"):
        next(rows)


def test_a_zip_holds_one_data_file(tmp_path, write):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("__MACOSX/._rows.csv", b"\0")
        archive.mkdir("folder")
        archive.writestr("folder/rows.csv", "a\n1\n")
    assert [row.values for row in read_rows(path)] == [{"a": "1"}]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more.jsonl", "{}")
    with pytest.raises(DataError, match=r"holds 2 files \(folder/rows.csv, more.jsonl\)"):
        read_rows(path)


def test_zst_without_its_package_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match="pip install zstandard"):
        read_rows(write("a.jsonl.zst", b""))


class Frame:
    """What unpacks a frame of zstd, in the form of zlib."""

    def __init__(self):
        self._inner = zlib.decompressobj()

    def decompress(self, data):
        return self._inner.decompress(data)

    unused_data = property(lambda self: self._inner.unused_data)
    eof = property(lambda self: self._inner.eof)


@pytest.fixture(params=["compression.zstd", "zstandard"])
def zstd(monkeypatch, request):
    """Packs frames for a module that unpacks zstd, or for a stand-in of it where it is not installed."""
    for name in ("compression.zstd", "zstandard"):
        if name != request.param:
            monkeypatch.setitem(sys.modules, name, None)
    try:
        module = importlib.import_module(request.param)
        return module.compress if hasattr(module, "compress") else module.ZstdCompressor().compress
    except ImportError:
        frame = Frame if request.param == "compression.zstd" else lambda: types.SimpleNamespace(decompressobj=Frame)
        stand_in = types.SimpleNamespace(ZstdDecompressor=frame, ZstdError=zlib.error)
        monkeypatch.setitem(sys.modules, request.param, stand_in)
        return zlib.compress


def test_zst_is_read_through_all_its_frames_and_refused_where_it_is_cut(write, zstd):
    lines = [b"".join(b'{"a": %d}\n' % number for number in part) for part in (range(50_000), range(50_000, 50_003))]
    packed = b"".join(map(zstd, lines))
    assert [row.values["a"] for row in read_rows(write("a.jsonl.zst", packed))] == list(range(50_003))
    for bad in (packed[:-5], packed + b"no frame at all"):
        with pytest.raises(DataError, match="not a whole zst file"):
            read_rows(write("b.jsonl.zst", bad))


@pytest.fixture
def table():
    import datetime

    import pyarrow

    return pyarrow.table(
        {
            "text": ["a", "NA", None],
            "at": [datetime.datetime(2020, 1, 1), None, datetime.datetime(2021, 2, 3)],
            "tags": [[0, 1], [], None],
            "n": pyarrow.array([1, 2, 3], pyarrow.int8()),
        }
    )


@pytest.mark.parametrize("packed", ["", ".gz", ".zip"])
@pytest.mark.parametrize("form", ["a.parquet", "a.arrow", "b.arrow"])
def test_typed_files_give_the_values_that_they_hold(tmp_path, table, form, packed):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / form
    if form == "a.parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        make = pyarrow.ipc.new_file if form == "a.arrow" else pyarrow.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    if packed:
        data = path.read_bytes()
        path = tmp_path / f"{form}{packed}"
        path.write_bytes(zipped(data, form) if packed == ".zip" else PACK[packed](data))
    rows = read_rows(path)
    assert [row.values for row in rows] == table.to_pylist()
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[0].file == str(path)


def test_a_parquet_file_that_names_a_column_twice_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(DataError, match="names the column 'a' twice"):
        read_rows(path)


def test_every_ending_has_a_reader():
    assert all(callable(ENDINGS.get(ending)) for ending in ENDINGS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zip", "a.json", "a.csv", "a.txt", "a.conll"])
def test_a_large_file_is_read_fast_and_in_flat_memory(tmp_path, name):
    count = 1000 if name == "a.conll" else 30_000
    words = "word " * 200
    unit, head, end = {
        "jsonl": (json.dumps({"text": words}) + "\n", "", ""),
        "json": (json.dumps({"text": words}) + ",\n", "[", "{}]"),
        "csv": (f'"{words}",1\n', "text,label\n", ""),
        "txt": (f"{words}\n\n", "", ""),
        "conll": ("word\tO\n" * 140 + "\n", "", ""),
    }[name.split(".")[1]]  # fmt: skip
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.writelines([unit.encode()] * count)
    elif name.endswith(".zip"):
        path.write_bytes(zipped(unit.encode() * count))
    else:
        with path.open("w") as file:
            file.writelines([head, *[unit] * count, end])
    next(read_file(path))  # the reader is imported
    tracemalloc.start()
    start = time.process_time()
    try:
        assert sum(1 for _ in read_file(path)) == count + (name == "a.json")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000
    assert time.process_time() - start < 3


@pytest.mark.needs_data
def test_published_files_give_all_their_rows(shared_data):
    for name, count in {
        "wnut17/wnut17train.conll": 3394,
        "wnut17/emerging.dev.conll": 1009,
        "medquad/medquad_answered.jsonl.xz": 16_407,
        "scitldr/train.jsonl": 1992,
        "banking77/train.csv": 10_003,
        "banking77/test.csv": 3080,
        "gsm8k/train.jsonl": 7473,
        "instruct/instruction-data.json": 1100,
    }.items():
        assert sum(row.fault is None for row in read_file(shared_data / name)) == count
    with pytest.raises(DataError, match=r"'\.en' does not say how to read it"):
        read_rows(shared_data / "multi30k" / "train.en.gz")


@pytest.mark.needs_data
@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "kto_en_demo.json", "alpaca_en_demo.json"])
def test_published_lists_equal_what_json_reads(shared_data, name):
    path = shared_data / "formats" / name
    assert [row.values for row in read_rows(path)] == json.loads(path.read_text(encoding="utf-8"))
