"""What a model does with the rows it is given, found by short forwards at load: positions, direction, packing.

Nothing is read from class names. What a model's own code cannot be asked in a few hundred tokens (an attention window
that is longer) is read from its configuration, and counts against packing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manylora.types import Packing

SHORT_TOKENS = 16
LONG_TOKENS = 300
"""Tokens of a sequence in the long probe of masks: above the attention windows in use, below 512 positions."""
MIXING_SHARE = 0.1
"""How far from its parts alone a packed row may be, as a share of what mixing does: rounding is far below, in bfloat16
too, and a sequence that sees another, or stands at other positions, is far above."""
WINDOW_KEYS = ("local_attention", "attention_chunk_size")
REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AssertionError, AttributeError)
"""What a model's own code raises for inputs that it was not made for."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """How this model takes its rows.

    `first_position` is the number that it gives a row's first token (RoBERTa: one above its padding id), None where it
    cannot be told positions. `causal`: no token sees a later one. `packing`: what keeps the sequences of a packed row
    apart. `mask_is_added`: a 4-D mask is added to the scores, as in eager attention, not looked up.
    """

    first_position: int | None = None
    causal: bool = False
    packing: Packing = "none"
    mask_is_added: bool = False

    def given(self, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """A batch's inputs (positions from 0, bool masks) as the model wants them."""
        found = dict(inputs)
        positions, mask = found.pop("position_ids", None), found.get("attention_mask")
        if positions is not None and self.first_position is not None:
            found["position_ids"] = positions + self.first_position
        if mask is not None and mask.ndim == 4 and self.mask_is_added:
            zero = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            found["attention_mask"] = zero.masked_fill_(~mask, torch.finfo(dtype).min)
        return found


Run = Callable[[RowRules, Mapping[str, Tensor]], Tensor]
"""States (rows, tokens, size) of a batch's inputs under some rules."""

Draw = Callable[[int, int], Tensor]
"""Random tokens (rows, length) on the model's device."""


@torch.no_grad()
def probe_rows(run: Run, draw: Draw, config: Any) -> tuple[RowRules, str]:
    """The rules of a model, and why its rows are packed or padded.

    Two sequences share a row if the row gives the states of its parts alone, and a change of either part leaves the
    other's states as they were, but for the noise that a change of another row makes.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    total = min(SHORT_TOKENS, limit or SHORT_TOKENS)
    cut = total * 7 // 16
    trials = _trials(draw(4, total), cut)
    own = [run(RowRules(), {"input_ids": tokens}) for tokens in trials]
    if own[0].ndim != 3 or own[0].shape[:2] != trials[0].shape:
        return RowRules(), "rows are padded: this base's outputs are not one for each token"
    rules = RowRules(causal=_quiet(own, (1, slice(None, cut))))
    rules = replace(rules, first_position=_first_position(run, trials[0], own[0], limit, config))
    row = trials[0][:1]
    alone = torch.cat([run(rules, _plain(part)) for part in (row[:, :cut], row[:, cut:])], dim=1)[0]

    def fault(trial: RowRules) -> str | None:
        try:
            packed = [run(trial, packed_inputs(tokens, (cut, total - cut), trial)) for tokens in trials]
        except REFUSALS as error:
            return _reason(error)
        if not (_quiet(packed, (0, slice(cut, None))) and _quiet(packed, (1, slice(None, cut)))):
            return "a change of one sequence changes the other"
        if not _largest(packed[0][0] - alone) <= MIXING_SHARE * _largest(own[0][0] - alone):
            return "a sequence of a packed row has other states than alone"
        return None

    by_position = replace(rules, packing="positions")
    why = "it takes no positions" if rules.first_position is None else fault(by_position)
    if why is None:
        return by_position, "rows are packed: positions that restart keep this base's sequences apart"
    by_mask = replace(rules, packing="mask")
    found = [(trial, fault(trial)) for trial in (by_mask, replace(by_mask, mask_is_added=True))]
    masked = next((trial for trial, reason in found if reason is None), None)
    why_not = found[0][1] if masked is None else _long_fault(run, draw, masked, config, limit)
    if masked is None or why_not is not None:
        return rules, f"rows are padded: with restarting positions, {why}; with a mask, {why_not}"
    return masked, f"rows are packed and given a mask of tokens x tokens: with restarting positions alone, {why}"


def _trials(drawn: Tensor, cut: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows; the same with another first part of row 0 and another second part of row 1; with another row 1."""
    first, second, third, fourth = drawn
    return (
        torch.stack([first, second]),
        torch.stack([torch.cat([third[:cut], first[cut:]]), torch.cat([second[:cut], third[cut:]])]),
        torch.stack([first, fourth]),
    )


def _quiet(states: Sequence[Tensor], place: tuple[int, slice]) -> bool:
    """Whether the second trial leaves a place's states as they are in the first.

    The third says how much noise there is: none in most models, but experts see other groups of tokens when any token
    changes, and round otherwise. They need not do so in the third trial, so float32's rounding is let pass as well.
    """
    before, after, other = states
    noise = max(_largest((other - before)[0]), torch.finfo(torch.float32).eps * _largest(before))
    return _largest((after - before)[place]) <= 4 * noise


def packed_inputs(tokens: Tensor, lengths: tuple[int, ...], rules: RowRules) -> dict[str, Tensor]:
    """The inputs of rows that each hold sequences of these lengths."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = {"input_ids": tokens, "position_ids": positions.expand(tokens.shape)}
    if rules.packing == "mask":
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        inputs["attention_mask"] = _mask(owner, rules.causal, len(tokens))
    return {name: tensor.to(tokens.device) for name, tensor in inputs.items()}


def _mask(owner: Tensor, causal: bool, rows: int) -> Tensor:
    mask = owner[:, None] == owner[None, :]
    return (mask.tril() if causal else mask).expand(rows, 1, -1, -1)


def _plain(tokens: Tensor) -> dict[str, Tensor]:
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return {"input_ids": tokens, "position_ids": positions.expand(tokens.shape)}


def _first_position(run: Run, tokens: Tensor, own: Tensor, limit: int | None, config: Any) -> int | None:
    """The first position that, given, has the model do what it does when none are given."""
    padding = getattr(config, "pad_token_id", None)
    tried: dict[int, float] = {}
    for first in (0, padding + 1) if isinstance(padding, int) else (0,):
        # A position outside its table does not raise on an accelerator: it ends the process's use of it.
        if first and (limit is None or first + tokens.shape[1] > limit):
            continue
        try:
            given = run(RowRules(first_position=first), _plain(tokens))
        except TypeError:
            return None
        tried[first] = float((given - own).norm())
        if tried[first] == 0.0:
            return first
    best = min(tried, key=lambda first: tried[first])
    return best if tried[best] <= 1e-3 * float(own.norm()) else None


def _long_fault(run: Run, draw: Draw, rules: RowRules, config: Any, limit: int | None) -> str | None:
    """What a mask of a longer row breaks: a model that takes it as it is loses its own attention window, for one."""
    longest = LONG_TOKENS if limit is None else min(LONG_TOKENS, limit - (rules.first_position or 0))
    window = next((size for size in _windows(config) if size >= longest and (limit is None or size < limit)), None)
    if window is not None:
        return f"its attention window of {window} tokens would be lost"
    lengths = (longest, longest - longest // 3)
    tokens = draw(1, sum(lengths))
    inputs = packed_inputs(tokens, lengths, rules)
    whole = {**inputs, "attention_mask": _mask(torch.zeros(sum(lengths)), rules.causal, 1).to(tokens.device)}
    try:
        packed, mixed = run(rules, inputs), run(rules, whole)
        alone = torch.cat([run(rules, _plain(part)) for part in tokens.split(lengths, dim=1)], dim=1)
    except REFUSALS as error:
        return _reason(error)
    if not _largest(packed - alone) <= MIXING_SHARE * _largest(mixed - alone):
        return f"sequences of {longest} tokens have other states than alone"
    return None


def _windows(config: Any) -> list[int]:
    """Sizes that a configuration gives for a window of attention, by the names in use."""
    found = [value for key, value in vars(config).items() if "window" in key or key in WINDOW_KEYS]
    sizes = [size for value in found for size in (value if isinstance(value, list | tuple) else (value,))]
    return [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]


def _largest(difference: Tensor) -> float:
    """The largest norm of a token's difference, NaN where there is one: what leaks may touch few tokens of a row."""
    return float(difference.norm(dim=-1).max())


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0]}"
