from __future__ import annotations

import gc

import numpy as np
import pytest

from manylora.data.rows import Row
from manylora.data.store import Examples, ExampleWriter, Scratch, column_of, lengths_of, num_trained_of
from manylora.data.tokens import Marked


def write(path, count: int, *, start: int = 0, chunk: int = 3) -> Examples:
    writer = ExampleWriter(path)
    made = [
        (
            Row({}, "rows.jsonl", number + 1),
            Marked([number, 7, 8, 9][: 2 + number % 3], [(1, 2 + number % 3)], ("A",) if number % 3 == 0 else None),
            f"prompt {number}",
            f"answer {number}",
            f"prompt {number}" if number % 2 else "x" * 300,
            None if number % 2 else "label",
            "chosen" if number % 2 else "",
        )
        for number in range(start, start + count)
    ]
    for at in range(0, count, chunk):
        writer.write(made[at : at + chunk])
    writer.close()
    return Examples.open(path)


@pytest.fixture
def eight(tmp_path) -> Examples:
    return write(tmp_path / "a.arrow", 8)


def test_what_is_written_is_read_back(eight):
    assert len(eight) == 8
    one = eight[4]
    assert one.tokens.tolist() == [4, 7, 8]
    assert one.tokens.dtype == np.int32
    assert one.trained.tolist() == [False, True, True]
    assert (one.prompt_length, one.prompt, one.reference, one.line) == (1, "prompt 4", "answer 4", 5)
    assert (one.label, one.tags, one.variant, one.where) == ("label", None, "", "rows.jsonl:5")
    assert (eight[3].label, eight[3].tags, eight[3].variant) == (None, ("A",), "chosen")


def test_a_long_group_is_kept_as_its_digest_and_still_tells_groups_apart(eight, tmp_path):
    assert eight[1].group == "prompt 1"
    assert len(eight[0].group) == 32
    assert eight[0].group == eight[2].group != eight[1].group


def test_lengths_targets_and_columns_agree_with_the_examples(eight):
    for view in (eight, eight[2:7], eight.take([6, 1, 1]), eight + eight[:2]):
        made = list(view)
        assert lengths_of(view).tolist() == [len(one) for one in made] == lengths_of(made).tolist()
        assert num_trained_of(view).tolist() == [one.num_trained for one in made] == num_trained_of(made).tolist()
        for name in ("prompt", "group", "line", "label", "tags", "variant"):
            assert list(column_of(view, name)) == list(column_of(made, name)) == [getattr(one, name) for one in made]


def test_views_and_sums_hold_the_right_examples(eight, tmp_path):
    more = write(tmp_path / "b.arrow", 4, start=20)
    assert [one.line for one in eight[::-2]] == [8, 6, 4, 2]
    assert [one.line for one in (eight[6:] + more).take([0, 3, 5])] == [7, 22, 24]
    assert eight[-1].line == 8
    with pytest.raises(IndexError):
        eight[8]


def test_a_scratch_folder_goes_with_its_last_example(tmp_path):
    scratch = Scratch(tmp_path)
    folder = scratch.path
    examples = write(folder / "a.arrow", 3)
    examples.keep_alive(scratch)
    view = examples[1:]
    del scratch, examples
    gc.collect()
    assert folder.is_dir()
    assert view[0].line == 2
    del view
    gc.collect()
    assert not folder.exists()
