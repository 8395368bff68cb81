"""`manylora quantize`: the folder, the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manylora.base.load import load_base
from manylora.cli.quantize import quantize
from manylora.errors import ConfigError, OutputExists, UnknownName


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_folder_loads_and_the_table_tells_error_and_bytes(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(str(tiny_base_folder), tmp_path / "nf4")
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert lines[0].split("  ")[0] == "sites ending in"
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"}
    assert {line.split()[0] for line in lines[1:9]} == kinds
    assert "packed as nf4: 14 linear weights" in told.err
    base = load_base(str(tmp_path / "nf4"))
    assert base.model(torch.arange(8)[None]).logits.isfinite().all()


def test_json_holds_every_figure(tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(str(tiny_base_folder), tmp_path / "out", "int4", block=16, as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["format"] == "int4"
    assert result["options"] == {"block": 16}
    assert result["fingerprint"] == load_base(str(tiny_base_folder)).fingerprint
    assert 0 < result["sites"]["all"]["relative_error"] < 0.2
    assert result["bytes_after"] < result["bytes_before"]
    parts = [row for name, row in result["sites"].items() if name != "all"]
    assert sum(row["weights"] for row in parts) == result["sites"]["all"]["weights"]


def test_double_quantisation_can_be_left_out(
    tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {}
    for flag in (True, False):
        quantize(str(tiny_base_folder), tmp_path / str(flag), double_quant=flag, as_json=True)
        bits[flag] = json.loads(capsys.readouterr().out)["sites"]["gate_proj"]
        config = json.loads((tmp_path / str(flag) / "config.json").read_text())
        settings = config["quantization_config"]["sites"]["model.layers.0.mlp.gate_proj"]
        assert settings["double_quant"] is flag
    assert bits[True]["relative_error"] != bits[False]["relative_error"]


def test_mistakes_are_told_and_leave_nothing_behind(tiny_base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nf5"):
        quantize(str(tiny_base_folder), tmp_path / "out", "nf5")
    with pytest.raises(UnknownName, match="double_quant"):
        quantize(str(tiny_base_folder), tmp_path / "out", "int8", double_quant=True)
    with pytest.raises(ConfigError, match="block of nf4 is 7"):
        quantize(str(tiny_base_folder), tmp_path / "out", block=7)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []
    quantize(str(tiny_base_folder), tmp_path / "out")
    with pytest.raises(OutputExists):
        quantize(str(tiny_base_folder), tmp_path / "out")
