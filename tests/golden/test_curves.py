"""Loss curves stand where they stood: no change of the code's shape moves what is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_curves import CASES, RECORDED, curve_of


@pytest.mark.parametrize("case", CASES)
def test_a_curve_is_what_it_was(case: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[case]
    curve = curve_of(case, tmp_path)
    assert curve.keys() == recorded.keys()
    for name, values in curve.items():
        # Other processors add up in another order: a part in a million after eight steps.
        assert values == pytest.approx(recorded[name], rel=1e-4 if name.endswith("norm") else 1e-5), name
