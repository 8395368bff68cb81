from __future__ import annotations

import gzip
import json
from collections import UserDict

import pytest

from manylora.data.sources import open_source, splits_of
from manylora.errors import DataError, DataNotFound


def values(source):
    return [dict(row.values) for row in source.rows()]


@pytest.fixture
def folder(tmp_path):
    """Makes a folder of one-row files, each of which holds its own name."""

    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f"text\n{name}" if ".csv" in name else json.dumps({"text": name})
            text = f"[{text}]" if ".json" in path.suffixes else text
            path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return tmp_path

    return make


def names_in(source):
    return [row["text"] for row in values(source)]


def test_a_file_is_read_again_each_time_that_it_is_asked(write):
    source = open_source(str(write("a.jsonl", '{"a": 1}\n{"a": 2}')))
    assert values(source) == values(source) == [{"a": 1}, {"a": 2}]
    assert source.num_rows is None
    assert source.name.endswith("a.jsonl")


def test_rows_are_given_before_the_rest_of_the_file_is_read(write):
    rows = open_source(write("a.json", '[{"a": 1}, {"a": 2}, 0')).rows()
    assert next(rows).values == {"a": 1}


def test_a_digest_follows_the_content_and_not_the_name(write):
    digests = [
        open_source(write(name, text)).digest() for name, text in (("a.csv", "1"), ("b.csv", "1"), ("c.csv", "2"))
    ]
    assert digests[0] == digests[1] != digests[2]
    assert digests[0].startswith("sha256:")
    assert len(digests[0]) == 7 + 64


def test_the_digest_of_a_folder_follows_every_file_and_their_order(folder):
    place = folder("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl")
    before = open_source(place).digest()
    first, second = sorted(place.iterdir())
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])
    assert open_source(place).digest() != before
    first.write_text(texts[0])
    second.write_text(texts[1])
    assert open_source(place).digest() == before


def test_what_is_wrong_with_a_place_is_said_when_it_is_opened(write, tmp_path):
    write("train.jsonl", "{}")
    with pytest.raises(DataNotFound) as caught:
        open_source(tmp_path / "trian.jsonl")
    assert caught.value.nearest == ("train.jsonl",)
    with pytest.raises(DataError, match=r"'\.jsom' does not say how to read it"):
        open_source(write("a.jsom", "{}"))
    with pytest.raises(DataError, match="is a file, which has no splits"):
        open_source(tmp_path / "train.jsonl", split="train")
    with pytest.raises(DataNotFound, match="hub:owner/name"):
        open_source("owner/name")
    with pytest.raises(DataError, match="only data sets on the hub have subsets"):
        open_source(tmp_path / "train.jsonl", subset="main")


@pytest.mark.parametrize("split", ["valid", "validation", "dev", "val", "eval"])
@pytest.mark.parametrize(
    "name", ["valid.jsonl", "validation.csv.gz", "dev.jsonl", "eval-00000-of-00001.json", "val/a.csv"]
)
def test_every_name_of_the_validation_split_finds_it(folder, name, split):
    place = folder("train.jsonl", name)
    assert splits_of(place) == ("train", "valid")
    assert names_in(open_source(place, split=split)) == [name]
    assert names_in(open_source(place)) == ["train.jsonl"]


def test_splits_are_listed_in_their_usual_order_and_other_files_are_none(folder):
    place = folder(
        "test.csv", "dev.jsonl", "labels.jsonl", "trainer.jsonl", ".train.jsonl", "train/x.md", "a-train.csv"
    )
    assert splits_of(place) == ("valid", "test")
    with pytest.raises(DataNotFound, match="has no split 'train'") as caught:
        open_source(place)
    assert caught.value.allowed == "valid, test"


def test_all_shards_of_a_split_are_read_in_order(folder):
    names = [f"train-{place:05}-of-00011.jsonl" for place in range(11)]
    assert names_in(open_source(folder(*reversed(names), "test.jsonl"))) == names


def test_a_shard_that_lacks_is_no_smaller_data_set(folder):
    with pytest.raises(DataError, match=r"holds 2 of the 4 shards of 'train'; the first that lack: 1, 3"):
        open_source(folder("train-00000-of-00004.jsonl", "train-00002-of-00004.jsonl"))


@pytest.mark.parametrize("other", ["train.csv", "train/a.jsonl", "train-00000-of-00001.jsonl", "train.jsonl.gz"])
def test_a_split_that_is_there_twice_is_refused(folder, other):
    with pytest.raises(DataError, match="holds the split 'train' more than once"):
        open_source(folder("train.jsonl", other))


def test_of_two_names_for_a_split_the_one_that_is_asked_for_is_taken(folder):
    place = folder("dev.jsonl", "validation.jsonl")
    assert names_in(open_source(place, split="dev")) == ["dev.jsonl"]
    with pytest.raises(DataError, match="more than once"):
        open_source(place, split="valid")


def test_a_folder_without_splits_is_all_its_files_of_one_kind(folder):
    place = folder("b.jsonl", "a.ndjson", "README.md")
    assert splits_of(place) == ()
    assert names_in(open_source(place)) == names_in(open_source(place, split="train")) == ["a.ndjson", "b.jsonl"]
    with pytest.raises(DataNotFound, match="has no split 'valid': no file or folder in it is named after a split"):
        open_source(place, split="valid")
    with pytest.raises(DataError, match=r"several kinds .*: a.ndjson, b.jsonl, c.csv"):
        open_source(folder("c.csv"))


def test_a_folder_of_the_hub_is_read_through_its_data_folder(folder):
    place = folder("README.md", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    assert splits_of(place) == ("train", "test")
    assert names_in(open_source(place, split="test")) == ["data/test-00000-of-00001.jsonl"]


def test_a_folder_without_data_says_what_it_holds(folder):
    with pytest.raises(DataNotFound, match=r"holds no data file \(it holds README.md\)"):
        open_source(folder("README.md"))
    with pytest.raises(DataNotFound, match="there is no folder"):
        splits_of(folder() / "none")


def test_columns_are_renamed_in_every_source(write):
    rows = [{"q": "1", "a": "2"}]
    for place in (write("a.csv", "q,a\n1,2\n"), rows, hf(rows)):
        assert values(open_source(place, columns={"prompt": "q"})) == [{"a": "2", "prompt": "1"}]


def test_a_column_that_the_first_row_lacks_is_refused_and_one_that_a_later_row_lacks_is_its_fault(write):
    source = open_source(write("a.jsonl", 'x\n{"q": 1}\n{"p": 1}\n{"q": 2}'), columns={"prompt": "q"})
    rows = list(source.rows())
    assert [row.fault and row.fault.kind for row in rows] == ["broken JSON", None, "no column", None]
    source = open_source([{"question": 1}], columns={"prompt": "quetsion"})
    with pytest.raises(DataError, match=r"a list:1: .*'quetsion', a column that this row lacks") as caught:
        next(source.rows())
    assert caught.value.nearest == ("question",)


class ByPlace:
    """As data sets of torch are: a length, and items that do not end with IndexError."""

    def __init__(self, length, given=None):
        self.length, self.given = length, given

    def __len__(self):
        return self.length

    def __getitem__(self, place):
        if self.given is not None and place >= self.given:
            raise IndexError(place)
        return {"text": str(place)}


class Counted(list):
    """A list that says another length than it has."""

    said = 0

    def __len__(self):
        return self.said


def test_items_are_rows_numbered_from_one():
    source = open_source([{"a": 1}, UserDict(a=2)])
    assert [(row.file, row.line, dict(row.values)) for row in source.rows()] == [
        ("a list", 1, {"a": 1}),
        ("a list", 2, {"a": 2}),
    ]
    assert (source.num_rows, source.digest()) == (2, None)


def test_a_torch_dataset_is_read_to_its_length():
    from torch.utils.data import Dataset

    class Torch(ByPlace, Dataset):
        pass

    source = open_source(Torch(3))
    assert source.name == "a Torch"
    assert values(source) == values(source) == [{"text": "0"}, {"text": "1"}, {"text": "2"}]


def test_an_item_that_is_no_mapping_is_a_fault_that_says_what_it_is():
    import torch
    from torch.utils.data import TensorDataset

    (row,) = open_source(TensorDataset(torch.zeros(1, 2))).rows()
    assert (row.where, row.fault.kind, row.fault.what) == (
        "a TensorDataset:1",
        "no mapping",
        "a tuple where a row is expected",
    )
    assert [row.fault is None for row in open_source([{}, "x", {}]).rows()] == [True, False, True]


def test_a_length_that_is_not_true_is_refused_with_both_numbers():
    with pytest.raises(DataError, match="says that it has 5 items and gives 2"):
        values(open_source(ByPlace(5, given=2)))
    items = Counted([{"a": 1}] * 3)
    for items.said, given in ((4, "3"), (2, "at least 3")):
        with pytest.raises(DataError, match=f"says that it has {items.said} items and gives {given}"):
            values(open_source(items))


def test_a_generator_is_read_once():
    source = open_source({"a": number} for number in range(3))
    assert source.num_rows is None
    assert len(values(source)) == 3
    with pytest.raises(DataError, match="can be read only once, and has been") as caught:
        next(source.rows())
    assert "pass a list" in caught.value.next_step


def test_an_iterable_that_begins_anew_is_read_again():
    class Anew:
        def __iter__(self):
            return iter([{"a": 1}])

    source = open_source(Anew())
    assert values(source) == values(source) == [{"a": 1}]


def test_things_that_hold_no_rows_are_refused():
    import pandas

    for place, message in (
        ({"a": [1]}, "a dict where rows"),
        (3, "an int where rows"),
        (None, "a NoneType where rows"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(place)
    with pytest.raises(DataError, match="a DataFrame where rows") as caught:
        open_source(pandas.DataFrame({"a": [1]}))
    assert 'to_dict("records")' in caught.value.next_step
    with pytest.raises(DataError, match="a list has no splits"):
        open_source([{}], split="train")
    with pytest.raises(DataError, match="a list holds no rows"):
        values(open_source([]))


def hf(rows, **kinds):
    from datasets import Dataset

    return Dataset.from_list(rows, **kinds)


@pytest.fixture
def labelled():
    from datasets import ClassLabel, Features, List, Value

    tags = ClassLabel(names=["O", "B"])
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["no", "yes"]),
            "tags": List(tags),
            "deep": List({"tag": tags, "n": Value("int8")}),
            "one": {"tags": List(List(tags))},
        }
    )
    rows = [
        {"text": "a", "label": 1, "tags": [0, 1], "deep": [{"tag": 1, "n": 1}], "one": {"tags": [[1], []]}},
        {"text": None, "label": None, "tags": [], "deep": None, "one": {"tags": None}},
    ]
    return hf(rows, features=features)


NAMED = [
    {"text": "a", "label": "yes", "tags": ["O", "B"], "deep": [{"tag": "B", "n": 1}], "one": {"tags": [["B"], []]}},
    {"text": None, "label": None, "tags": [], "deep": None, "one": {"tags": None}},
]


def test_class_labels_become_their_names_however_they_are_stored(labelled, tmp_path):
    labelled.to_parquet(tmp_path / "a.parquet")
    labelled.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for place in (labelled, labelled.to_iterable_dataset(), tmp_path / "a.parquet", tmp_path / "saved", arrow):
        assert values(open_source(place)) == NAMED
    assert open_source(tmp_path / "a.parquet").num_rows == open_source(tmp_path / "saved").num_rows == 2


def test_a_label_without_a_name_is_that_rows_fault(labelled):
    from datasets import ClassLabel, Features

    source = open_source(
        hf([{"label": 1}, {"label": -1}], features=Features({"label": ClassLabel(names=["no", "yes"])}))
    )
    rows = list(source.rows())
    assert rows[0].values == {"label": "yes"}
    assert (rows[1].fault.kind, rows[1].fault.allowed) == ("label without a name", "no, yes")
    assert "column 'label': the label -1 has no name" in rows[1].fault.what


def test_a_dataset_shown_as_tensors_gives_plain_values_and_a_transform_is_kept():
    dataset = hf([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}])
    assert values(open_source(dataset.with_format("numpy", columns=["a"]))) == [{"a": 1}, {"a": 2}]
    transformed = dataset.with_transform(lambda batch: {"c": [10 * a for a in batch["a"]]})
    assert values(open_source(transformed)) == [{"c": 10}, {"c": 20}]


def test_a_saved_dataset_is_read_by_split_and_its_digest_follows_its_content(tmp_path):
    from datasets import DatasetDict

    splits = DatasetDict({"train": hf([{"a": 1}, {"a": 2}]), "validation": hf([{"a": 3}]), "extra": hf([{"a": 4}])})
    splits.save_to_disk(tmp_path / "one")
    splits.save_to_disk(tmp_path / "same")
    assert splits_of(tmp_path / "one") == ("train", "valid", "extra")
    for place in (tmp_path / "one", splits):
        assert values(open_source(place)) == [{"a": 1}, {"a": 2}]
        assert values(open_source(place, split="dev")) == [{"a": 3}]
        assert values(open_source(place, split="extra")) == [{"a": 4}]
        with pytest.raises(DataNotFound, match="has no split 'test'"):
            open_source(place, split="test")
    digests = [open_source(tmp_path / name, split=split).digest() for name, split in
               (("one", "train"), ("same", "train"), ("one", "valid"))]  # fmt: skip
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(DataNotFound, match="is one data set without splits"):
        open_source(tmp_path / "one" / "train", split="test")


def test_a_saved_dataset_that_is_damaged_is_refused(tmp_path):
    hf([{"a": 1}]).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(DataError, match="is not a whole saved data set"):
        open_source(tmp_path / "saved")


def test_an_object_of_datasets_is_known_by_its_fingerprint_where_it_has_one():
    dataset = hf([{"a": 1}])
    assert open_source(dataset).digest() == f"fingerprint:{dataset._fingerprint}"
    assert open_source(dataset).num_rows == 1
    stream = open_source(dataset.to_iterable_dataset())
    assert (stream.digest(), stream.num_rows) == (None, None)
    assert values(stream) == values(stream) == [{"a": 1}]


def test_the_hub_is_asked_for_the_subset_and_for_the_split_under_its_other_names(monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        if split != "validation":
            raise ValueError(f'Unknown split "{split}". Should be one of ["train", "validation"].')
        return hf([{"a": 1}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = open_source("hub:owner/name", split="dev", subset="main")
    assert source.name == "hub:owner/name (main) [dev]"
    assert values(source) == [{"a": 1}]
    assert source.digest().startswith("fingerprint:")
    assert asked[0] == ("owner/name", "main", "dev")
    assert asked[-1][2] == "validation"
    with pytest.raises(DataNotFound, match=r"the split 'test' could not be had: Unknown split \"test\""):
        open_source("hub:owner/name", split="test")


def test_a_dataset_that_the_hub_cannot_give_says_what_to_do():
    with pytest.raises(DataNotFound, match="hub:nobody/nothing") as caught:
        open_source("hub:nobody/nothing")
    assert "check the name and the connection" in caught.value.next_step


def test_a_large_dataset_is_read_in_flat_memory(tmp_path):
    import tracemalloc

    import pyarrow
    import pyarrow.parquet

    rows = pyarrow.table({"text": ["word " * 200] * 10_000})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", rows.schema, use_dictionary=False) as writer:
        for _ in range(3):
            writer.write_table(rows)
    source = open_source(tmp_path / "a.parquet")
    next(source.rows())
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    most = 0
    try:
        count = 0
        for _ in source.rows():
            count += 1
            most = max(most, pyarrow.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == source.num_rows == 30_000
    assert peak < 5_000_000
    assert most < 25_000_000


@pytest.mark.needs_data
def test_published_folders_have_their_splits(shared_data):
    assert splits_of(shared_data / "scitldr") == ("train", "valid", "test")
    assert splits_of(shared_data / "banking77") == ("train", "test")
    assert len(values(open_source(shared_data / "scitldr", split="valid"))) == 619
