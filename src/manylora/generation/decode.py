"""Decoding: prompts of any length and any slots in one batch, with a key-value cache where that is shown to be right.

Rows that have ended leave the batch, their cache and their place in the route with them, once there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manylora.adapters.route import route_rows
from manylora.base.fast.attention import FAR
from manylora.errors import ConfigError, DataError, RouteError
from manylora.generation.sampling import Sampling, row_generators
from manylora.generation.stream import decode_text

if TYPE_CHECKING:
    from manylora.base.language import LanguageBase

MOST_GOING = 0.875
"""The share of rows that go on above which those that have ended stay: to leave them out copies the cache."""

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
    batch_rows: int = 128,
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
    step = (CachedStep if decodes_by_cache(base) else _WholeStep)(base, [row.prompt for row in rows])
    step.expect(max(row.budget for row in rows))
    chosen: Tensor | None = None
    while True:
        with route_rows(base, [row.slot for row in rows]):
            logits = step(chosen)
        chosen = sampling.choose(logits, [row.generator for row in rows])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row.finished is None:
                _take(row, token, stops, on_token)
        going = [place for place, row in enumerate(rows) if row.finished is None]
        if not going:
            return
        if len(going) <= MOST_GOING * len(rows):
            rows = [rows[place] for place in going]
            index = torch.tensor(going, dtype=torch.long, device=base.device)
            chosen = chosen[index]
            step.keep(index)


def _take(row: _Row, token: int, stops: frozenset[int], on_token: OnToken | None) -> None:
    """Give a row its next token, or its end."""
    if token in stops:
        row.finished = "stop"
        return
    row.tokens.append(token)
    if on_token is not None:
        on_token(row.index, token)
    if len(row.tokens) == row.budget:
        row.finished = "length"


class CachedStep:
    """Logits (rows, V) after the last token of each row; a forward computes what its cache does not hold yet.

    Prompts are padded on the left, so that the last position of every row is its last token, and each row keeps its own
    positions.
    """

    def __init__(self, base: LanguageBase, prompts: Sequence[Sequence[int]]):
        self.base = base
        self.tokens, mask, self.positions = _left_pad(prompts, base.pad_id, base.device)
        # Where no row is padded there is nothing to be told, and a mask costs more than it looks.
        self.mask = None if bool(mask.all()) else mask
        self.cache: Any = None
        self.expect(1)

    def expect(self, new_tokens: int) -> None:
        """How many tokens are to come at most."""
        from manylora.generation.cache import roomy_cache

        self.cache = roomy_cache(self.base.config, self.tokens.shape[1] + new_tokens)

    def __call__(self, chosen: Tensor | None) -> Tensor:
        """`chosen` (rows,) are the tokens that come next; None: the prompts are computed."""
        if chosen is not None:
            last = self.positions[:, -1:] + 1
            most = self.base.max_positions
            # A row that has ended may stay in the batch for a while.
            self.positions = last if most is None else last.clamp(max=most - 1)
            self.tokens = chosen[:, None]
            self.mask = None if self.mask is None else _one_more(self.mask)
        given = {"input_ids": self.tokens, "position_ids": self.positions, "past_key_values": self.cache}
        if self.mask is not None:
            given["attention_mask"] = self.mask
        return last_logits(self.base, {**given, "use_cache": True})

    def skip(self, count: int) -> None:
        """Go on as if so many tokens more had been computed, where there is room: for whoever asks what that takes."""
        for layer in self.cache.layers:
            if hasattr(layer, "skip") and count > 0:
                layer.skip(count)
        self.positions = self.positions + max(count, 0)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), max(count, 0))], dim=1)

    def keep(self, index: Tensor) -> None:
        """Go on with these rows."""
        self.positions = self.positions[index]
        self.mask = None if self.mask is None else self.mask[index]
        self.cache.batch_select_indices(index)


class _WholeStep:
    """The same without a cache: every forward computes whole rows, padded where no token that counts can see it."""

    def __init__(self, base: LanguageBase, prompts: Sequence[Sequence[int]]):
        self.base = base
        self.rows = [list(prompt) for prompt in prompts]

    def expect(self, new_tokens: int) -> None:
        """Nothing is held."""

    def __call__(self, chosen: Tensor | None) -> Tensor:
        if chosen is not None:
            for row, token in zip(self.rows, chosen.tolist(), strict=True):
                row.append(token)
        width = max(map(len, self.rows))
        tokens = torch.full((len(self.rows), width), self.base.pad_id)
        for place, row in enumerate(self.rows):
            tokens[place, : len(row)] = torch.tensor(row)
        device = self.base.device
        last = torch.tensor([len(row) - 1 for row in self.rows], device=device)
        positions = torch.arange(width, device=device).expand(len(self.rows), width)
        return last_logits(self.base, {"input_ids": tokens.to(device), "position_ids": positions}, last)

    def keep(self, index: Tensor) -> None:
        self.rows = [self.rows[place] for place in index.tolist()]


def last_logits(base: LanguageBase, inputs: Mapping[str, Any], last: Tensor | None = None) -> Tensor:
    """Logits (rows, V) of one position of each row: `last` (rows,), None: the last one.

    Only these meet the head, as a matrix of their own: torch copies the head's weight once a row for a slice of three
    dimensions.
    """
    states = base.states(base.found, inputs)
    chosen = states[:, -1] if last is None else states[torch.arange(len(last), device=last.device), last]
    return base.logits(chosen.contiguous())


_by_cache: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def decodes_by_cache(base: LanguageBase) -> bool:
    """Whether a token on top of a cache is what it is in the whole row; tried once for a base, with rows padded too.

    Models that remember otherwise than by keys and values may take such a cache and not use it, or not all of it.
    """
    known = _by_cache.get(base)
    if known is None:
        known = _by_cache[base] = _tries_cache(base)
        if not known:
            base.notes.append("text is computed row by row anew for each token: a cache gives other text, or none")
    return known


def _tries_cache(base: LanguageBase) -> bool:
    from manylora.base.probes import REFUSALS

    rows = base._draw(2, 12).tolist()
    prompts = [rows[0][:9], rows[1][:5]]
    following = [row[len(prompt) :][:3] for row, prompt in zip(rows, prompts, strict=True)]
    try:
        with route_rows(base, [-1, -1]):
            cached, whole = CachedStep(base, prompts), _WholeStep(base, prompts)
            cached.expect(len(following[0]))
            chosen: Tensor | None = None
            for number in range(len(following[0]) + 1):
                found, wanted = (step(chosen).double() for step in (cached, whole))
                off = torch.linalg.vector_norm(found - wanted, dim=1) / torch.linalg.vector_norm(wanted, dim=1)
                if not bool((off <= FAR.get(base.dtype, FAR[torch.bfloat16])).all()):
                    return False
                if number < len(following[0]):
                    chosen = torch.tensor([row[number] for row in following], device=base.device)
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return True


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask (1 where a token is) and positions (0 at a row's first token), each (rows, longest) int64."""
    width = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return tokens, mask, (mask.cumsum(dim=1) - 1).clamp_min(0)


def _one_more(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
