"""The route of a batch: the slot of every row, and which items of a site belong to which place of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manylora.errors import RouteError
from manylora.types import Runs, Segment, Site

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """The slot of every row of a batch (-1: the bare base), and the stream that seeds each row's dropout.

    `counts` is given where a site sees a selection of items and not whole rows: how many items each row has, in order.
    """

    slots: tuple[int, ...]
    streams: tuple[int, ...] | None = None
    counts: tuple[int, ...] | None = None
    reached: frozenset[int] = field(init=False, repr=False)
    """The distinct ones of `slots`."""
    runs: dict[tuple, Runs] = field(default_factory=dict, init=False, repr=False)
    """What a bank found for stacks that the same slots own."""

    def __post_init__(self):
        object.__setattr__(self, "reached", frozenset(self.slots))

    def take(self, rows: Sequence[int]) -> Route:
        """The route of these rows, in this order."""

        def of(values: tuple[int, ...] | None) -> tuple[int, ...] | None:
            return None if values is None else tuple(values[row] for row in rows)

        return Route(tuple(self.slots[row] for row in rows), of(self.streams), of(self.counts))

    def bounds(self, items: int, site: str) -> list[int]:
        """Where each row begins among a site's items; one number more than rows."""
        if self.counts is not None:
            counts = self.counts
            if sum(counts) != items:
                raise RouteError(f"{site!r} sees {items} items and the selection has {sum(counts)}")
        elif items % len(self.slots):
            raise RouteError(
                f"{site!r} sees {items} items, which {len(self.slots)} rows do not divide",
                next_step="give the route one slot for each row of the batch",
            )
        else:
            counts = (items // len(self.slots),) * len(self.slots)
        edges = [0]
        for count in counts:
            edges.append(edges[-1] + count)
        return edges


def runs_of(route: Route, site: Site, slots: tuple[int, ...], items: int, whole: bool) -> Runs:
    """The runs of a site's items that stacks of `slots` change; `whole`: all of them as one, without streams."""
    place_of = {slot: place for place, slot in enumerate(slots) if slot != -1}
    if whole:
        return Runs((Segment(place_of[route.slots[0]], 0, items, ((0, items, None),)),), covers_all=True)
    segments = _segments(route, route.bounds(items, site.name), place_of)
    return Runs(tuple(segments), sum(segment.stop - segment.start for segment in segments) == items)


def _segments(route: Route, edges: list[int], place_of: dict[int, int]) -> list[Segment]:
    """Runs of neighbouring rows of one slot, empty rows left out."""
    streams = route.streams or (None,) * len(route.slots)
    segments: list[Segment] = []
    for row, slot in enumerate(route.slots):
        place, start, stop = place_of.get(slot), edges[row], edges[row + 1]
        if place is None or start == stop:
            continue
        part = (start, stop, streams[row])
        if segments and segments[-1].place == place and segments[-1].stop == start:
            last = segments.pop()
            segments.append(Segment(place, last.start, stop, (*last.parts, part)))
        else:
            segments.append(Segment(place, start, stop, (part,)))
    return segments


def route_rows(
    base: FrozenModel, slots: Sequence[int], streams: Sequence[int] | None = None
) -> AbstractContextManager[object]:
    """A context in which the base's model may be run on rows of these slots (-1: the bare base).

    `streams` seed the rows' dropout; None: dropout off.

    Raises:
        RouteError: an adapter's slot is named and no bank is open on the base.
    """
    if base.bank is not None:
        return base.bank.route(tuple(slots), streams)
    named = sorted({slot for slot in slots if slot != -1})
    if named:
        raise RouteError(
            f"slot {named[0]} is asked for, and this base carries no bank",
            allowed="-1, the bare base",
            next_step="bank = manylora.Bank(base); bank.put(adapter, slot=0)",
        )
    return nullcontext()
