"""`manylora demo`: the builtin base, the bundled data, a fresh folder each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manylora.cli import demo

QUICK = {
    "train": {"steps": 2, "row_tokens": 256, "rows_per_step": 2},
    "evaluate": {"max_new_tokens": 4, "max_examples": 8},
}


def test_the_demo_shows_before_and_after_and_what_to_type_next(manylora, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "RECIPE", QUICK)
    monkeypatch.setattr(demo, "JUDGED", 4)
    done = manylora("demo")
    assert done.code == 0, done.err
    for word in ("prompt:", "base:", "adapter:", "loss", "report.html", "manylora train", "data.train=YOUR.jsonl"):
        assert word in done.out
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a ", "completion": "b"}\n' * 4)
    (command,) = [line.split() for line in done.out.splitlines() if "YOUR.jsonl" in line]
    words = [word.replace("YOUR", "mine").replace("eval_fraction=0.1", "eval_fraction=null") for word in command[1:]]
    again = manylora(*words)
    assert again.code == 0, again.err


def test_each_demo_gets_a_folder_of_its_own(tmp_path):
    assert demo.free_folder(tmp_path).name == "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert demo.free_folder(tmp_path).name == "demo-2"


def test_an_occupied_output_is_refused_before_anything_is_done(manylora, tmp_path):
    (tmp_path / "kept").write_text("x")
    manylora("demo", "--output", tmp_path).refused("OutputExists", "--output")
    assert (tmp_path / "kept").read_text() == "x"


@pytest.mark.slow
def test_the_demo_halves_the_loss_and_names_what_it_was_given(manylora, tmp_path):
    done = manylora("demo", "--output", tmp_path / "demo", "--json")
    assert done.code == 0, done.err
    result = done.result
    assert result["eval"]["loss"] <= 0.5 * result["base_eval"]["loss"]
    assert result["named_values"]["adapter"] >= 0.8
    assert json.loads(Path(result["run"], "summary.json").read_text())["eval"] == result["eval"]
