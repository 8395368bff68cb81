from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from manylora.errors import ConfigError, UnknownName
from manylora.training.schedule import SCHEDULES, rate_at

DECAYING = [name for name in SCHEDULES if name != "constant"]


def rates(schedule: str, total: int, warmup: int, floor: float = 0.0) -> list[float]:
    return [
        rate_at(step, schedule=schedule, total_steps=total, warmup_steps=warmup, peak=1.0, floor=floor)
        for step in range(total + 1)
    ]


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_first_step_learns_and_warmup_ends_at_the_peak(schedule):
    seen = rates(schedule, total=100, warmup=10)
    assert seen[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert seen[10] == 1.0


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_without_warmup_the_first_step_has_the_peak(schedule):
    assert rates(schedule, total=50, warmup=0)[0] == 1.0


@pytest.mark.parametrize("schedule", DECAYING)
def test_decay_is_monotone_and_continuous_and_reaches_the_floor_one_step_after_the_last(schedule):
    seen = rates(schedule, total=1000, warmup=100, floor=0.1)
    decay = seen[100:]
    steps = [before - after for before, after in itertools.pairwise(decay)]
    assert min(steps) >= 0.0
    assert max(steps) < 0.01
    assert seen[-1] == pytest.approx(0.1)
    assert seen[-2] > 0.1


def test_constant_stays_at_the_peak_past_the_end():
    assert rate_at(500, schedule="constant", total_steps=100, warmup_steps=3, peak=2e-4) == 2e-4


def test_wsd_is_stable_for_four_fifths_after_warmup():
    seen = rates("wsd", total=110, warmup=10)
    assert seen[9:91] == pytest.approx([1.0] * 82)
    assert seen[100] == pytest.approx(0.5)


def test_polynomial_is_quadratic():
    assert rates("polynomial", total=100, warmup=0)[50] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_decay_equals_transformers_and_warmup_is_one_step_ahead(schedule, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = theirs(optimizer, num_warmup_steps=7, num_training_steps=60)
    reference = []
    for _ in range(61):
        reference.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    seen = rates(schedule, total=60, warmup=7)
    assert seen[:7] == pytest.approx(reference[1:8])
    assert seen[7:] == pytest.approx(reference[7:])


@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    step=st.integers(0, 300),
    total=st.integers(0, 200),
    warmup=st.integers(0, 250),
    floor=st.floats(0, 1),
)
def test_every_rate_lies_between_zero_and_the_peak_even_when_warmup_outlasts_the_run(
    schedule, step, total, warmup, floor
):
    rate = rate_at(step, schedule=schedule, total_steps=total, warmup_steps=warmup, peak=1.0, floor=floor)
    assert 0.0 <= rate <= 1.0


def test_an_unknown_schedule_is_named_with_its_neighbour():
    with pytest.raises(UnknownName, match="nearest: cosine"):
        rate_at(0, schedule="cosin", total_steps=1, warmup_steps=0, peak=1.0)


@pytest.mark.parametrize("wrong", [{"floor": 2.0}, {"floor": -0.1}, {"warmup_steps": -1}, {"total_steps": -1}])
def test_settings_that_make_no_sense_are_refused(wrong):
    settings = {"schedule": "cosine", "total_steps": 10, "warmup_steps": 0, "peak": 1.0, "floor": 0.0} | wrong
    with pytest.raises(ConfigError):
        rate_at(0, **settings)
