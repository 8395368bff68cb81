"""Before step 1 the log says what a run will hold at its peak, and where it cannot, training goes on all the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from manylora.base.frozen import FrozenModel
from manylora.base.load import load_base
from manylora.config import load_config
from manylora.planning.planner import MOST_PRODUCT_BYTES
from manylora.runs.console import Progress
from manylora.training import footprint
from manylora.training.expected import Expected, expected
from manylora.training.fitting import fit
from manylora.training.prepare import Stock
from manylora.training.run import train

GIB = 2**30


def objects() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 4))
    rows = TensorDataset(torch.randn(32, 64), torch.randint(0, 4, (32,)))
    return {"python:base": FrozenModel(model), "python:rows": rows}


def run(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The summary of three steps on a module, and what the log says."""
    values = {"base": "builtin:tiny-en", "data": {"train": "python:rows"}, "output": str(folder), "task": "module"}
    config = load_config(values, {"train.steps": 3, "track": []}).model_copy(update={"base": "python:base"})
    told = io.StringIO()
    found = train(config, objects=objects(), console=Progress(stream=told))
    return found.summary, told.getvalue().splitlines()


@pytest.mark.alone
def test_the_log_says_before_step_1_what_the_summary_compares_with_the_peak(tmp_path: Path) -> None:
    summary, lines = run(tmp_path / "run")
    place = next(index for index, line in enumerate(lines) if "expected peak memory" in line)
    assert all("step 1" not in line for line in lines[:place])
    assert f"expected peak memory {summary['expected_peak_bytes'] / GIB:.2f} GiB" in lines[place]
    assert summary["expected_peak_bytes"] == pytest.approx(summary["peak_bytes"], rel=0.5)


def test_a_loss_that_cannot_be_followed_is_trained_and_the_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise NotImplementedError("an operation that needs numbers")

    monkeypatch.setattr(footprint, "_chunk", fails)
    summary, lines = run(tmp_path / "run")
    assert summary["steps"] == 3
    assert summary["expected_peak_bytes"] is None
    assert any("expected peak memory is not known" in line for line in lines)


def test_what_is_to_come_is_the_member_and_its_largest_step(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "name : The Eagle", "completion": "The Eagle is a pub ."}\n' * 24)
    base = load_base("builtin:tiny-en", dtype="float32")
    values = {"base": "builtin:tiny-en", "data": {"train": str(rows)}, "output": str(tmp_path / "run")}
    coming = []
    for rank, row_tokens in ((4, 64), (64, 64), (64, 128)):
        own = load_config(values, {"adapter.rank": rank, "train.row_tokens": row_tokens}).model_copy(
            update={"base": "python:base"}
        )
        found = fit(base, *Stock(own, objects={"python:base": base}).member(own, "main"), "none", device_free=GIB)
        coming.append(found.coming_bytes)
    assert 0 < coming[0] < coming[1] < coming[2]
    assert expected(base, coming[0]).coming_bytes == coming[0]


def test_kernels_caches_grow_with_the_steps_up_to_their_end() -> None:
    base = load_base("builtin:tiny-en", dtype="bfloat16", device="cpu")
    few, many = (expected(base, 0, num_steps=steps).coming_bytes for steps in (1, 10**6))
    assert few is not None
    assert 0 < few < MOST_PRODUCT_BYTES == many == expected(base, 0).coming_bytes


def test_the_line_says_when_more_is_to_come_than_is_free() -> None:
    assert "MORE THAN" not in Expected(GIB, GIB, 2 * GIB).line()
    assert Expected(GIB, 3 * GIB, 2 * GIB).line() == (
        "expected peak memory 4.00 GiB, of which 1.00 GiB are held now, MORE THAN what is free: 2.00 GiB are free"
    )
