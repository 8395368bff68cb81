"""An adapter is used on the form of the base that it was trained on, unless another is asked for."""

from __future__ import annotations

import json

import pytest

import manylora
from manylora.cli.app import run

ROWS = [{"prompt": f"name : {word} | food : Thai", "completion": f" {word} has Thai food ."} for word in "abcdef"]


@pytest.fixture(scope="module")
def trained(tiny_base_folder, tmp_path_factory):
    """Runs on the dense and on the packed base."""
    folder = tmp_path_factory.mktemp("storage")
    return {
        name: manylora.train(
            {
                "base": str(tiny_base_folder), "dtype": "float32", "quantize": name, "output": str(folder / str(name)),
                "track": [], "train": {"steps": 3, "row_tokens": 64, "learning_rate": 5e-2},
                "adapter": {"rank": 2}, "evaluate": {"max_new_tokens": 2},
            },
            train_data=ROWS, eval_data=ROWS,
        )
        for name in (None, "nf4")
    }  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def evaluated(capsys, *words) -> tuple[dict, str]:
    code = run(["evaluate", *map(str, words), "--no-text", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out.splitlines()[-1])["eval"], said.err


def test_the_receipt_names_the_form_of_the_base(trained):
    for name, result in trained.items():
        receipt = json.loads((result.run / "adapters/main/receipt.json").read_text())
        assert receipt["base"]["storage"] == name


@pytest.mark.parametrize("name", [None, "nf4"])
def test_an_adapter_is_evaluated_on_the_form_that_it_was_trained_on(trained, rows, capsys, name):
    result = trained[name]
    adapter = result.summary["adapters"]["main"]
    scores, said = evaluated(capsys, adapter, "--data", rows, "--dtype", "float32")
    assert scores["main"]["loss"] == pytest.approx(result.summary["eval"]["loss"], rel=1e-6)
    assert scores["base"]["loss"] == pytest.approx(result.summary["base_eval"]["loss"], rel=1e-6)
    assert ("packed as nf4" in said) == (name == "nf4")
    scores, _ = evaluated(capsys, result.run, "--data", rows)
    assert scores["main"]["loss"] == pytest.approx(result.summary["eval"]["loss"], rel=1e-6)


def test_another_form_can_be_asked_for(trained, rows, capsys):
    adapter = trained["nf4"].summary["adapters"]["main"]
    as_trained, _ = evaluated(capsys, adapter, "--data", rows, "--dtype", "float32")
    dense, _ = evaluated(capsys, adapter, "--data", rows, "--dtype", "float32", "--quantize", "none")
    int8, _ = evaluated(capsys, adapter, "--data", rows, "--dtype", "float32", "--quantize", "int8")
    assert dense["base"]["loss"] == pytest.approx(trained[None].summary["base_eval"]["loss"], rel=1e-6)
    assert len({as_trained["main"]["loss"], dense["main"]["loss"], int8["main"]["loss"]}) == 3


def test_two_adapters_of_different_forms_are_told_apart(trained, capsys):
    folders = [result.summary["adapters"]["main"] for result in trained.values()]
    words = [word for folder in folders for word in ("--adapter", folder)]
    assert run(["generate", *words, "--prompt", "name : a", "--max-new-tokens", "1"]) == 0
    assert "was trained on another form of the base" in capsys.readouterr().err
