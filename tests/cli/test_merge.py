"""`manylora merge`: a folder and its measured error, or exit code 2, the numbers, and nothing written."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from manylora.adapters.adapter import Adapter
from manylora.base.load import load_base
from manylora.cli.app import run
from manylora.spec import AdapterSpec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def adapter_folder(tiny_base_folder: Path, tmp_path: Path):
    """Writes an adapter whose delta is about `size` of the weights."""

    def make(size: float = 0.1) -> Path:
        base = load_base(str(tiny_base_folder), dtype="float32", device="cpu")
        adapter = Adapter.new(base, AdapterSpec(rank=4, alpha=4.0))
        generator = torch.Generator().manual_seed(1)
        factors = {}
        for name, own in adapter.factors.items():
            a, b = own.tensors["a"], torch.randn(own.tensors["b"].shape, generator=generator)
            b *= size * base.sites[name].weight().norm() / (b @ a).norm()
            factors[name] = replace(own, tensors={"a": a, "b": b})
        return replace(adapter, factors=factors).save(tmp_path / "adapter", base)

    return make


def test_the_base_comes_from_the_adapter_and_the_last_line_is_the_report(adapter_folder, tmp_path, capsys):
    words = ["merge", str(adapter_folder()), "--into", "bf16", "--output", str(tmp_path / "merged"), "--json"]
    assert run(words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["passed"]
    assert printed["folder"] == str(tmp_path / "merged")
    assert printed["max_abs_error"] > 0
    saved = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert saved.items() <= printed.items()


def test_the_table_shows_the_worst_sites_and_what_they_keep(adapter_folder, capsys):
    assert run(["merge", str(adapter_folder()), "--into", "bf16"]) == 0
    printed = capsys.readouterr().out
    assert "site, worst first" in printed
    assert "and 6 more, all with a smaller error" in printed
    assert "nothing was written: give --output DIR" in printed


def test_a_refusal_shows_the_numbers_exits_2_and_writes_nothing(adapter_folder, tmp_path, capsys):
    folder = adapter_folder(1e-3)
    assert run(["merge", str(folder), "--into", "nf4", "--output", str(tmp_path / "merged")]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-3].startswith("Error: MergeRefused: merging into nf4 loses too much")
    assert "fp32 would pass; to accept the loss: --max-error" in printed.err
    assert "site, worst first" in printed.out
    assert "into bf16" in printed.out
    assert not (tmp_path / "merged").exists()


def test_an_accepted_error_is_written_and_the_packed_folder_loads(adapter_folder, tmp_path):
    words = ["merge", str(adapter_folder(0.5)), "--into", "nf4", "--max-error", "9", "--output", str(tmp_path / "m")]
    assert run(words) == 0
    base = load_base(str(tmp_path / "m"), dtype="float32", device="cpu")
    assert any(site.packed is not None for site in base.sites.values())


def test_an_adapter_trained_on_packed_weights_is_merged_onto_them(adapter_folder, capsys):
    folder = adapter_folder()
    (folder / "config.yaml").write_text("quantize: nf4\n")
    assert run(["merge", str(folder), "--into", "fp32", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["onto"] == "dequantised:nf4"
    assert "config.yaml says that the adapter was trained on them" in printed.err
    assert run(["merge", str(folder), "--into", "fp32", "--onto", "original", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["onto"] == "original"


def test_onto_names_the_packing_where_nothing_says_it(adapter_folder, capsys):
    assert run(["merge", str(adapter_folder()), "--into", "fp32", "--onto", "dequantised:int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["onto"] == "dequantised:int8"


def test_rows_of_data_are_measured_too(adapter_folder, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the quick", "completion": " fox"}\n')
    assert (
        run(["merge", str(adapter_folder()), "--into", "bf16", "--data", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["num_rows"] == 9


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--into", "bf15"], "nearest: bf16"),
        (["--into", "bf16", "--onto", "dequantized"], "nearest: dequantised"),
        (["--into", "bf16", "--onto", "dequantised:nf5"], "nearest: nf4"),
        (["--into", "bf16", "--onto", "dequantised"], "dequantised:nf4"),
        (["--into", "bf16", "--max-error", "0"], "max_error is 0"),
    ],
)
def test_a_mistake_is_told_with_the_next_step(adapter_folder, words, told, capsys):
    assert run(["merge", str(adapter_folder()), *words]) == 2
    assert told in capsys.readouterr().err
