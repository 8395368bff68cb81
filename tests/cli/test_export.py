"""`manylora export`: the same adapter for another engine."""

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

FILES = {
    "peft": "adapter_model.safetensors",
    "mlx": "adapters.safetensors",
    "gguf": "adapter.gguf",
}


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> str:
    base = load_base(str(tiny_base_folder), dtype="float32", device="cpu")
    return str(Adapter.new(base, AdapterSpec(rank=4)).save(tmp_path / "adapter", base))


@pytest.mark.parametrize("engine", FILES)
def test_each_engine_gets_its_file(engine, folder, tmp_path, capsys):
    if engine == "gguf":
        pytest.importorskip("gguf")
    assert run(["export", folder, "--to", engine, "--output", str(tmp_path / "out"), "--json"]) == 0
    assert FILES[engine] in json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
    assert (tmp_path / "out" / FILES[engine]).stat().st_size > 1000


def test_a_base_that_is_named_is_the_one_that_is_read(folder, tmp_path, capsys):
    pytest.importorskip("gguf")
    assert (
        run(["export", folder, "--to", "gguf", "--output", str(tmp_path / "out"), "--base", str(tmp_path / "no")]) == 2
    )
    assert "BaseNotFound" in capsys.readouterr().err


def test_an_engine_that_does_not_exist_is_told_with_those_that_do(folder, tmp_path, capsys):
    assert run(["export", folder, "--to", "onnx", "--output", str(tmp_path / "out")]) == 2
    assert "peft, mlx, gguf" in capsys.readouterr().err
