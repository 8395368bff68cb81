"""`manylora combine`: one adapter folder out of several."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from manylora.adapters.adapter import Adapter
from manylora.base.load import load_base
from manylora.cli.app import run
from manylora.spec import AdapterSpec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folders(tiny_base_folder: Path, tmp_path: Path) -> list[str]:
    base = load_base(str(tiny_base_folder), dtype="float32", device="cpu")
    specs = [AdapterSpec(rank=4), AdapterSpec(rank=2, full_sites=("norm",))]
    return [
        str(Adapter.new(base, spec, seed=place).save(tmp_path / f"adapter-{place}", base))
        for place, spec in enumerate(specs)
    ]


def test_the_folder_holds_the_combined_adapter_with_its_tokenizer(folders, tmp_path, capsys):
    out = tmp_path / "combined"
    assert run(["combine", *folders, "--weights", "0.7,0.3", "--output", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(printed["sites"]) == 15
    adapter = Adapter.load(out)
    assert adapter.spec.rank == 6
    assert adapter.spec.full_sites == ("model.norm",)
    assert (out / "chat_template.jinja").is_file()


def test_every_method_is_reached_with_its_options(folders, tmp_path):
    words = {
        "svd": ["--rank", "3"],
        "ties": ["--density", "0.5"],
        "dare": ["--density", "0.5", "--seed", "3", "--rank", "2"],
        "magnitude": ["--density", "0.5"],
    }
    for method, more in words.items():
        assert run(["combine", *folders, "--method", method, *more, "--output", str(tmp_path / method)]) == 0
        assert Adapter.load(tmp_path / method).spec.rank == {"svd": 3, "dare": 2}.get(method, 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--weights", "0.7"], "for 2 adapters"),
        (["--weights", "a,b"], "numbers with commas"),
        (["--method", "tie"], "nearest: ties"),
        (["--density", "0.2"], "'linear' does not read it"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(folders, tmp_path, words, told, capsys):
    assert run(["combine", *folders, *words, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused(folders, capsys):
    assert run(["combine", *folders, "--output", folders[0]]) == 2
    assert "OutputExists" in capsys.readouterr().err
