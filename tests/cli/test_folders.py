"""Commands on folders: what they read, and mistakes that are the user's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from manylora.base.load import load_base
from manylora.cli.app import run
from manylora.cli.generate import prompt_tokens


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "name : {n}", "completion": "the dog"}}\n' for n in range(4)))
    return path


def test_inspect_lists_sites_without_reading_weights(tiny_base_folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("manylora.base.load.load_dense", lambda *_, **__: pytest.fail("the weights are read"))
    assert run(["inspect", str(tiny_base_folder), "--sites", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.undo()
    base = load_base(str(tiny_base_folder))
    assert [site["name"] for site in found["sites"]] == list(base.sites)
    assert found["parameters"] == base.num_parameters()
    assert found["fingerprint"] == base.fingerprint
    assert found["packs rows"] == base.packs


def test_inspect_says_so_where_finding_the_fingerprint_would_take_long(tiny_base_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing is remembered there
    monkeypatch.setattr("manylora.base.fingerprint._QUICK_BYTES", 10)
    assert run(["inspect", str(tiny_base_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fingerprint"].startswith("not read")


@pytest.mark.parametrize("verb", ["evaluate", "plan"])
def test_a_task_of_modules_is_the_user_s_mistake_at_the_command_line(verb, tiny_base_folder, rows, tmp_path, capsys):
    words = ["evaluate", str(tiny_base_folder), "--data", str(rows), "--task", "module"]
    if verb == "plan":
        config = {"base": str(tiny_base_folder), "task": "module", "data": {"train": str(rows)}, "output": "run"}
        (tmp_path / "c.yaml").write_text(json.dumps(config))
        words = ["plan", str(tmp_path / "c.yaml")]
    assert run(words) == 2
    text = capsys.readouterr().err
    assert "only Python can hand over" in text
    assert "manylora.train(config, base=" in text


def test_what_a_metric_is_exactly_is_shown_where_it_is_shown(tiny_base_folder, rows, tmp_path, capsys):
    config = {
        "base": str(tiny_base_folder), "data": {"train": str(rows), "eval": str(rows)}, "output": "run", "track": [],
        "train": {"steps": 1, "row_tokens": 32}, "evaluate": {"max_new_tokens": 2}, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert run(["train", str(tmp_path / "c.yaml")]) == 0
    assert "bleu: nrefs:" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "tok:13a" in summary["footnotes"]["bleu"]
    assert summary["footnotes"]["exact_match"] == "equal to a reference but for white space"
    assert "tok:13a" in (tmp_path / "run" / "report.html").read_text()
    assert run(["evaluate", str(tmp_path / "run"), "--max-new-tokens", "2"]) == 0
    assert "bleu: nrefs:" in capsys.readouterr().out


def test_a_base_without_an_end_token_may_be_given_a_prompt(tiny_base_folder: Path, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "endless"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"eos_token_id": None}))
    base = load_base(str(folder), dtype=torch.float32)
    assert base.eos_ids == ()
    assert prompt_tokens(base, "the dog", chat=False)
    assert run(["generate", "the dog", "--base", str(folder), "--max-new-tokens", "3"]) == 0
