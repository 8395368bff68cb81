"""What an init is told, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.types import Site


@dataclass(frozen=True, slots=True)
class Start:
    """The place where factors start: a site, the rank there, and the factor s by which the method scales them.

    Every random draw comes from `generator`, a generator of the CPU. `original` gives the site's weight (out, in) as it
    was before it was packed, read from disk at each call; of a site that is not packed it is the weight itself.
    """

    site: Site
    rank: int
    scale: float
    generator: torch.Generator
    original: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Init:
    """How factors start: `draw` gives a (R, I) and b (O, R), float32 or better, on any device.

    `anchored`: the factors start away from zero and what they amount to then is taken off again, so that the adapter
    still starts at the base. `starts_at_base`: whether a new adapter leaves the base's outputs as they are.
    `needs_packed`: it starts from what packing has lost, so it has a meaning on a packed base only.
    """

    draw: Callable[[Start], tuple[Tensor, Tensor]]
    anchored: bool = False
    starts_at_base: bool = True
    needs_packed: bool = False
