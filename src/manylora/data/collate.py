"""The tensors of some rows: tokens, shifted labels, positions, and what keeps the sequences of a row apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manylora.data.packing import row_width
from manylora.types import IGNORED, Batch, Packing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from manylora.data.example import Example


def batch_of(
    rows: Sequence[Sequence[Any]],
    base: Any,
    *,
    width: int,
    slots: Sequence[int],
    streams: Sequence[int] | None = None,
) -> Batch:
    """The batch of some rows as `base` takes them; what their examples are made into is up to these.

    All are of one class, whose `batch` is called with what is given here: `streams` are the rows' own random streams,
    so that what is drawn for a row does not depend on its neighbours.
    """
    return type(rows[0][0]).batch(rows, base, width=width, slots=slots, streams=streams)


def collate(
    examples_per_row: Sequence[Sequence[Example]],
    *,
    width: int,
    pad_id: int,
    packing: Packing,
    causal: bool,
    slots: Sequence[int],
    streams: Sequence[int] | None = None,
) -> Batch:
    """The tensors of some rows, on the CPU; as wide as the longest row, rounded up to a multiple of 8, at most `width`.

    `labels` (rows, tokens) int64 are shifted: what each position must predict, IGNORED at the end of each sequence,
    where the next token is no target, and on padding. `sequences` counts from 0 in each row; padding, which has no
    label, is said to be of the first. `position_ids` begin at 0 with each sequence; padding counts as
    further sequences, none longer than the longest real one, so that no position is beyond what the base has.

    `packing` and `causal` are the base's own. "positions": there is no attention mask (transformers finds packed
    sequences by their positions only without one). "mask": `attention_mask` (rows, 1, tokens, tokens) bool, True where
    a token may attend: within its sequence, and not to later tokens if `causal`. It takes rows * tokens**2 bytes (8
    rows of 2048 tokens: 32 MiB), and attention computes every one of its scores. "none": one example a row and
    `attention_mask` (rows, tokens) bool, True on its tokens.

    Raises:
        ValueError: a row longer than `width`; several examples in a padded row; not one slot and stream per row; an
            unknown packing.
    """
    _check(examples_per_row, width, packing, slots, streams)
    used = [sum(map(len, row)) for row in examples_per_row]
    longest = max(len(example) for row in examples_per_row for example in row)
    shape = len(used), row_width(max(used), width)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    sequences = np.zeros(shape, dtype=np.int64)
    for row, examples in enumerate(examples_per_row):
        start = 0
        for number, example in enumerate(examples):
            stop = start + len(example)
            tokens[row, start:stop] = example.tokens
            labels[row, start : stop - 1] = np.where(example.trained[1:], example.tokens[1:], IGNORED)
            positions[row, start:stop] = np.arange(stop - start)
            sequences[row, start:stop] = number
            start = stop
        positions[row, start:] = np.arange(shape[1] - start) % longest
    inputs = {"input_ids": torch.from_numpy(tokens), "position_ids": torch.from_numpy(positions)}
    if packing == "none":
        inputs["attention_mask"] = torch.arange(shape[1]) < torch.tensor(used)[:, None]
    elif packing == "mask":
        inputs["attention_mask"] = _mask(inputs["position_ids"], causal)
    return Batch(
        inputs=inputs,
        targets={"labels": torch.from_numpy(labels), "sequences": torch.from_numpy(sequences)},
        slots=tuple(slots),
        streams=None if streams is None else tuple(streams),
        costs=(shape[1],) * shape[0],
        num_trained=tuple((labels != IGNORED).sum(axis=1).tolist()),
    )


def _mask(positions: Tensor, causal: bool) -> Tensor:
    """Which tokens see which (rows, 1, tokens, tokens): a sequence, padding too, is a block that sees itself.

    So no token sees nothing: a softmax over nothing is NaN, and its gradient spreads.
    """
    sequence = positions.eq(0).cumsum(dim=1)
    mask = sequence[:, None, :, None] == sequence[:, None, None, :]
    return mask.tril() if causal else mask


def _check(
    examples_per_row: Sequence[Sequence[Example]],
    width: int,
    packing: str,
    slots: Sequence[int],
    streams: Sequence[int] | None,
) -> None:
    if len(slots) != len(examples_per_row) or (streams is not None and len(streams) != len(slots)):
        raise ValueError(
            f"{len(examples_per_row)} rows, {len(slots)} slots, {'no' if streams is None else len(streams)} streams"
        )
    if packing not in ("positions", "mask", "none"):
        raise ValueError(f"packing is {packing!r}, not positions, mask or none")
    if packing == "none" and any(len(row) != 1 for row in examples_per_row):
        raise ValueError("a padded row holds one example")
    longest = max(sum(map(len, row)) for row in examples_per_row)
    if longest > width:
        raise ValueError(f"a row of {longest} tokens in a batch of width {width}")
