"""The table of claims says what the results hold, and leaves out what was not measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {"machine": {"cores": 2, "processor": "a processor"}, "versions": {"torch": "2.13.0"}}


@pytest.fixture(scope="module")
def readme():
    found = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def write(folder: Path, name: str, **figures: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"figures": figures, **MACHINE}), encoding="utf-8")


def test_only_claims_with_a_result_have_a_line(readme, tmp_path: Path) -> None:
    assert readme.bench_block(tmp_path) == ""
    write(tmp_path, "lora_step", times=2.613, memory_ratio=0.444, bounds={"times": 2.5, "memory_ratio": 0.45})
    block = readme.bench_block(tmp_path)
    assert "| 2.61 times the speed, 44% of the memory | at least 2.5 times, at most 45% |" in block
    assert "`python bench/lora_step.py`" in block
    assert block.count("`python bench/") == 1
    assert "2 cores (a processor), torch 2.13.0" in block


def test_every_way_of_the_peer_is_named(readme, tmp_path: Path) -> None:
    ways = {"padded": {"times": 4.5}, "packed": {"times": 4.02}}
    write(tmp_path, "sft", times=4.02, ways=ways, bounds={"times": 4.0})
    assert "4.02 times the learned tokens a second (padded 4.50, packed 4.02)" in readme.bench_block(tmp_path)


def test_every_claim_has_a_script_and_the_committed_results_can_be_told(readme) -> None:
    for name in readme.CLAIMS:
        assert (ROOT / "bench" / f"{name}.py").is_file(), name
    committed = [name for name in readme.CLAIMS if (readme.RESULTS / f"{name}.json").is_file()]
    block = readme.bench_block()
    assert all(f"`python bench/{name}.py`" in block for name in committed)


def test_a_marked_block_is_written_anew_and_the_rest_stays(readme) -> None:
    text = "before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n"
    new = readme.with_figures(text)
    assert new == f"before\n<!-- bench:begin -->\n{readme.bench_block()}<!-- bench:end -->\nafter\n"
    assert readme.with_figures(new) == new
