from __future__ import annotations

import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.deal import Step, admissible, deal

WIDTHS = st.integers(1, 12).map(lambda eighths: 8 * eighths)
STEPS = st.lists(st.builds(Step, st.lists(WIDTHS, max_size=6).map(tuple), st.integers(1, 4)), max_size=5)
BUDGETS = st.none() | st.integers(8, 300)
FIXED = st.integers(0, 100)

Batch = list[tuple[int, int]]


def computed(steps: list[Step], batch: Batch) -> int:
    return len(batch) * max(steps[step].widths[row] for step, row in batch)


def cost(steps: list[Step], batches: list[Batch], fixed: int) -> int:
    return sum(fixed + computed(steps, batch) for batch in batches)


def allowed(steps: list[Step], batch: Batch, budget: int | None) -> bool:
    """The rules of a batch, said anew."""
    counts = [sum(1 for step, _ in batch if step == index) for index in range(len(steps))]
    shared = all(
        count <= math.ceil(len(step.widths) / step.parts) for count, step in zip(counts, steps, strict=True) if count
    )
    return shared and (budget is None or len(batch) == 1 or computed(steps, batch) <= budget)


def partitions(rows: Batch) -> Iterator[list[Batch]]:
    """Every way to share out rows."""
    if not rows:
        yield []
        return
    head, *rest = rows
    for smaller in partitions(rest):
        yield [[head], *smaller]
        for index, batch in enumerate(smaller):
            yield [*smaller[:index], [head, *batch], *smaller[index + 1 :]]


def least_cost(steps: list[Step], budget: int | None, fixed: int) -> int:
    rows = [(index, row) for index, step in enumerate(steps) for row in range(len(step.widths))]
    return min(
        cost(steps, batches, fixed)
        for batches in partitions(rows)
        if all(allowed(steps, batch, budget) for batch in batches)
    )


@given(STEPS, BUDGETS, FIXED)
def test_every_row_is_dealt_once_and_no_batch_breaks_a_rule(steps, budget, fixed):
    batches = deal(steps, budget, fixed_tokens=fixed)
    dealt = [pair for batch in batches for pair in batch]
    assert sorted(dealt) == [(index, row) for index, step in enumerate(steps) for row in range(len(step.widths))]
    assert all(batch and allowed(steps, batch, budget) for batch in batches)
    assert all(batch == sorted(batch) for batch in batches)


@given(st.lists(st.lists(WIDTHS, min_size=1, max_size=3), min_size=1, max_size=3), BUDGETS, FIXED)
@settings(max_examples=examples(60), deadline=None)
def test_no_division_is_cheaper_where_nobody_accumulates(rows, budget, fixed):
    steps = [Step(tuple(widths)) for widths in rows][: 3 if sum(map(len, rows)) < 8 else 2]
    assert cost(steps, deal(steps, budget, fixed_tokens=fixed), fixed) == least_cost(steps, budget, fixed)


@given(st.lists(WIDTHS, min_size=1, max_size=7), st.integers(1, 7), BUDGETS, FIXED)
@settings(max_examples=examples(60), deadline=None)
def test_no_division_is_cheaper_for_one_member_that_accumulates(widths, parts, budget, fixed):
    steps = [Step(tuple(widths), parts)]
    assert cost(steps, deal(steps, budget, fixed_tokens=fixed), fixed) == least_cost(steps, budget, fixed)


@given(STEPS, FIXED)
def test_a_fleet_that_accumulates_is_never_dearer_than_its_parts_together(steps, fixed):
    parts: dict[int, Batch] = {}
    for index, step in enumerate(steps):
        share = max(1, math.ceil(len(step.widths) / step.parts))
        for place, row in enumerate(sorted(range(len(step.widths)), key=lambda row, step=step: -step.widths[row])):
            parts.setdefault(place // share, []).append((index, row))
    assert cost(steps, deal(steps, None, fixed_tokens=fixed), fixed) <= cost(steps, list(parts.values()), fixed)


def test_members_that_accumulate_alike_make_as_many_batches_as_one():
    fleet = [Step((width,) * 4, parts=4) for width in (512, 504, 496, 504)]
    assert deal(fleet, None) == [[(0, part), (1, part), (2, part), (3, part)] for part in range(4)]


def test_neighbours_fill_one_batch_and_a_wide_row_stands_alone():
    steps = [Step((16, 16)), Step((512,)), Step((16,))]
    assert deal(steps, None) == [[(1, 0)], [(0, 0), (0, 1), (2, 0)]]


def test_a_row_a_little_wider_joins_its_neighbours():
    assert deal([Step((16, 16)), Step((24,))], None) == [[(0, 0), (0, 1), (1, 0)]]


def test_a_row_above_the_budget_is_a_batch_of_its_own():
    assert deal([Step((64, 8, 8))], 16) == [[(0, 0)], [(0, 1), (0, 2)]]


def test_the_widest_rows_come_first():
    batches = deal([Step((8, 256, 64, 128))], 8)
    assert batches == [[(0, 1)], [(0, 3)], [(0, 2)], [(0, 0)]]


def test_a_budget_splits_a_member_and_its_rows_stay_in_order():
    assert deal([Step((8,) * 5)], 16) == [[(0, 0)], [(0, 1), (0, 2)], [(0, 3), (0, 4)]]


@given(STEPS, BUDGETS)
def test_equal_inputs_are_dealt_alike(steps, budget):
    copies = [Step(tuple(step.widths), step.parts) for step in steps]
    assert deal(steps, budget) == deal(copies, budget)


def test_nothing_is_dealt_to_nobody():
    assert deal([], None) == []
    assert deal([Step(()), Step((), parts=3)], 8) == []


@pytest.mark.parametrize(("widths", "parts"), [((8,), 0), ((8, 0), 1)])
def test_a_step_that_cannot_be_is_refused(widths, parts):
    with pytest.raises(ValueError, match="a step of rows"):
        Step(widths, parts)


@pytest.mark.alone
@pytest.mark.parametrize("budget", [None, 2048])
def test_a_large_fleet_is_dealt_in_milliseconds(budget):
    draw = random.Random(0)
    steps = [Step(tuple(8 * draw.randint(1, 64) for _ in range(8)), 1 + index % 3) for index in range(64)]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        deal(steps, budget)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.02


def test_the_plan_needs_no_torch():
    code = "import sys, manylora.training.deal; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- who may join ------------------------------------------------------------------------------------------------------


def test_those_at_the_head_join_while_bytes_and_slots_last():
    assert admissible([3, 3, 3], 7, free_slots=8, resident=1) == 2
    assert admissible([3, 3, 3], 9, free_slots=8, resident=1) == 3
    assert admissible([3, 3, 3], 9, free_slots=2, resident=1) == 2
    assert admissible([3], 9, free_slots=0, resident=0) == 0
    assert admissible([], 9, free_slots=2, resident=0) == 0


def test_a_big_one_at_the_head_is_not_overtaken():
    assert admissible([10, 1, 1], 5, free_slots=8, resident=1) == 0


def test_one_alone_is_always_let_in_and_takes_the_room_it_takes():
    assert admissible([10, 1], 5, free_slots=8, resident=0) == 1
    assert admissible([5, 1], 5, free_slots=8, resident=0) == 1
    assert admissible([4, 1], 5, free_slots=8, resident=0) == 2


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1, max_size=12),
    st.integers(0, 25),
    st.integers(1, 4),
)
def test_everyone_starts_in_order_and_the_room_is_kept(members, room, slots):
    waiting = list(enumerate(members))
    resident: dict[int, list[int]] = {}  # bytes, and ticks that are left
    started: list[int] = []
    for _ in range(sum(ticks for _, ticks in members)):
        free = room - sum(held for held, _ in resident.values())
        count = admissible(
            [held for _, (held, _) in waiting], free, free_slots=slots - len(resident), resident=len(resident)
        )
        for number, (held, ticks) in waiting[:count]:
            resident[number] = [held, ticks]
            started.append(number)
        waiting = waiting[count:]
        assert resident, "the fleet stands still"
        assert len(resident) <= slots
        assert len(resident) == 1 or sum(held for held, _ in resident.values()) <= room
        for number in list(resident):
            resident[number][1] -= 1
            if not resident[number][1]:
                del resident[number]
        if not waiting and not resident:
            break
    assert started == list(range(len(members)))
