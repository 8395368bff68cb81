"""What an init says of itself, and how one reads data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from manylora.types import Site, Start

if TYPE_CHECKING:
    from manylora.spec import AdapterSpec


class InputStatistic(Protocol):
    """What is known so far of the inputs that a site is given on the bare base."""

    def add(self, inputs: Tensor) -> None:
        """Take in further inputs (n, in), in the dtype of the base."""
        ...

    def settled(self) -> bool:
        """Whether more inputs would change the result little; asked after 1, 2, 4, 8, ... batches."""
        ...

    def result(self) -> Any:
        """What `Start.inputs` holds: without what was needed only to take in more."""
        ...


@dataclass(frozen=True, slots=True)
class InputReader:
    """How an init reads data.

    `begin(site, rank)` is the statistic of a site that is to have that rank; sites that read one tensor share one, for
    the largest of their ranks. `num_bytes(site)` is what it holds while it takes in inputs. `ranks(sites, inputs,
    spec)` gives each site its rank, 0 to leave it out; `inputs` are the results by name.
    """

    begin: Callable[[Site, int], InputStatistic]
    num_bytes: Callable[[Site], int]
    ranks: Callable[[Sequence[Site], Mapping[str, Any], AdapterSpec], Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Init:
    """How factors start: `draw` gives a (R, I) and b (O, R), float32 or better, on any device.

    `anchored`: the factors start away from zero and what they amount to then is taken off again, so that the adapter
    still starts at the base. `starts_at_base`: whether a new adapter leaves the base's outputs as they are.
    `needs_packed`: it starts from what packing has lost, so it has a meaning on a packed base only. `reads`: what it
    wants to know of the data that its sites see; None: it reads none.
    """

    draw: Callable[[Start], tuple[Tensor, Tensor]]
    anchored: bool = False
    starts_at_base: bool = True
    needs_packed: bool = False
    reads: InputReader | None = None
