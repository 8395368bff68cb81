"""`manylora compress`: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from manylora.cli import app

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a base that lies in a folder, so that the command finds it by itself."""
    import manylora
    from manylora.types import Factors

    base = manylora.load_base(str(tiny_base_folder), dtype="float32")
    adapter = manylora.Adapter.new(base, manylora.AdapterSpec(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: Factors("lora", {key: 0.3 * torch.randn(v.shape, generator=generator) for key, v in own.tensors.items()})
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors).save(tmp_path_factory.mktemp("adapters") / "one", base)


def test_eight_bits_are_the_default_and_the_cost_is_printed(folder, tmp_path, capsys):
    small = tmp_path / "small"
    assert app.run(["compress", str(folder), "--output", str(small)]) == 0
    printed = capsys.readouterr().out
    for told in ("int8", "bits for each number", "KL", "top-1", "worst first", "q_proj", f"written to {small}"):
        assert told in printed
    assert (small / "adapter_model.quantised.safetensors").is_file()
    report = json.loads((small / "compress_report.json").read_text())
    assert report["scheme"] == "int8"
    assert report["num_rows"] == 8


def test_the_json_is_the_report_that_is_written(folder, tmp_path, capsys):
    small = tmp_path / "small"
    assert app.run(["compress", str(folder), "--bits", "4", "--rank", "2", "--output", str(small), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result.pop("adapter") == str(folder)
    assert result == json.loads((small / "compress_report.json").read_text())
    assert (result["scheme"], result["rank"], result["folder"]) == ("int4", 2, str(small))
    errors = [site["error"] for site in result["sites"]]
    assert errors == sorted(errors, reverse=True)


def test_without_an_output_nothing_is_written(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert app.run(["compress", str(folder), "--bits", "2", "--rho", "0.6"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_too_large_a_loss_exits_2_writes_nothing_and_names_what_passes(folder, tmp_path, capsys):
    small = tmp_path / "small"
    words = ["compress", str(folder), "--bits", "2", "--max-kl", "1e-3", "--output", str(small)]
    assert app.run(words) == 2
    streams = capsys.readouterr()
    assert streams.err.splitlines()[-3].startswith("Error: CompressRefused: --bits 2 --rho 0.8 loses too much")
    assert "--bits 8 passes" in streams.err
    assert "Traceback" not in streams.err
    assert "other ways" in streams.out
    assert not small.exists()


def test_rows_of_data_are_measured_too(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "name : ", "completion": "value"}\n{"prompt": "the ", "completion": "fox"}\n')
    assert app.run(["compress", str(folder), "--data", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 10


def test_a_cut_alone_gives_an_ordinary_adapter(folder, tmp_path, capsys):
    small = tmp_path / "small"
    assert app.run(["compress", str(folder), "--energy", "0.9", "--no-logits", "--output", str(small)]) == 0
    assert "not measured" in capsys.readouterr().out
    assert (small / "adapter_model.safetensors").is_file()
    assert json.loads((small / "compress_report.json").read_text())["logits"] is None


def test_a_compressed_adapter_generates(folder, tmp_path, capsys):
    small = tmp_path / "small"
    assert app.run(["compress", str(folder), "--bits", "4", "--no-logits", "--output", str(small)]) == 0
    words = ["generate", "--adapter", str(small), "--prompt", "the", "--max-new-tokens", "3", "--dtype", "float32"]
    assert app.run(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--bits", "3"], "bits is 3"),
        (["--rank", "2", "--energy", "0.9"], "rank and energy are both given"),
        (["--no-logits", "--max-kl", "1e-3"], "--no-logits leaves nothing to measure"),
        (["--bits", "2", "--rho", "2"], "rho is 2.0"),
    ],
)
def test_what_makes_no_sense_is_the_users_mistake(words, told, folder, capsys):
    assert app.run(["compress", str(folder), *words]) == 2
    assert told in capsys.readouterr().err


def test_what_is_no_adapter_is_told(tiny_base_folder, capsys):
    assert app.run(["compress", str(tiny_base_folder)]) == 2
    assert "no adapter at" in capsys.readouterr().err


def test_an_occupied_output_is_told_before_anything_is_loaded(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert app.run(["compress", str(folder), "--output", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert "already holds mine.txt" in streams.err
    assert "dtype" not in streams.err
