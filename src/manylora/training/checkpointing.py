"""What the layers of a base keep from the forward for the backward: all, all but what is cheap to compute again, or
nothing but their inputs.

transformers' own checkpointing does nothing in evaluation mode, in which a base always is. The route of a bank is part
of what a layer is computed from, and the backward stands outside of it: each layer takes its route along. Dropout masks
are a function of (row's stream, site), so they come out the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from manylora.base.frozen import FrozenModel
from manylora.base.layers import Layer, repeated_layers
from manylora.errors import ConfigError
from manylora.forwards import Level, StandIn, place_stand_in
from manylora.training.recompute import Products, recomputed

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = ("none", "selective", "full")
"""From what is fastest to what keeps least."""


class Checkpointing:
    """The layers of a base and how they are computed at present: `mode` may be changed between two steps.

    The last layer always keeps all: its backward comes first, when everything else is still held, so to compute it
    again would lower no peak. `layers` is empty where none were found; then only `none` can be.
    """

    def __init__(self, base: FrozenModel, mode: Mode = "none", modes: tuple[Mode, ...] = MODES):
        """`modes`: those that the run may come to, in the order of `MODES`."""
        self.base = base
        self.modes = modes
        self.layers = repeated_layers(base.model, base.sites)
        self.mode: Mode = "none"
        self._stand_ins: list[StandIn] = []
        self.set(mode)

    def set(self, mode: Mode) -> None:
        """Compute the layers that way from now on.

        Raises:
            ConfigError: the base has no layers that could be.
        """
        if mode != "none" and len(self.layers) < 2:
            raise ConfigError(
                f"train.checkpointing is {mode}, and this base has no repeated layers to compute again",
                allowed="none, or auto, which is none here",
            )
        self.mode = mode

    def stronger(self) -> Mode | None:
        """The mode that keeps less than the present one; None where there is none."""
        rest = MODES[MODES.index(self.mode) + 1 :] if len(self.layers) > 1 else ()
        return next((mode for mode in rest if mode in self.modes), None)

    def install(self) -> None:
        """Put every layer but the last under this object; `remove` takes them out again."""
        for layer in self.layers[:-1]:
            forward = _LayerForward(self, layer)
            forward.stand_in = place_stand_in(layer.module, forward, Level.RECOMPUTED)
            self._stand_ins.append(forward.stand_in)

    def remove(self) -> None:
        """Give the base back as it was."""
        for stand_in in self._stand_ins:
            stand_in.remove()
        self._stand_ins.clear()


@contextmanager
def checkpointed(base: FrozenModel, mode: Mode = "none", modes: tuple[Mode, ...] = MODES) -> Iterator[Checkpointing]:
    """While it is open, the layers of a base are computed by a mode; `modes` are those that it may change to.

    Raises:
        ConfigError: the base has no layers that could be.
    """
    found = Checkpointing(base, mode, modes)
    found.install()
    try:
        yield found
    finally:
        found.remove()


class _LayerForward:
    """What stands in for a layer's forward."""

    def __init__(self, owner: Checkpointing, layer: Layer):
        self.owner = owner
        self.module = layer.module
        self.stand_in: StandIn
        sites = {name: owner.base.sites[name] for name in layer.sites}
        self.sites = tuple(sites.values())
        linear = [site.module for site in self.sites if site.plain and site.kind.product]
        self.products = Products(tuple(linear))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.stand_in.beneath
        if self.owner.mode == "none" or not torch.is_grad_enabled() or not self._has_gradient(args, kwargs):
            return run(*args, **kwargs)
        products = self.products if self.owner.mode == "selective" else None
        return recomputed(run, args, kwargs, around=self._route(), products=products)

    def _has_gradient(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a backward comes by here at all: below the first adapted site nothing is kept, inputs neither."""
        bank = self.owner.base.bank
        if bank is not None and any(bank.adapts(site) for site in self.sites):
            return True
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return any(tensor.requires_grad for tensor in given) or _is_trained(self.module)

    def _route(self) -> Any:
        """Opens the present route again, whenever it is called."""
        bank = self.owner.base.bank
        if bank is None or bank.route_now is None:
            return nullcontext
        route = bank.route_now

        def again() -> AbstractContextManager[Any]:
            return bank.route(route)

        return again


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def choose_checkpointing(asked: str, totals: Mapping[str, int], free: int) -> tuple[Mode, str]:
    """The mode of a run, and one line that says why.

    `asked` is `train.checkpointing`; `totals` are the bytes that the largest forward and its backward hold, by mode;
    `free` the bytes that they may. A mode that was asked for is kept whatever memory says; `auto` is the fastest of
    `totals` that fits, else the one that keeps least.
    """
    order: list[Mode] = [mode for mode in MODES if mode in totals]
    fits: list[Mode] = [mode for mode in order if totals[mode] <= free]
    chosen: Mode = mode_named(asked) or (fits[0] if fits else order[-1])
    held = ", ".join(f"{_gib(totals[mode])} with {mode}" for mode in order)
    doubt = "" if chosen in fits or chosen not in totals else "; the memory that is free may not hold that"
    why = "train.checkpointing" if asked == chosen else "fastest that fits" if fits else "keeps least"
    told = f" (a forward and its backward hold {held}; {_gib(free)} are free)" if held else ""
    return chosen, f"checkpointing: {chosen}, {why}{told}{doubt}"


def mode_named(asked: str) -> Mode | None:
    """The mode that a configuration names; None for `auto`."""
    return next((mode for mode in MODES if mode == asked), None)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
