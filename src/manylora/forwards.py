"""Who stands in for the forward of a module: several may, over what the module brought, and all of it comes back.

A base may carry forwards of its own: hooks of accelerate, a user's patch. Whoever adapts it stands above these, calls
them, and leaves them as they were. Nobody but this file sets a module's `forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]
PILE = "_manylora_forwards"
"""Where a module's own dictionary holds its pile, so that the two go together."""


class Level(IntEnum):
    """Who stands above whom, whoever came first."""

    SITE = 0
    """A site's map, changed by adapters, or with other parameters."""
    LAYER = 1
    """A layer as torch's compiler makes it, or one that hands its input on."""
    RECOMPUTED = 2
    """A layer that is computed again in backward."""
    PRODUCT = 3
    """A product that is watched while its layer is computed."""
    HEAD = 4
    """A head that is passed by, since the states before it are wanted."""


class StandIn:
    """One who stands in for a module's forward; `remove` takes it away, wherever in the pile it stands.

    `beneath` is what the module would run without it, and without all that stand above it.
    """

    def __init__(self, pile: _Pile, run: Forward | None, level: Level):
        self.pile = pile
        self.level = level
        self.run = run
        self.beneath: Forward = pile.from_class
        self.shown: Forward | None = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # One that was taken away may still be held by somebody who stood above it.
        return (self.beneath if self.run is None else self.run)(*args, **kwargs)

    def show(self, forward: Forward | None) -> None:
        """Have the module run this in place of the stand-in; None: its own code, as if nobody stood there."""
        if forward is not self.shown:
            self.shown = forward
            self.pile.place()

    def remove(self) -> None:
        """Take it away; what stood beneath it stands there again, and what stands above it stays."""
        if self in self.pile.entries:
            self.pile.entries.remove(self)
            self.run = None
            self.pile.place()


class _Pile:
    """All that stands on one module, from the bottom up; what others put there is among it, as they put it."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.entries: list[Any] = []
        self.placed: Forward | None = None
        self.brought: Forward | None = None
        """What the module brought before anyone here came."""

    def from_class(self, *args: Any, **kwargs: Any) -> Any:
        # Looked up at each call: a wrapper may swap a module's class.
        return type(self.module).forward(self.module, *args, **kwargs)

    def add(self, entry: StandIn) -> None:
        present = self.module.__dict__.get("forward")
        if present is not self.placed and present is not None:
            self.entries.append(present)
            if len(self.entries) == 1:
                self.brought = present
        place = len(self.entries)
        while place and isinstance(self.entries[place - 1], StandIn) and self.entries[place - 1].level > entry.level:
            place -= 1
        self.entries.insert(place, entry)
        self.placed = present
        self.place()

    def place(self) -> None:
        below: Forward = self.from_class
        for entry in self.entries:
            if isinstance(entry, StandIn):
                entry.beneath = below
            below = entry
        attributes = self.module.__dict__
        # Else somebody put theirs above all of ours since, and calls what stood there.
        if attributes.get("forward") is self.placed:
            top = self.entries[-1] if self.entries else None
            shown = top.shown if isinstance(top, StandIn) else top
            self.placed = shown = self.brought if shown is None else shown
            if shown is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = shown
        if not any(isinstance(entry, StandIn) for entry in self.entries):
            attributes.pop(PILE, None)


def place_stand_in(module: nn.Module, run: Forward | None, level: Level) -> StandIn:
    """Have a module run `run` in place of its forward until the stand-in is removed; None: what stands beneath it."""
    pile = module.__dict__.get(PILE)
    if pile is None:
        pile = module.__dict__[PILE] = _Pile(module)
    entry = StandIn(pile, run, level)
    pile.add(entry)
    return entry


@contextmanager
def standing_in(module: nn.Module, run: Forward, level: Level) -> Iterator[StandIn]:
    """`place_stand_in` for as long as it is open."""
    entry = place_stand_in(module, run, level)
    try:
        yield entry
    finally:
        entry.remove()


def brought_forward(module: nn.Module) -> Forward | None:
    """The forward that a module brought on itself (a hook's, a user's patch); None: that of its class."""
    forward = module.__dict__.get("forward")
    if type(forward) is StandIn:
        return forward.pile.brought
    pile = module.__dict__.get(PILE)
    return forward if pile is None else pile.brought


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module computes by itself, with the forward that it brought or else its class's."""
    brought = brought_forward(module)
    return type(module).forward(module, *args, **kwargs) if brought is None else brought(*args, **kwargs)


def run_with(module: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """`own_forward` with other tensors in place of some of the module's parameters, which stay what they are."""
    before = module.__dict__["_parameters"]
    module.__dict__["_parameters"] = {**before, **parameters}
    try:
        return own_forward(module, *args, **kwargs)
    finally:
        module.__dict__["_parameters"] = before
