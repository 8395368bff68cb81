"""Train and evaluation sides that share no prompt."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from manylora.data.store import column_of
from manylora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from manylora.data.example import Example


def split_by_group(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, eval) as places of examples, in the given order; eval holds about `fraction` of them, in whole groups.

    A group is all examples with the same prompt (of plain text: with the same text), so no input is on both sides.
    Groups are drawn by their text and the seed, whatever the order of the rows.

    Raises:
        ConfigError: a fraction that is not between 0 and 1. DataError: fewer than two groups.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"eval_fraction is {fraction!r}", allowed="above 0 and below 1", next_step="try 0.05")
    draws = [_draw(group, seed) for group in column_of(examples, "group")]
    sizes: dict[bytes, int] = {}
    for draw in draws:
        sizes[draw] = sizes.get(draw, 0) + 1
    if len(sizes) < 2:
        raise DataError(
            f"{len(examples)} examples share {len(sizes)} prompt, so none can be held out for evaluation",
            next_step="name a file of its own: data.eval, and drop data.eval_fraction",
        )
    chosen = _held_out(sizes, fraction * len(examples))
    held_out = np.fromiter((draw in chosen for draw in draws), dtype=np.bool_, count=len(draws))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def fold_by_group(
    examples: Sequence[Example], part: int, parts: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train, eval) as places of examples: of `parts` parts of about one size, in whole groups, part `part` is eval.

    Over all parts each example is in eval exactly once. Groups are as in `split_by_group`.

    Raises:
        DataError: fewer groups than parts.
    """
    draws = [_draw(group, seed) for group in column_of(examples, "group")]
    sizes: dict[bytes, int] = {}
    for draw in draws:
        sizes[draw] = sizes.get(draw, 0) + 1
    if len(sizes) < parts:
        raise DataError(
            f"{len(examples)} examples share {len(sizes)} prompts, too few for {parts} folds",
            next_step="ask for fewer folds, or hold out a file of its own: data.eval",
        )
    held = [0] * parts
    fold_of: dict[bytes, int] = {}
    for draw in sorted(sizes):  # into the emptiest: parts of one size, whatever the sizes of the groups
        fold_of[draw] = held.index(min(held))
        held[fold_of[draw]] += sizes[draw]
    held_out = np.fromiter((fold_of[draw] == part for draw in draws), dtype=np.bool_, count=len(draws))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _held_out(sizes: dict[bytes, int], wanted: float) -> set[bytes]:
    """Groups in drawn order until `wanted` examples are reached as nearly as they allow; never none, never all."""
    drawn = sorted(sizes)
    chosen, count = {drawn[0]}, sizes[drawn[0]]
    for group in drawn[1:-1]:
        if count + sizes[group] / 2 > wanted:
            break
        chosen.add(group)
        count += sizes[group]
    return chosen


def _draw(group: str, seed: int) -> bytes:
    # A hash, not a generator: a row added to the file moves no other row to the other side.
    return hashlib.blake2b(f"{seed}:{group}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
