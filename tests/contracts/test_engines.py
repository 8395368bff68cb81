"""What every engine of sweeps owes: to say what it cannot do before anything is written, and a sweep's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import manylora
from manylora.config import load_config
from manylora.errors import UserError
from manylora.sweeps.engines import ENGINES


def config(folder: Path, engine: str, **changes: Any):
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "base": "builtin:tiny-en", "dtype": "float32",
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25}, "adapter": {"rank": 2}, "track": [],
        "train": {"steps": 3, "row_tokens": 64, "rows_per_step": 2}, "evaluate": {"samples": 0, "max_new_tokens": 2},
        "sweep": {"engine": engine, "search": "grid", "space": {"train.learning_rate": [1e-3, 1e-2]}},
        "output": str(folder / engine),
    }  # fmt: skip
    return load_config(values, changes)


@pytest.mark.parametrize("engine", list(ENGINES))
def test_what_an_engine_cannot_do_is_said_before_anything_is_written(engine: str, tmp_path: Path) -> None:
    """Of an engine whose package is missing, or that has no cluster, an error for the user; else nothing."""
    asked = config(tmp_path, engine)
    refusal: UserError | None = None
    try:
        ENGINES.get(engine).check(asked)
    except UserError as error:
        refusal = error
    assert refusal is None or refusal.next_step
    assert not Path(asked.output).exists()


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=[pytest.mark.slow] if name == "ray" else []) for name in ENGINES]
)
def test_a_sweep_has_the_losses_of_its_members_trained_alone(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine) if engine == "ray" else None
    asked = config(tmp_path, engine)
    result = manylora.sweep(asked)
    told = json.loads((Path(asked.output) / "sweep.json").read_text())
    losses = {entry["values"]["train.learning_rate"]: entry["loss"] for entry in told["entries"]}
    assert set(losses) == {1e-3, 1e-2}
    assert result is not None
    for rate, loss in losses.items():
        alone = config(tmp_path, engine, **{"train.learning_rate": rate, "output": str(tmp_path / f"alone-{rate}")})
        alone = alone.model_copy(update={"sweep": None})
        assert manylora.train(alone).summary["eval"]["loss"] == pytest.approx(loss, rel=1e-3)
