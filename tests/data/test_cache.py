from __future__ import annotations

import json
import multiprocessing
import os
import time

import pytest

from manylora.data import cache
from manylora.data.cache import cache_folder, entries
from manylora.data.examples import Reading
from manylora.data.load import load_examples, overlap
from manylora.data.sources import open_source
from manylora.errors import DataError

EOS = (0,)
ROWS = [{"prompt": f"{number}\n", "completion": "b " * (number % 5) + "b"} for number in range(20)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def file(write):
    return write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))


def load(file, tokenizer, *, use_cache=True, **reading):
    source = open_source(file)
    return load_examples([(source, 1.0)], tokenizer, Reading(**{"max_length": 64} | reading), eos_ids=EOS,
                         use_cache=use_cache)  # fmt: skip


def same(one, other) -> bool:
    return [(a.tokens.tolist(), a.trained.tolist(), a.prompt, a.where) for a in one] == [
        (b.tokens.tolist(), b.trained.tolist(), b.prompt, b.where) for b in other
    ]


def test_what_was_encoded_before_is_found_and_equal(file, tokenizer, folder):
    first, again = load(file, tokenizer), load(file, tokenizer)
    assert [first.parts[0].from_cache, again.parts[0].from_cache] == [False, True]
    assert same(first.examples, again.examples)
    assert first.parts[0].encoded.notes == again.parts[0].encoded.notes
    assert again.notes()[0].endswith("(from the cache)")
    assert sorted(path.suffix for path in folder.iterdir()) == [".arrow", ".json"]


def test_what_was_skipped_is_said_again_from_the_cache(write, tokenizer):
    file = write("bad.jsonl", '{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "b"}\nnot json\n')
    first, again = (load(file, tokenizer, on_bad_row="skip", format="prompt-completion") for _ in range(2))
    assert again.parts[0].from_cache
    assert first.parts[0].encoded.skipped == again.parts[0].encoded.skipped
    assert len(again.parts[0].encoded.skipped) == 2
    assert again.notes()[-3].startswith("2 of 3 rows are skipped")


def test_whatever_changes_the_examples_changes_the_key(file, tokenizer, make_tokenizer, write, monkeypatch):
    load(file, tokenizer)
    other_template = make_tokenizer(str(tokenizer.chat_template) + " ")
    other_words = make_tokenizer()
    other_words.add_tokens(["b b"])
    assert not load(file, other_template).parts[0].from_cache
    assert not load(file, other_words).parts[0].from_cache
    assert not load(file, tokenizer, max_length=65).parts[0].from_cache
    assert not load(file, tokenizer, on_bad_row="skip").parts[0].from_cache
    assert not load(file, tokenizer, format="prompt-completion").parts[0].from_cache
    moved = write("moved.jsonl", file.read_bytes())
    assert not load(moved, tokenizer).parts[0].from_cache  # its examples say where they stand
    renamed = load_examples(
        [(open_source(file, columns={"completion": "prompt", "prompt": "completion"}), 1.0)], tokenizer,
        Reading(max_length=64), eos_ids=EOS,
    )  # fmt: skip
    assert not renamed.parts[0].from_cache
    file.write_text(file.read_text().replace("b b", "c c"))
    assert not load(file, tokenizer).parts[0].from_cache
    assert load(file, tokenizer).parts[0].from_cache
    monkeypatch.setattr(cache, "code_digest", lambda: "other code")
    assert not load(file, tokenizer).parts[0].from_cache


def test_the_digest_of_the_code_covers_what_turns_rows_into_examples():
    assert len(cache.code_digest()) == 64
    names = {path.name for path in cache.code_files()}
    assert {"examples.py", "chat.py", "messages.py", "tokens.py", "store.py"} <= names


def test_how_the_tokenizer_padded_last_is_no_part_of_the_key(file, make_tokenizer):
    tokenizer = make_tokenizer()
    load(file, tokenizer)
    tokenizer(["a", "b c"], padding="max_length", max_length=9, truncation=True)
    assert load(file, tokenizer).parts[0].from_cache


def test_no_cache_reads_and_writes_nothing_that_stays(file, tokenizer, folder):
    load(file, tokenizer)
    before = sorted(folder.iterdir())
    again = load(file, tokenizer, use_cache=False)
    assert not again.parts[0].from_cache
    assert len(again.examples) == len(ROWS)
    del again
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("harm", ["cut", "no facts", "garbled facts", "a bit of the facts", "garbled file", "a bit"])
def test_an_entry_that_is_not_whole_is_made_anew(file, tokenizer, folder, harm):
    first = load(file, tokenizer)
    arrow, facts = (next(folder.glob(f"*.{ending}")) for ending in ("arrow", "json"))
    data = arrow.read_bytes()
    arrow.unlink()  # a new file: the old one is still mapped
    match harm:
        case "cut":
            arrow.write_bytes(data[:-100])
        case "no facts":
            arrow.write_bytes(data)
            facts.unlink()
        case "garbled facts":
            arrow.write_bytes(data)
            facts.write_text('{"format": 3')
        case "a bit of the facts":
            arrow.write_bytes(data)
            facts.write_text(facts.read_text().replace("rows", "rowz", 1))
        case "a bit":
            arrow.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :])
        case "garbled file":
            arrow.write_bytes(bytes(len(data)))
    again = load(file, tokenizer)
    assert not again.parts[0].from_cache
    assert same(first.examples, again.examples)
    assert load(file, tokenizer).parts[0].from_cache


def test_a_fault_leaves_no_entry(write, tokenizer, folder):
    file = write("bad.jsonl", '{"prompt": "a", "completion": ""}\n')
    with pytest.raises(DataError, match="completion is empty"):
        load(file, tokenizer)
    assert list(entries(folder)) == []
    assert list(folder.iterdir()) == []


def test_what_a_dead_process_left_is_removed_after_a_day(file, tokenizer, folder):
    old, new = folder / "manylora-old", folder / "manylora-new"
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * cache.STALE_S,) * 2)
    load(file, tokenizer)
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_done_without(file, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MANYLORA_CACHE", str(tmp_path / "a file" / "cache"))
    loaded = load(file, tokenizer)
    assert len(loaded.examples) == len(ROWS)


def _load_in_process(file, folder, tokenizer, barrier, answers):
    os.environ["MANYLORA_CACHE"] = str(folder)
    barrier.wait()
    loaded = load(file, tokenizer)
    answers.put([one.tokens.tolist() for one in loaded.examples])


def test_two_processes_at_once_leave_one_whole_entry(file, tokenizer, folder):
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=_load_in_process, args=(file, folder.parent, tokenizer, barrier, answers))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1] == [one.tokens.tolist() for one in load(file, tokenizer, use_cache=False).examples]
    assert len(list(entries(folder))) == 1
    assert load(file, tokenizer).parts[0].from_cache


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYLORA_CACHE", "~/somewhere")
    assert cache_folder() == type(tmp_path)("~/somewhere").expanduser()
    monkeypatch.delenv("MANYLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "manylora"


def test_sources_are_joined_with_their_weights(write, tokenizer):
    files = [
        write(
            f"{name}.jsonl", "".join(json.dumps({"prompt": f"{name}{i}\n", "completion": "b"}) + "\n" for i in range(n))
        )
        for name, n in (("x", 2), ("y", 3))
    ]
    loaded = load_examples(
        [(open_source(files[0]), 2.5), (open_source(files[1]), 1.0)], tokenizer, Reading(max_length=64), eos_ids=EOS
    )
    assert [one.prompt for one in loaded.examples] == ["x0\n", "x1\n", "y0\n", "y1\n", "y2\n"]
    assert list(loaded.weights) == [(2, 2.5), (3, 1.0)]
    assert any("each epoch shows it 2.5 times" in note for note in loaded.notes())


def test_a_prompt_on_both_sides_is_said(write, tokenizer):
    train = load(write("train.jsonl", '{"prompt": "a\\n", "completion": "b"}\n'), tokenizer).examples
    both = load(
        write("eval.jsonl", '{"prompt": "z\\n", "completion": "b"}\n{"prompt": "a\\n", "completion": "c"}\n'), tokenizer
    ).examples
    (line,) = overlap(train, both)
    assert "1 of 2 held-out examples" in line
    assert "eval.jsonl:2" in line
    assert overlap(train, both[:1]) == []


def test_a_cache_that_cannot_be_written_is_no_fault(file, tokenizer, folder, monkeypatch):
    """The folder is there, and nothing can be put into it: as root may write anywhere, the refusal is played."""
    folder.mkdir(parents=True)
    real = cache.Scratch

    def refused(root=None):
        if root is not None:
            raise PermissionError(13, "Permission denied", str(root))
        return real()

    monkeypatch.setattr(cache, "Scratch", refused)
    first, again = load(file, tokenizer), load(file, tokenizer)
    assert not again.parts[0].from_cache
    assert same(first.examples, again.examples)
    assert not list(folder.iterdir())


def test_a_cache_that_is_full_when_an_entry_is_kept_is_no_fault(file, tokenizer, folder, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cache, "write_text_atomic", full)
    found = load(file, tokenizer)
    assert [example.prompt for example in found.examples]
    monkeypatch.undo()
    monkeypatch.setenv("MANYLORA_CACHE", str(folder.parent))
    assert same(load(file, tokenizer).examples, found.examples)
