from __future__ import annotations

from manylora.data.demo import demo_data_folder
from manylora.data.formats.detect import detect
from manylora.data.readers import read_rows


def test_no_input_of_the_sample_is_in_both_train_and_eval():
    train, held_out = (read_rows(demo_data_folder() / name) for name in ("train.jsonl", "eval.jsonl"))
    assert detect(train) == detect(held_out) == "prompt-completion"
    inputs = [{frozenset(row.values["prompt"].strip().split(" | ")) for row in rows} for rows in (train, held_out)]
    assert not inputs[0] & inputs[1]
    assert len(train) == 1500
    assert len(inputs[1]) == 55


def test_the_sample_is_small_and_says_where_it_comes_from():
    files = {path.name: path for path in demo_data_folder().iterdir()}
    assert set(files) == {"train.jsonl", "eval.jsonl", "ATTRIBUTION.md", "LICENSE"}
    assert sum(path.stat().st_size for path in files.values()) < 700_000
    attribution = files["ATTRIBUTION.md"].read_text()
    assert all(part in attribution for part in ("Novikova", "Dusek", "Rieser", "CC BY-SA 4.0", "What was changed"))


def test_every_prompt_ends_where_its_completion_can_begin():
    for row in read_rows([demo_data_folder() / "train.jsonl", demo_data_folder() / "eval.jsonl"]):
        assert row.values["prompt"].endswith("\n")
        assert row.values["completion"] == row.values["completion"].strip() != ""
