from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from manylora.cli.app import run

ROWS = "".join(
    f'{{"prompt": "name : The Eagle {number}", "completion": "The Eagle is a pub ."}}\n' for number in range(24)
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(ROWS, encoding="utf-8")
    path = tmp_path / "first.yaml"
    path.write_text(
        "base: builtin:tiny-en\ndata: {train: train.jsonl}\noutput: run\n"
        "train: {row_tokens: 64, checkpointing: none}\n",
        encoding="utf-8",
    )
    return path


def test_a_plan_says_what_is_held_and_writes_nothing(config, capsys):
    assert run(["plan", str(config)]) == 0
    text = capsys.readouterr().out
    for word in ("weights", "activations", "in all", "a step: about", "it fits"):
        assert word in text
    assert sorted(path.name for path in config.parent.iterdir()) == ["first.yaml", "train.jsonl"]


def test_json_is_one_object(config, capsys):
    assert run(["plan", str(config), "--device", "h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["free_bytes"] == 80 * 10**9
    assert sum(found["categories"].values()) == found["peak_bytes"]
    assert found["seconds_per_step"] > 0


def test_what_does_not_fit_says_so(config, capsys, monkeypatch):
    monkeypatch.setattr("manylora.planning.advice.MOST_PLANS", 1)
    assert run(["plan", str(config), "--device", "cpu:50MB"]) == 0
    text = capsys.readouterr().out
    assert "it does not fit" in text
    assert "nothing that was tried fits" in text


def test_a_device_without_a_name_has_no_time(config, capsys):
    assert run(["plan", str(config), "--device", "cuda:80GB"]) == 0
    assert "is not known: name it" in capsys.readouterr().out


def test_the_members_of_a_sweep_are_planned_together(config, capsys):
    text = config.read_text(encoding="utf-8")
    config.write_text(text + "sweep: {trials: 3, space: {adapter.rank: [4, 8]}}\n", encoding="utf-8")
    assert run(["plan", str(config), "--set", "data.eval_fraction=0.2", "--set", "sweep.concurrent=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["members"] == 2
    assert "2 of 2 members train at once: sweep.concurrent" in found["reason"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "cudda:80GB"], ["'cudda' is no device", "nearest: cuda"]),
        (["--device", "cuda:eighty"], ["'eighty' is no size", "80GB"]),
        (["--device", "cuda"], ["without a size", "leave --device out"]),
        (["--set", "train.row_token=64"], ["train.row_tokens"]),
    ],
)
def test_a_mistake_is_one_block(config, capsys, words, told):
    assert run(["plan", str(config), *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ConfigError")
    for word in told:
        assert word in text


def test_the_pages_commands_run(config, monkeypatch, capsys):
    monkeypatch.chdir(config.parent)
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
    commands = re.search(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert commands is not None
    for line in commands[1].splitlines():
        assert run(shlex.split(line)[1:]) == 0, line


def test_a_file_that_is_not_there_is_named(capsys):
    assert run(["plan", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
