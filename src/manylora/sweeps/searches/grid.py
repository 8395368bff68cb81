"""Grid search: every point of the product of the keys' points once, in an order shuffled by the seed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from manylora.errors import ConfigError
from manylora.sweeps.searches import Question
from manylora.sweeps.space import Range, Space


def propose(question: Question) -> dict[str, Any]:
    axes = grid_axes(question.space)
    return point(axes, shuffled(grid_size(axes), question.number + 1, question.seed)[question.number])


def grid_axes(space: Space) -> dict[str, Sequence[Any]]:
    """The points of every key.

    Raises:
        ConfigError: a range that says neither how many points it has nor how far apart they lie.
    """
    axes: dict[str, Sequence[Any]] = {}
    for key, dimension in space.dimensions.items():
        points = dimension.grid()
        if points is None:
            assert isinstance(dimension, Range)
            raise ConfigError(
                f"sweep.space.{key} is {dimension.described()}, and search: grid needs to know its points",
                allowed="num (how many, both ends included), step (how far apart), or a list of choices",
                next_step=f"for example sweep.space.{key}: {replace(dimension, num=4).described()}",
            )
        axes[key] = points
    return axes


def grid_size(axes: Mapping[str, Sequence[Any]]) -> int:
    return math.prod(len(axis) for axis in axes.values())


def point(axes: Mapping[str, Sequence[Any]], index: int) -> dict[str, Any]:
    """One point of a product by its index; the last key changes fastest."""
    chosen = {}
    for key, axis in reversed(list(axes.items())):
        index, place = divmod(index, len(axis))
        chosen[key] = axis[place]
    return {key: chosen[key] for key in axes}


def shuffled(size: int, count: int, seed: int) -> list[int]:
    """The first `count` of the numbers below `size` in an order drawn from the seed; more of them begin the same."""
    # Fisher and Yates, remembering only what moved: the product of a few long axes does not fit in memory.
    draw = random.Random(seed)
    moved: dict[int, int] = {}
    order = []
    for place in range(count):
        other = draw.randrange(place, size)
        order.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return order
