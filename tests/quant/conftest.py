"""Every format of the table with the options that change its tensors."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.quant import PACKINGS

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "nf4": [{}, {"double_quant": False}, {"block": 128}, {"block": 2048}],
    "fp4": [{}, {"double_quant": False, "block": 32}],
    "int8": [{}, {"block": 32}],
    "int4": [{}, {"block": 32}, {"symmetric": True}],
}
CASES = [(name, options) for name in PACKINGS for options in OPTIONS.get(name, [{}])]


def case_name(case: tuple[str, dict[str, Any]]) -> str:
    name, options = case
    return "-".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture(params=CASES, ids=case_name)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param
