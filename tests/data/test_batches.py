from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora.data import batches
from manylora.data.batches import Epochs, collate
from manylora.data.examples import Example
from manylora.types import IGNORED

PAD = 7


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


@given(example_lists())
def test_packed_rows_keep_every_learned_token_once_and_never_cross_sequences(examples):
    rows = Epochs(examples, row_tokens=32, seed=0, packs=True).rows(0)
    batch = collate(
        [[examples[index] for index in row] for row in rows], width=32, pad_id=PAD, packed=True, slots=[0] * len(rows)
    )
    tokens, labels, positions = batch.inputs["input_ids"], batch.targets["labels"], batch.inputs["position_ids"]
    learned = Counter(labels[labels != IGNORED].tolist())
    assert learned == Counter(token for one in examples for token in one.tokens[one.trained].tolist())
    for row, column in (labels != IGNORED).nonzero().tolist():
        assert labels[row, column] == tokens[row, column + 1]
        assert positions[row, column + 1] == positions[row, column] + 1


def test_packed_positions_restart_and_the_padding_is_one_more_run():
    first, second = examples_of([3, 4])
    batch = collate([[first, second], [second]], width=64, pad_id=PAD, packed=True, slots=[0, -1], streams=[5, 6])
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    assert batch.inputs["input_ids"].tolist() == [
        [100, 101, 102, 103, 104, 105, 106, PAD],
        [103, 104, 105, 106, PAD, PAD, PAD, PAD],
    ]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 3]]
    none = IGNORED
    assert batch.targets["labels"].tolist() == [
        [101, 102, none, 104, 105, 106, none, none],
        [104, 105, 106, none, none, none, none, none],
    ]
    assert batch.slots == (0, -1)
    assert batch.streams == (5, 6)
    assert batch.targets["labels"].dtype == batch.inputs["input_ids"].dtype == torch.int64


def test_padded_rows_have_a_mask_and_plain_positions():
    batch = collate([[one] for one in examples_of([3, 9])], width=64, pad_id=PAD, packed=False, slots=[0, 0])
    mask = batch.inputs["attention_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 9]
    assert mask.shape == (2, 16)
    assert mask[0].tolist() == [True] * 3 + [False] * 13
    assert (batch.inputs["input_ids"][~mask] == PAD).all()
    assert (batch.targets["labels"][~mask] == IGNORED).all()
    assert batch.inputs["position_ids"][0].tolist() == list(range(3)) + list(range(13))
    assert batch.streams is None


@pytest.mark.parametrize(
    ("lengths", "width", "expected"), [([8], 64, 8), ([9], 64, 16), ([9], 10, 10), ([3, 20], 64, 24)]
)
def test_the_width_is_the_longest_row_in_steps_of_8_and_at_most_the_limit(lengths, width, expected):
    batch = collate(
        [[one] for one in examples_of(lengths)], width=width, pad_id=PAD, packed=True, slots=[0] * len(lengths)
    )
    assert batch.inputs["input_ids"].shape[1] == expected


def test_an_untrained_token_is_no_label():
    batch = collate([[example([1, 2, 3, 4], [False, False, True, False])]], width=8, pad_id=0, packed=True, slots=[0])
    assert batch.targets["labels"][0, :4].tolist() == [IGNORED, 3, IGNORED, IGNORED]


def test_a_batch_that_cannot_be_is_refused():
    first, second = examples_of([3, 4])
    with pytest.raises(ValueError, match="holds one example"):
        collate([[first, second]], width=8, pad_id=0, packed=False, slots=[0])
    with pytest.raises(ValueError, match="row of 7 tokens"):
        collate([[first, second]], width=6, pad_id=0, packed=True, slots=[0])
    with pytest.raises(ValueError, match="2 slots"):
        collate([[first]], width=8, pad_id=0, packed=True, slots=[0, 0])
    with pytest.raises(ValueError, match="rows of 3"):
        Epochs([second], row_tokens=3, seed=0, packs=True)


@pytest.mark.parametrize("packs", [True, False])
def test_a_plan_is_a_function_of_seed_and_epoch_alone(packs):
    examples = examples_of([2 + number % 19 for number in range(300)])
    plan = Epochs(examples, row_tokens=24, seed=3, packs=packs)
    plans = [plan.rows(epoch) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] != plans[1]
    assert Epochs(examples, row_tokens=24, seed=3, packs=packs).rows(1) == plans[1]
    assert Epochs(examples, row_tokens=24, seed=4, packs=packs).rows(1) != plans[1]
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
