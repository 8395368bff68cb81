"""The rows on which a merged model is compared with the unmerged one: the same ones every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase

NUM_ROWS = 8
ROW_TOKENS = 32
DATA_TOKENS = 128
"""Tokens of a row of data that are looked at."""
LOGIT_ELEMENTS = 1 << 26
"""Positions x vocabulary, so that three sets of logits stay below a gigabyte."""


@dataclass(frozen=True, slots=True)
class Probes:
    """Inputs of one forward, rows first; `counted` (rows, tokens) says which positions are compared (None: all)."""

    inputs: Mapping[str, Tensor]
    num_rows: int
    counted: Tensor | None = None


def make_probes(base: FrozenModel, rows: Sequence[Sequence[int]] | None = None) -> Probes | None:
    """Random rows of the vocabulary, then `rows` of tokens as far as memory allows; None: nothing can be drawn."""
    if not isinstance(base, LanguageBase):
        if base.example is None:
            return None
        return Probes(base.example(NUM_ROWS), NUM_ROWS)
    most = max(ROW_TOKENS, LOGIT_ELEMENTS // base.vocabulary)
    drawn = _drawn(base)
    width = min(ROW_TOKENS, base.max_positions or ROW_TOKENS)
    made = [row[:width] for row in drawn[: max(1, most // width)]]
    longest = min(DATA_TOKENS, base.max_positions or DATA_TOKENS)
    left = most - sum(map(len, made))
    for row in rows or ():
        part = list(row[:longest])
        if not part:
            continue
        if len(part) > left:
            break
        made.append(part)
        left -= len(part)
    return _stacked(made, base.pad_id)


def _drawn(base: LanguageBase) -> list[list[int]]:
    """Rows of ordinary tokens: none that frames a text, which few rows hold in the middle."""
    special = set(getattr(base.tokenizer, "all_special_ids", None) or ()) | set(base.eos_ids) | {base.pad_id}
    size = len(base.tokenizer) if base.tokenizer is not None else base.vocabulary
    ordinary = [token for token in range(min(size, base.vocabulary)) if token not in special] or [0]
    generator = torch.Generator().manual_seed(17)
    picked = torch.randint(0, len(ordinary), (NUM_ROWS, ROW_TOKENS), generator=generator)
    return [[ordinary[place] for place in row] for row in picked.tolist()]


def _stacked(rows: Sequence[Sequence[int]], pad_id: int) -> Probes:
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    counted = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    positions = torch.arange(width).expand(tokens.shape)
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": counted}
    return Probes(inputs, len(rows), counted)
