"""Which tokens of a batch attend to which: spans of tokens that see themselves only, and the tiles they are cut into.

A layout is found once per forward, on the host, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

SHORT_TILE, LONG_TILE = 64, 128
"""Queries of a tile, about, up to 512 tokens and above. More computes more of what causality hides, fewer makes more
calls, and passes more often over what is summed for the keys."""
TILE_SCORES = 3000
"""Scores of each head that take as long as the calls of one tile, forward and backward: 0.2 ms with nine heads."""
COMPARED_AT_ONCE = 1 << 22
"""Places of a mask that are compared at one time, while a layout is read from it."""

Allowed = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Whether query q of row b may see key k, from broadcastable index tensors (b, q, k)."""


@dataclass(frozen=True)
class Layout:
    """Spans `(start, stop)` of the tokens of a batch (rows, tokens), counted through all rows, in rising order.

    A token sees its own span only, and nothing later in it if `causal`. A token of no span is padding: it is not
    computed, its output is zero, and so are its gradients.
    """

    rows: int
    tokens: int
    spans: tuple[tuple[int, int], ...]
    causal: bool

    @classmethod
    def whole(cls, rows: int, tokens: int, *, causal: bool) -> Layout:
        """Each row one span."""
        return _whole(rows, tokens, causal)

    @classmethod
    def of_positions(cls, position_ids: Tensor, *, causal: bool, real: Tensor | None = None) -> Layout:
        """The layout of positions (rows, tokens) that restart with each sequence; `real`: bool alike, False at padding.

        A sequence begins where a position is not the one before it plus one.
        """
        follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
        return cls.of_breaks(~follows, causal=causal, real=real)

    @classmethod
    def of_breaks(cls, breaks: Tensor, *, causal: bool, real: Tensor | None = None) -> Layout:
        """The layout of `breaks` (rows, tokens - 1) bool: token t + 1 begins a span; `real` as in `of_positions`."""
        rows, tokens = breaks.shape[0], breaks.shape[1] + 1
        edges = torch.ones(rows, tokens, dtype=torch.bool, device=breaks.device)
        edges[:, 1:] = breaks if real is None else breaks | (real[:, 1:] != real[:, :-1])
        starts = edges.view(-1).nonzero().squeeze(1)
        stops = [*starts[1:].tolist(), rows * tokens]
        kept = None if real is None else real.reshape(-1)[starts].tolist()
        spans = zip(starts.tolist(), stops, strict=True)
        chosen = spans if kept is None else (span for span, keep in zip(spans, kept, strict=True) if keep)
        return cls(rows, tokens, tuple(chosen), causal)

    @property
    def covers(self) -> bool:
        """Whether every token is in a span."""
        return sum(stop - start for start, stop in self.spans) == self.rows * self.tokens

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Spans of like lengths, each group to be computed together; every span in one group."""
        return _groups(self.spans, self.causal)

    @cached_property
    def _mask(self) -> Tensor:
        owner = torch.full((self.rows * self.tokens,), -1)
        for number, (start, stop) in enumerate(self.spans):
            owner[start:stop] = number
        owner = owner.view(self.rows, 1, self.tokens)
        mask = (owner[..., :, None] == owner[..., None, :]) & (owner >= 0)[..., None]
        if self.causal:
            mask = mask.tril()
        return mask | torch.eye(self.tokens, dtype=torch.bool)  # a softmax over nothing is NaN

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(rows, 1, tokens, tokens) bool, True where a token may attend; padding sees itself."""
        return self._mask.to(device)


@dataclass(frozen=True)
class Group:
    """Spans that are computed together: `length` tokens each, padded at the end, in `num_tiles` tiles of queries.

    Padding repeats the last token of its own span, so that no span meets another's numbers.
    """

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    tile: int
    num_tiles: int

    @property
    def length(self) -> int:
        return self.tile * self.num_tiles

    @property
    def padded(self) -> bool:
        """Whether a span is shorter than `length`."""
        return any(stop - start < self.length for start, stop in zip(self.starts, self.stops, strict=True))

    @cached_property
    def apart(self) -> int | None:
        """The even distance of the spans, none of which is padded; None where there is none."""
        distances = {later - start for start, later in zip(self.starts, self.starts[1:], strict=False)}
        if self.padded or len(distances) > 1:
            return None
        return distances.pop() if distances else self.length

    @cached_property
    def places(self) -> Tensor:
        """(n * length,) the token at each place of the group."""
        places = torch.tensor(self.starts)[:, None] + torch.arange(self.length)
        return places.minimum(torch.tensor(self.stops)[:, None] - 1).view(-1)

    @cached_property
    def real(self) -> Tensor:
        """(n * length,) bool: the place is no padding."""
        return (torch.arange(self.length) < self._sizes[:, None]).view(-1)

    @cached_property
    def padding(self) -> Tensor:
        """The places that are padding."""
        return self.real.logical_not().nonzero().squeeze(1)

    @cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The places that are no padding, and the token of each."""
        chosen = self.real.nonzero().squeeze(1)
        return chosen, self.places[chosen]

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor(self.stops) - torch.tensor(self.starts)


def read_layout(
    allowed: Allowed, rows: int, tokens: int, *, real: Tensor | None = None, device: torch.device | str = "cpu"
) -> Layout | None:
    """The layout that a mask describes exactly for every query that is no padding; None where there is none.

    A guess is read from the mask's two diagonals beside the main one, and then compared with the whole mask, a few
    rows at a time: what is returned is proven, whatever made the mask.
    """
    row = torch.arange(rows, device=device)[:, None]
    later = torch.arange(1, tokens, device=device)[None, :]
    causal = not bool(allowed(row, later - 1, later).any())
    guess = Layout.of_breaks(~allowed(row, later, later - 1).expand(rows, tokens - 1), causal=causal, real=real)
    owner = torch.zeros(rows * tokens, dtype=torch.long, device=device)
    owner[torch.tensor([start for start, _ in guess.spans], dtype=torch.long, device=device)] = 1
    owner = owner.cumsum(0).view(rows, tokens)
    if real is not None:
        owner = owner.masked_fill(~real, -1)
    place = torch.arange(tokens, device=device)
    step = max(1, COMPARED_AT_ONCE // tokens**2)
    for first in range(0, rows, step):
        own = owner[first : first + step]
        expected = own[:, :, None] == own[:, None, :]
        if causal:
            expected = expected.tril()
        same = expected == allowed(row[first : first + step, :, None], place[:, None], place[None, :])
        if not bool((same | (own < 0)[:, :, None]).all()):
            return None
    return guess


@cache
def _whole(rows: int, tokens: int, causal: bool) -> Layout:
    return Layout(rows, tokens, tuple((row * tokens, (row + 1) * tokens) for row in range(rows)), causal)


def _shape(length: int) -> tuple[int, int]:
    """Tile and number of tiles for spans of at most `length` tokens; tiles are multiples of 8, so shapes are few."""
    count = -(-length // (SHORT_TILE if length <= 512 else LONG_TILE))
    tile = -(-length // count)
    return (tile if length < 8 else -(-tile // 8) * 8), count


def _groups(spans: Sequence[tuple[int, int]], causal: bool) -> tuple[Group, ...]:
    """The cheapest cut of the spans, sorted by length, into groups padded to their longest: an exact recursion.

    cost(group) = num_tiles * TILE_SCORES + scores of one head
    """
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, stop in sorted(spans, key=lambda span: span[1] - span[0]):
        by_shape.setdefault(_shape(stop - start), []).append((start, stop))
    shapes = list(by_shape)
    best, cuts = [0.0], [0]
    for end, (tile, num_tiles) in enumerate(shapes, 1):
        seen = num_tiles * (num_tiles + 1) / 2 if causal else num_tiles**2
        count, options = 0, []
        for begin in reversed(range(end)):
            count += len(by_shape[shapes[begin]])
            options.append((best[begin] + num_tiles * TILE_SCORES + count * seen * tile**2, begin))
        cost, begin = min(options)
        best.append(cost)
        cuts.append(begin)
    groups, end = [], len(shapes)
    while end:
        held = sorted(span for shape in shapes[cuts[end] : end] for span in by_shape[shape])
        starts, stops = zip(*held, strict=True)
        groups.append(Group(starts, stops, *shapes[end - 1]))
        end = cuts[end]
    return tuple(groups)
