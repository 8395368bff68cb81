"""The scripts that compare run at a tiny size, their correctness checks included; no figure of theirs is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--layers", "2", "--vocabulary", "512", "--rounds", "1", "--threads", "1"]

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
with_peers = pytest.mark.skipif(
    not (ROOT / ".venv-peers" / "bin" / "python").exists(), reason="the peers are not installed: scripts/peers.sh"
)


def figures(script: str, *arguments: str) -> dict:
    """What a script printed; nothing in bench/results may change."""
    results = ROOT / "bench" / "results"
    before = {path.name: path.read_bytes() for path in results.glob("*.json")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in results.glob("*.json")} == before
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
@linux
@with_peers
@pytest.mark.parametrize("script", ["lora_step.py", "qlora_peft.py"])
def test_the_step_agrees_with_pefts_and_is_timed(script: str) -> None:
    found = figures(script, *TINY)
    assert found["factors_compared"] == 2 * 7 * 2
    assert found["loss_difference"] < 2e-5
    assert found["gradient_difference"] < 2e-4
    assert found["times"] > 0.0
    assert len(found["losses"]["ours"]) == len(found["losses"]["peft"]) == 3


@pytest.mark.slow
@pytest.mark.needs_data
@linux
@with_peers
def test_fine_tuning_agrees_with_trl_and_is_timed(shared_data: Path) -> None:
    found = figures(
        "sft.py", *TINY[:2], "--vocabulary", "4096", *TINY[4:], "--data", str(shared_data), "--examples", "40",
        "--steps", "1", "--ways", "padded", "packed",
    )  # fmt: skip
    assert found["left out"] == []
    assert set(found["ways"]) == {"padded", "packed"}
    for checked in found["checks"]["float32"].values():
        assert checked["ours"]["targets"] == checked["trl"]["targets"] > 0
        assert checked["difference"] < 2e-5


@pytest.mark.slow
@linux
@with_peers
def test_starting_is_timed_once_both_runs_start_alike() -> None:
    found = figures("start.py", "--print", "--rounds", "1", "--first-steps", "1", "--threads", "1")
    assert found["seconds"]["import manylora"] > found["seconds"]["python"] > 0.0
    assert found["first step"]["share"] > 0.0


@pytest.mark.slow
def test_packed_rows_are_timed_once_they_learn_what_padded_ones_do() -> None:
    found = figures("packing.py", "--examples", "24", "--rounds", "1", "--threads", "1")
    assert found["largest_difference"] < 1e-9
    assert found["filled"]["padded"] < found["filled"]["sorted"] <= 1.0


@pytest.mark.slow
@linux
def test_the_share_of_the_machines_products_is_measured_without_peers() -> None:
    found = figures("roofline.py", *TINY)
    assert found["share_in_products"] > 0.0
    assert set(found["operations"]) == {"base", "head", "factors", "attention"}
    assert set(found["gflops_by_shape"]) == {"192 x 576", "512 x 576", "576 x 576", "576 x 1536", "1536 x 576"}
