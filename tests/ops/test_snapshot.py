"""What is derived from tensors holds until one of them changes, or another stands in its place."""

from __future__ import annotations

import pytest
import torch
from fleets import member, ragged
from optimizers import KINDS
from random_bases import language_base

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.ops.snapshot import Snapshot
from manylora.spec import AdapterSpec
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import StackedOptimizer
from manylora.training.step import train_step


def test_a_snapshot_holds_for_the_same_tensors_unchanged() -> None:
    one, two = torch.zeros(3), torch.ones(2)
    taken = Snapshot([one, two])
    assert taken.holds([one, two])
    assert not taken.holds([two, one])
    assert not taken.holds([one])
    assert not taken.holds([one.clone(), two])
    one[1:].add_(1)
    assert not taken.holds([one, two])
    taken = Snapshot([one])
    del one
    assert not taken.holds([torch.zeros(3)])
    with torch.inference_mode():
        unseen = torch.zeros(2)
        assert not Snapshot([unseen]).holds([unseen])


@pytest.mark.parametrize("optimizer", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_what_a_step_has_changed_is_seen_by_all_that_was_derived(method: str, optimizer: str) -> None:
    """Some of torch's kernels write past its own count of changes."""
    base = language_base("gpt2")
    inputs = base.example(2)
    own = member("own", ragged(8), spec=AdapterSpec(method=method, rank=4), optimizer=optimizer, weight_decay=0.0)
    with Bank(base, dtype=torch.float64) as bank:
        bank.put(Adapter.new(base, own.spec), slot=0)
        own.sit([0])
        rules = {own.recipe.optimizer.name: StackedOptimizer(bank, OPTIMIZERS.get(own.recipe.optimizer.name))}
        for _ in range(2):
            with torch.no_grad(), bank.route((0, 0)):
                base.model(**inputs)
            train_step(base, rules, [own])
            own.step += 1
        with bank.route((0, 0)):
            want = base.model(**inputs).logits.detach()
            with torch.no_grad():
                found = base.model(**inputs).logits
        trained = bank.get(0)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    with Bank(base, dtype=torch.float64) as bank:  # nothing was derived here before
        bank.put(trained, slot=0)
        with torch.no_grad(), bank.route((0, 0)):
            torch.testing.assert_close(base.model(**inputs).logits, want, rtol=1e-9, atol=1e-9)
