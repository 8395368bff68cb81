from __future__ import annotations

import numpy as np
import pytest

from manylora.data.example import Example
from manylora.data.split import split_by_group
from manylora.errors import ConfigError, DataError


def example(group: str, line: int = 1) -> Example:
    return Example(np.zeros(2, np.int32), np.array([False, True]), 1, group, "", group, "f", line)


def split(some, fraction, seed):
    return [[some[place] for place in side] for side in split_by_group(some, fraction, seed)]


SOME = [example(f"prompt {number % 40}", number) for number in range(200)]


def test_no_group_is_on_both_sides_and_nothing_is_lost():
    train, held_out = split(SOME, 0.1, 0)
    assert not {one.group for one in train} & {one.group for one in held_out}
    assert sorted(one.line for one in train + held_out) == list(range(200))
    assert [one.line for one in train] == sorted(one.line for one in train)
    assert len(held_out) == 20


def test_the_split_depends_on_the_seed_and_not_on_the_order():
    groups = [{one.group for one in split(some, 0.1, 0)[1]} for some in (SOME, SOME[::-1])]
    assert groups[0] == groups[1]
    assert groups[0] != {one.group for one in split(SOME, 0.1, 1)[1]}


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_neither_side_is_empty(fraction):
    for some in (SOME, [example("a"), example("b")]):
        assert all(split(some, fraction, 3))


def test_one_prompt_cannot_be_split():
    with pytest.raises(DataError, match="share 1 prompt"):
        split_by_group([example("a"), example("a")], 0.5, 0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_outside_0_and_1_is_refused(fraction):
    with pytest.raises(ConfigError):
        split_by_group(SOME, fraction, 0)
