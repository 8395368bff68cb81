from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data.packing import pack


@st.composite
def jobs(draw):
    row_tokens = draw(st.integers(1, 300))
    return draw(st.lists(st.integers(1, row_tokens), max_size=200)), row_tokens


@st.composite
def cut_rows(draw):
    """Full rows cut into pieces: the least possible number of rows is known."""
    row_tokens, count = draw(st.integers(2, 100)), draw(st.integers(1, 20))
    lengths = []
    for _ in range(count):
        cuts = draw(st.sets(st.integers(1, row_tokens - 1), max_size=6))
        lengths += [stop - start for start, stop in pairwise([0, *sorted(cuts), row_tokens])]
    return draw(st.permutations(lengths)), row_tokens, count


def least_rows(lengths: list[int], row_tokens: int) -> int:
    """The least number of rows, by trying everything."""

    def fits(rest: list[int], rooms: list[int]) -> bool:
        return not rest or any(
            fits(rest[1:], [*rooms[:at], rooms[at] - rest[0], *rooms[at + 1 :]])
            for at in range(len(rooms))
            if rooms[at] >= rest[0] and rooms[at] not in rooms[:at]
        )

    ordered = sorted(lengths, reverse=True)
    return next(count for count in range(len(lengths) + 1) if fits(ordered, [row_tokens] * count))


@given(jobs())
def test_every_index_is_packed_once_and_no_row_overflows(job):
    lengths, row_tokens = job
    rows = pack(lengths, row_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_tokens for row in rows)
    assert pack(lengths, row_tokens) == rows


@given(jobs())
def test_each_sequence_goes_into_the_fullest_row_that_has_room(job):
    lengths, row_tokens = job
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    where = {index: at for at, row in enumerate(pack(lengths, row_tokens)) for index in row}
    used: dict[int, int] = {}
    for index in order:
        room = row_tokens - used.get(where[index], 0)
        rooms = [row_tokens - tokens for tokens in used.values() if row_tokens - tokens >= lengths[index]]
        assert room == min(rooms, default=row_tokens)
        used[where[index]] = used.get(where[index], 0) + lengths[index]


@given(cut_rows())
def test_at_most_eleven_ninths_of_the_least_rows_where_it_is_known(job):
    lengths, row_tokens, count = job
    assert len(pack(lengths, row_tokens)) <= 11 / 9 * count + 1


@given(st.lists(st.integers(1, 12), max_size=8))
def test_at_most_eleven_ninths_of_the_least_rows_found_by_trying(lengths):
    assert len(pack(lengths, 12)) <= 11 / 9 * least_rows(lengths, 12) + 1


@pytest.mark.parametrize("lengths", [[9], [0], [-1]])
def test_a_length_that_fits_no_row_is_refused(lengths):
    with pytest.raises(ValueError, match="do not fit rows of 8"):
        pack(lengths, 8)
