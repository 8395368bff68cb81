from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora.data.collate import collate
from manylora.data.example import Example
from manylora.data.packing import pack
from manylora.types import IGNORED

PAD = 7
PACKINGS = ("positions", "mask")


def example(tokens, trained) -> Example:
    return Example(np.array(tokens, np.int32), np.array(trained, np.bool_), 1, "", "", "", "f", 1)


def examples_of(lengths) -> list[Example]:
    """Examples whose tokens are all different, so that any mix-up shows."""
    starts = np.cumsum([100, *lengths])
    return [example(range(at, at + n), [False] + [True] * (n - 1)) for at, n in zip(starts, lengths, strict=False)]


@st.composite
def packed_rows(draw):
    made = []
    for one in examples_of(draw(st.lists(st.integers(2, 24), min_size=1, max_size=40))):
        trained = draw(st.lists(st.booleans(), min_size=len(one) - 1, max_size=len(one) - 1))
        made.append(example(one.tokens, [False, *trained]))
    return [[made[index] for index in row] for row in pack([len(one) for one in made], 32)]


def collated(rows, *, packing="positions", causal=True, width=32, **more):
    return collate(rows, width=width, pad_id=PAD, packing=packing, causal=causal, slots=[0] * len(rows), **more)


@given(packed_rows(), st.sampled_from(PACKINGS), st.booleans())
def test_packed_rows_keep_every_learned_token_once_and_never_cross_sequences(rows, packing, causal):
    batch = collated(rows, packing=packing, causal=causal)
    tokens, labels, positions = batch.inputs["input_ids"], batch.targets["labels"], batch.inputs["position_ids"]
    learned = Counter(labels[labels != IGNORED].tolist())
    assert learned == Counter(token for row in rows for one in row for token in one.tokens[one.trained].tolist())
    for row, column in (labels != IGNORED).nonzero().tolist():
        assert labels[row, column] == tokens[row, column + 1]
        assert positions[row, column + 1] == positions[row, column] + 1


@given(packed_rows(), st.booleans())
def test_a_token_sees_its_own_sequence_and_nothing_else(rows, causal):
    mask = collated(rows, packing="mask", causal=causal).inputs["attention_mask"]
    width = mask.shape[-1]
    assert mask.dtype == torch.bool
    assert mask.shape == (len(rows), 1, width, width)
    for row, examples in enumerate(rows):
        owner = [index for index, one in enumerate(examples) for _ in range(len(one))]
        used = len(owner)
        for query in range(used):
            wanted = [owner[key] == owner[query] and (key <= query or not causal) for key in range(used)]
            assert mask[row, 0, query].tolist() == wanted + [False] * (width - used)
    assert mask.any(-1).all()  # padding too: attention over nothing is NaN
    assert causal == (not mask.triu(1).any())


def test_packed_positions_restart_and_padding_is_one_more_sequence():
    first, second = examples_of([3, 4])
    batch = collate([[first, second], [second]], width=64, pad_id=PAD, packing="positions", causal=True, slots=[0, -1],
                    streams=[5, 6])  # fmt: skip
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


@pytest.mark.parametrize("packing", PACKINGS)
def test_padding_needs_no_position_that_no_example_needs(packing):
    """A row may be longer than the positions that a base has: its sequences are not, and its padding must not be."""
    long, short = examples_of([9] * 4), examples_of([3])
    batch = collated([long, short], packing=packing, width=64)
    assert batch.inputs["position_ids"].max() == 8
    assert batch.inputs["position_ids"][1].tolist() == [0, 1, 2, *[*range(9)] * 4, 0]


def test_padded_rows_have_a_mask_and_plain_positions():
    batch = collated([[one] for one in examples_of([3, 9])], packing="none")
    mask = batch.inputs["attention_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [3, 9]
    assert mask.shape == (2, 16)
    assert mask[0].tolist() == [True] * 3 + [False] * 13
    assert (batch.inputs["input_ids"][~mask] == PAD).all()
    assert (batch.targets["labels"][~mask] == IGNORED).all()
    assert batch.inputs["position_ids"][1, :9].tolist() == list(range(9))
    assert batch.inputs["position_ids"].max() == 8
    assert batch.streams is None


@pytest.mark.parametrize(
    ("lengths", "width", "expected"), [([8], 64, 8), ([9], 64, 16), ([9], 10, 10), ([3, 20], 64, 24)]
)
def test_the_width_is_the_longest_row_in_steps_of_8_and_at_most_the_limit(lengths, width, expected):
    batch = collated([[one] for one in examples_of(lengths)], width=width)
    assert batch.inputs["input_ids"].shape[1] == expected


def test_an_untrained_token_is_no_label():
    batch = collated([[example([1, 2, 3, 4], [False, False, True, False])]])
    assert batch.targets["labels"][0, :4].tolist() == [IGNORED, 3, IGNORED, IGNORED]


def test_a_batch_that_cannot_be_is_refused():
    first, second = examples_of([3, 4])
    options = {"pad_id": 0, "causal": True, "width": 8, "packing": "positions"}
    with pytest.raises(ValueError, match="holds one example"):
        collate([[first, second]], **{**options, "packing": "none"}, slots=[0])
    with pytest.raises(ValueError, match="row of 7 tokens"):
        collate([[first, second]], **{**options, "width": 6}, slots=[0])
    with pytest.raises(ValueError, match="2 slots"):
        collate([[first]], **options, slots=[0, 0])
    with pytest.raises(ValueError, match="packing is 'maks'"):
        collate([[first]], **{**options, "packing": "maks"}, slots=[0])
