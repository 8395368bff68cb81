"""Plans of which places change which rows are found again while rows come and go, and never when they are stale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_bases import fill, language_base

from manylora.adapters import bank as bank_module
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.spec import AdapterSpec

SPECS = (AdapterSpec(rank=2), AdapterSpec(rank=2), AdapterSpec(rank=4, full_sites=("norm",)))


def logits(base: Any, slots: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad(), base.bank.route(slots):
        return base.model(input_ids=torch.arange(5 * len(slots)).view(len(slots), 5) % 90).logits


def counted(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    real = bank._plan

    def plan(route: Any, site: Any, stacks: Any, x: Any) -> Any:
        made.append(site.name)
        return real(route, site, stacks, x)

    monkeypatch.setattr(bank, "_plan", plan)
    return made


def test_a_put_elsewhere_leaves_the_plans_of_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    base = language_base()
    with Bank(base, num_slots=4, dtype=torch.float64) as bank:
        fill(bank, SPECS)
        made = counted(bank, monkeypatch)
        before = logits(base, (0, 2, 0))
        assert made
        del made[:]
        bank.put(Adapter.new(base, AdapterSpec(rank=2), seed=9), slot=3)  # a new place behind the others
        assert torch.equal(logits(base, (0, 2, 0)), before)
        assert made == []
        logits(base, (0, 3))
        assert made


@pytest.mark.parametrize("change", ["put", "clear", "other ranks"])
def test_no_plan_outlives_what_it_was_made_of(change: str) -> None:
    base, fresh = language_base(), language_base()
    rows = (0, 1, 2, -1)
    with Bank(base, num_slots=3, dtype=torch.float64) as bank, Bank(fresh, num_slots=3, dtype=torch.float64) as other:
        fill(bank, SPECS)
        fill(other, SPECS)
        logits(base, rows)
        logits(base, (1, 2))
        for one in (bank, other):
            if change == "put":
                one.put(other.get(0), slot=1)
            elif change == "clear":
                one.clear(0)  # the others move up
            else:
                one.put(Adapter.new(one.base, AdapterSpec(rank=7, sites=("q_proj",)), seed=3), slot=1)
        kept = (1, 2, -1) if change == "clear" else rows
        assert torch.equal(logits(base, kept), logits(fresh, kept))
        assert torch.equal(logits(base, (1, 2)), logits(fresh, (1, 2)))


def test_what_is_in_use_stays_when_plans_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    base = language_base()
    monkeypatch.setattr(bank_module, "MAX_PLANS", 100)
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank, SPECS)
        made = counted(bank, monkeypatch)
        for length in range(1, 9):
            logits(base, (0,) * length)
            del made[:]
            logits(base, (0,) * length)
            assert made == []
        assert len(bank._plans) <= 100
