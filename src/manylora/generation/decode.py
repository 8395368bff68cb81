"""Decoding: prompts of any length and any slots in one batch, with a key-value cache.

Prompts are padded on the left, so that the last position of every row is its last token, and each row keeps its own
positions; a row that has ended leaves the batch, its cache and its place in the route with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from manylora.adapters.route import route_rows
from manylora.errors import ConfigError, DataError, RouteError
from manylora.generation.sampling import Sampling, row_generators
from manylora.generation.stream import decode_text

if TYPE_CHECKING:
    from manylora.base.language import LanguageBase

OnToken = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class Generation:
    """What one prompt was answered with: new tokens without the stop token, their text, and why it ended.

    `finished` is `stop` (a stop token came) or `length` (max_new_tokens or the base's last position was reached).
    """

    tokens: tuple[int, ...]
    text: str
    finished: Literal["stop", "length"]


@dataclass(slots=True, eq=False)
class _Row:
    """One prompt on its way; `index` is its place in the caller's list, `budget` how many tokens it may still get."""

    index: int
    prompt: list[int]
    slot: int
    budget: int
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    finished: Literal["stop", "length"] | None = None


@torch.no_grad()  # not inference_mode: a buffer that a model makes here must still serve a later training step
def generate(
    base: LanguageBase,
    prompts: Sequence[Sequence[int]],
    *,
    slots: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    on_token: OnToken | None = None,
    batch_rows: int = 64,
) -> list[Generation]:
    """One generation a prompt, in the prompts' order; prompt r is answered by slot `slots[r]` (-1: the bare base).

    A row's answer does not depend on the rows beside it (up to rounding of the base's products). `seeds[r]` seeds row
    r's draws (None: r itself, so a call repeats). `stop_ids` None takes the base's own. `on_token(r, token)` is called
    as tokens come, stop tokens left out. More than `batch_rows` prompts are decoded in several batches of like length.

    Raises:
        DataError: a prompt that is empty or leaves no position for an answer. ConfigError: a setting out of range.
        RouteError: a slot without a bank, or another number of slots or seeds than of prompts.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check(prompts, slots, seeds, max_new_tokens, batch_rows)
    rows = _rows(base, prompts, slots, range(len(prompts)) if seeds is None else seeds, max_new_tokens)
    stops = frozenset(base.eos_ids if stop_ids is None else stop_ids)
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    for start in range(0, len(rows), batch_rows):
        # Rows of one slot side by side: the bank then computes each slot's update as one run.
        batch = sorted(by_length[start : start + batch_rows], key=lambda row: row.slot)
        _decode(base, batch, sampling, stops, on_token)
    return [_generation(base, row) for row in rows]


def _check(
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    seeds: Sequence[int] | None,
    max_new_tokens: int,
    batch_rows: int,
) -> None:
    if len(slots) != len(prompts):
        raise RouteError(f"{len(slots)} slots for {len(prompts)} prompts", next_step="give one slot for each prompt")
    if seeds is not None and len(seeds) != len(prompts):
        raise RouteError(f"{len(seeds)} seeds for {len(prompts)} prompts", next_step="give one seed for each prompt")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}", allowed="at least 1")
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}", allowed="at least 1")


def _rows(
    base: LanguageBase,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    seeds: Sequence[int],
    max_new_tokens: int,
) -> list[_Row]:
    rows = []
    generators = row_generators(seeds)
    for index, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise DataError(f"prompt {index} is empty", allowed="at least one token", next_step="begin with some text")
        room = max_new_tokens if base.max_positions is None else base.max_positions - len(tokens)
        if room < 1:
            raise DataError(
                f"prompt {index} is {len(tokens)} tokens long, and this base has {base.max_positions} positions",
                allowed=f"at most {base.max_positions - 1} tokens" if base.max_positions else None,
                next_step="shorten the prompt",
            )
        rows.append(_Row(index, tokens, slot, min(max_new_tokens, room), generators[index]))
    return rows


def _generation(base: LanguageBase, row: _Row) -> Generation:
    assert row.finished is not None
    return Generation(tuple(row.tokens), decode_text(base.tokenizer, row.tokens), row.finished)


def _decode(
    base: LanguageBase, rows: list[_Row], sampling: Sampling, stops: frozenset[int], on_token: OnToken | None
) -> None:
    """Fill the rows' `tokens` and `finished`."""
    step = _Step(base)
    tokens, mask, positions = _left_pad([row.prompt for row in rows], base.pad_id, base.device)
    while rows:
        with route_rows(base, [row.slot for row in rows]):
            logits = step(tokens, mask, positions)
        chosen = sampling.choose(logits, [row.generator for row in rows])
        kept = [place for place, token in enumerate(chosen.tolist()) if _take(rows[place], token, stops, on_token)]
        tokens, mask, positions = chosen[:, None], _one_more(mask), positions[:, -1:] + 1
        if len(kept) < len(rows):
            rows = [rows[place] for place in kept]
            index = torch.tensor(kept, dtype=torch.long, device=base.device)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
            if rows:
                step.cache.batch_select_indices(index)


def _take(row: _Row, token: int, stops: frozenset[int], on_token: OnToken | None) -> bool:
    """Whether the row goes on after this token."""
    if token in stops:
        row.finished = "stop"
        return False
    row.tokens.append(token)
    if on_token is not None:
        on_token(row.index, token)
    if len(row.tokens) == row.budget:
        row.finished = "length"
    return row.finished is None


class _Step:
    """One forward of the base's model on what its cache does not hold yet: logits (rows, V) of the last position."""

    def __init__(self, base: LanguageBase):
        from transformers import DynamicCache

        self.model: Any = base.model
        self.cache = DynamicCache(config=self.model.config)
        # Asked of the class: a bank may have put a forward of its own on the module.
        taken = inspect.signature(type(base.model).forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.takes_positions = "position_ids" in taken
        # Rows stand where training put them: some models count their positions from another number than 0.
        self.first_position = base.rules.first_position or 0

    def __call__(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        own = {"position_ids": positions + self.first_position} if self.takes_positions else {}
        outputs = self.model(
            input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **own, **self.last_only
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask (1 where a token is) and positions (0 at a row's first token), each (rows, longest) int64."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask, (mask.cumsum(dim=1) - 1).clamp_min(0)


def _one_more(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
