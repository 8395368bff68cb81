"""What every objective owes: values by hand, gradients of plain autograd in float64, no say in how rows are split.

An objective that joins the table is held to all of it, and must bring its own value by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from random_bases import fill, language_base, ragged_batch
from torch import Tensor, nn
from torch.nn import functional

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel, ModuleOutputs
from manylora.objectives import OBJECTIVES, SETTINGS
from manylora.objectives.forward import Aim
from manylora.objectives.objective import objective_of
from manylora.objectives.settings import DistillSettings
from manylora.spec import AdapterSpec
from manylora.training.step import backward, drop_gradients
from manylora.types import IGNORED, Batch

SPECS = (AdapterSpec(rank=4, dropout=0.1), AdapterSpec(rank=2, dropout=0.1), AdapterSpec(rank=8, dropout=0.1))
KINDS: dict[str, tuple[str, Any]] = {name: (name, None) for name in OBJECTIVES} | {
    "distill from the start": ("distill", DistillSettings(teacher="start", temperature=3.0, weight=0.8)),
    "distill alone": ("distill", DistillSettings(weight=1.0, temperature=1.0)),
}
"""Every objective as it is, and with settings of its own; all of SETTINGS must be here."""


@dataclass(frozen=True)
class _By:
    """A value by hand: outputs of one row's two places, labels, a teacher's outputs, and the row's total."""

    total: float
    weight: float


# Logits (0, ln 3) at one place and (0, 0) at the next; labels 1 and 0; the teacher has (0, 0) at both.
LOGITS = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]], dtype=torch.float64)
LABELS = torch.tensor([[1, 0]])
_NATS = -math.log(0.75), math.log(2)
# At temperature 2 the first place has (1, sqrt 3) / (1 + sqrt 3); KL of (1/2, 1/2) from it.
_ROOT = math.sqrt(3)
_KL_2 = -0.5 * math.log(4 * _ROOT / (1 + _ROOT) ** 2)
_KL_3 = -0.5 * math.log(4 * 3 ** (1 / 3) / (1 + 3 ** (1 / 3)) ** 2)
_KL_1 = -0.5 * math.log(4 * 0.25 * 0.75)
BY_HAND = {
    "causal-lm": _By(sum(_NATS), 2),
    "classification": _By(_NATS[0], 1),
    "distill": _By(0.5 * 4 * _KL_2 + 0.5 * sum(_NATS), 2),
    "distill from the start": _By(0.8 * 9 * _KL_3 + 0.2 * sum(_NATS), 2),
    "distill alone": _By(_KL_1, 2),
}


class _Flat:
    """A teacher whose logits are all alike."""

    state: ClassVar[dict[str, Tensor]] = {}

    def outputs(self, batch: Batch, who: str = "base") -> Any:
        return ModuleOutputs(torch.zeros_like(LOGITS))


def test_every_setting_is_tested() -> None:
    assert {name for name, settings in KINDS.values() if settings is not None} == set(SETTINGS)
    assert set(BY_HAND) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_by_hand(kind: str) -> None:
    objective = objective_of(*KINDS[kind])
    rows = objective.supervises == frozenset({"rows"})
    logits, labels = (LOGITS[:, 0], LABELS[:, 0]) if rows else (LOGITS, LABELS)
    batch = Batch(inputs={}, targets={"labels": labels}, slots=(0,))
    totals = objective(ModuleOutputs(logits), batch, _Flat())
    assert totals.total.item() == pytest.approx(BY_HAND[kind].total, rel=1e-12)
    assert objective.weight(batch).tolist() == [BY_HAND[kind].weight]


def module_base() -> FrozenModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 9)).double()
    return FrozenModel(net, example=lambda rows: {"input": torch.randn(rows, 9, dtype=torch.float64)})


def module_batch(base: FrozenModel, slots: tuple[int, ...]) -> Batch:
    draw = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 5, (len(slots),), generator=draw)
    labels[1] = IGNORED
    x = torch.randn(len(slots), 9, generator=draw, dtype=torch.float64)
    return Batch(inputs={"input": x}, targets={"labels": labels}, slots=slots, streams=tuple(range(len(slots))))


BASES: dict[str, tuple[Callable[[], FrozenModel], Callable[..., Batch]]] = {
    "positions": (language_base, ragged_batch),
    "rows": (module_base, module_batch),
}
CASES = [(kind, where) for kind in KINDS for where in sorted(OBJECTIVES.get(KINDS[kind][0]).supervises)]


def aims_of(objective: Any, slots: tuple[int, ...], start: int) -> dict[int, Aim]:
    followers = dict.fromkeys(objective.followers, start)
    return {slot: Aim(objective, followers, objective.begin()) for slot in dict.fromkeys(slots)}


def bank_of(base: FrozenModel) -> Bank:
    bank = Bank(base, num_slots=4, dtype=torch.float64)
    fill(bank, SPECS)
    bank.put(Adapter.new(base, SPECS[0], seed=9), slot=3)
    return bank


def gradients(bank: Bank) -> dict[str, Tensor]:
    found = {
        f"{key} {name}": torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        for key, stack in bank.stacks.items()
        for name, tensor in stack.tensors.items()
    }
    drop_gradients(bank)
    return found


@pytest.mark.parametrize("parts", [1, 2, 6])
@pytest.mark.parametrize(("kind", "where"), CASES)
def test_splitting_a_step_changes_nothing(kind: str, where: str, parts: int) -> None:
    make, batch_of = BASES[where]
    base, slots = make(), (0, 2, 1, 0, 2, 1)
    batch = batch_of(base, slots)
    aims = aims_of(objective_of(*KINDS[kind]), slots, 3)
    size = len(slots) // parts
    with bank_of(base) as bank:
        whole = backward(base, aims, [batch]).losses()
        once = gradients(bank)
        pieces = [batch.take(range(first, first + size)) for first in range(0, len(slots), size)]
        assert backward(base, aims, pieces).losses() == pytest.approx(whole, rel=1e-12)
        for key, value in gradients(bank).items():
            torch.testing.assert_close(value, once[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "where"), CASES)
def test_gradients_are_those_of_plain_autograd_in_float64(kind: str, where: str) -> None:
    """Row by row, from the model's own logits whole, dropout on, ragged, the bare base beside adapters."""
    make, batch_of = BASES[where]
    base, slots = make(), (0, 2, -1, 1, 0, 2)
    objective = objective_of(*KINDS[kind])
    batch = batch_of(base, slots)
    aims = aims_of(objective, slots, 3)
    with bank_of(base) as bank:
        losses = backward(base, aims, [batch]).losses()
        found = gradients(bank)
        weights = {slot: float(objective.weight(batch.only([slot])).sum()) for slot in aims}
        totals = []
        for row, slot in enumerate(slots):
            alone = batch.take([row])
            with bank.route((slot,), alone.streams):
                own = base.outputs(alone).whole_rows()
            teacher = -1 if "teacher" not in objective.followers else 3
            with torch.no_grad(), bank.route((teacher,)):
                others = base.outputs(replace(alone, streams=None)).whole_rows()
            totals.append(IN_AUTOGRAD[KINDS[kind][0]](objective, own[0], alone.targets["labels"][0], others[0]))
        sum(total / weights[slot] for total, slot in zip(totals, slots, strict=True)).backward()
        for key, value in gradients(bank).items():
            assert (found[key] - value).norm() <= 1e-10 * (1 + value.norm()), key
        for slot in aims:
            total = sum(total.item() for total, owner in zip(totals, slots, strict=True) if owner == slot)
            assert losses[slot] == pytest.approx(total / weights[slot], rel=1e-10)


def nats_in_autograd(objective: Any, logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def distilled_in_autograd(objective: Any, logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    settings = objective.own
    chosen = labels.ne(IGNORED)
    p = (others / settings.temperature).softmax(-1)
    apart = (p * (p.log() - (logits / settings.temperature).softmax(-1).log())).sum(-1)
    divergence = settings.temperature**2 * (apart * chosen).sum()
    nats = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return settings.weight * divergence + (1 - settings.weight) * nats


IN_AUTOGRAD = {"causal-lm": nats_in_autograd, "classification": nats_in_autograd, "distill": distilled_in_autograd}
