"""Every recipe runs on the builtin base."""

from __future__ import annotations

from pathlib import Path

import pytest

import manylora
from manylora.config import load_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    small = {"train.steps": 2, "evaluate.max_examples": 4, "evaluate.max_new_tokens": 4}
    run = manylora.train
    if load_config(recipe).sweep is not None:
        run, small = manylora.sweep, small | {"sweep.trials": 3}
    result = run(recipe, overrides={**small, "output": str(tmp_path / "run")})
    assert (result.run / "report.html").is_file()
    assert result.summary["eval"]["loss"] > 0
