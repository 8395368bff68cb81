from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data import batches
from manylora.data.batches import Epochs
from manylora.data.example import Example


def example(tokens, trained) -> Example:
    return Example(np.array(tokens, np.int32), np.array(trained, np.bool_), 1, "", "", "", "f", 1)


def examples_of(lengths) -> list[Example]:
    """Examples whose tokens are all different, so that any mix-up shows."""
    starts = np.cumsum([100, *lengths])
    return [example(range(at, at + n), [False] + [True] * (n - 1)) for at, n in zip(starts, lengths, strict=False)]


@st.composite
def example_lists(draw):
    lengths = draw(st.lists(st.integers(2, 24), min_size=1, max_size=60))
    made = []
    for one in examples_of(lengths):
        trained = draw(st.lists(st.booleans(), min_size=len(one) - 1, max_size=len(one) - 1))
        made.append(example(one.tokens, [False, *trained]))
    return made


@given(example_lists(), st.booleans(), st.integers(0, 3), st.integers(0, 2**32))
def test_a_plan_holds_every_example_once_and_no_row_overflows(examples, packs, epoch, seed):
    rows = Epochs(examples, row_tokens=24, seed=seed, packs=packs).rows(epoch)
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    assert all(sum(len(examples[index]) for index in row) <= 24 for row in rows)
    assert packs or all(len(row) == 1 for row in rows)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="rows of 3"):
        Epochs(examples_of([4]), row_tokens=3, seed=0, packs=True)


@pytest.mark.parametrize("packs", [True, False])
def test_a_plan_is_a_function_of_seed_and_epoch_alone(packs):
    examples = examples_of([2 + number % 19 for number in range(300)])
    plan = Epochs(examples, row_tokens=24, seed=3, packs=packs)
    plans = [list(plan.rows(epoch)) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]
    assert list(Epochs(examples, row_tokens=24, seed=3, packs=packs).rows(1)) == plans[1]
    assert list(Epochs(examples, row_tokens=24, seed=4, packs=packs).rows(1)) != plans[1]
    Epochs(examples, row_tokens=24, seed=-1, packs=packs).rows(0)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("window", [4096, 50])
def test_total_rows_is_what_the_epochs_hold(packs, window, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", window)
    examples = examples_of([2 + number % 19 for number in range(300)])
    counts = [len(Epochs(examples, row_tokens=24, seed=0, packs=packs).rows(epoch)) for epoch in range(3)]
    plan = Epochs(examples, row_tokens=24, seed=0, packs=packs)
    assert plan.total_rows(3) == sum(counts)
    assert plan.total_rows(1.5) == counts[0] + -(-counts[1] // 2)
    assert [plan.num_rows(epoch) for epoch in range(3)] == counts


def test_rows_of_like_length_stand_together_when_nothing_is_packed():
    lengths = np.random.default_rng(0).integers(2, 200, size=2000).tolist()
    rows = Epochs(examples_of(lengths), row_tokens=256, seed=0, packs=False).rows(0)
    groups = [[lengths[index] for (index,) in rows[start : start + 4]] for start in range(0, len(rows), 4)]
    padded = sum(max(group) * len(group) for group in groups)
    assert sum(lengths) / padded > 0.97


@pytest.mark.parametrize("packs", [True, False])
def test_weights_say_how_often_an_epoch_shows_each_run_of_examples(packs, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 32)
    examples = examples_of([2 + number % 19 for number in range(100)])
    plan = Epochs(examples, row_tokens=24, seed=3, packs=packs, weights=((20, 2.5), (40, 0.25), (40, 1.0)))
    counts = [Counter(index for row in plan.rows(epoch) for index in row) for epoch in (0, 1)]
    for count in counts:
        assert {count[index] for index in range(20)} == {2, 3}
        assert sum(count[index] == 3 for index in range(20)) == 10
        assert sum(count[index] for index in range(20, 60)) == 10
        assert all(count[index] == 1 for index in range(60, 100))
    assert counts[0] != counts[1]
    assert plan.total_rows(2) == len(plan.rows(0)) + len(plan.rows(1))
    with pytest.raises(ValueError, match="weights of 90 examples"):
        Epochs(examples, row_tokens=24, seed=3, packs=packs, weights=((90, 1.0),))
