"""The bank: many adapters stacked on one base, and the route that names the slot of every row.

There are no modes. Training one adapter, many, the bare base, or a mixture is the same forward under another route.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.receipt import check_base
from manylora.adapters.route import Route, runs_of
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, BaseMismatch, RouteError, SpecError, nearest_names
from manylora.forwards import Level, place_stand_in
from manylora.memory.allocator import lying_apart
from manylora.methods import METHODS
from manylora.types import Factors, Method, Site, Stack, Use

MAX_PLANS = 8192
"""Plans (which places change which items of a site) that are remembered, so that decoding finds them at each token."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Outputs by site that were computed from an input, as it was then, before their sites are called with it."""

    x: Tensor
    version: int
    outputs: dict[str, Tensor]


class Bank:
    """Stacked factors for `num_slots` adapters on one base.

    `max_rank` refuses adapters above it (None: any). `dtype` is that of the factors. While a bank is open, every call
    of the base's model must lie within `route`.
    """

    def __init__(
        self, base: FrozenModel, *, num_slots: int = 1, max_rank: int | None = None, dtype: torch.dtype = torch.float32
    ):
        if num_slots < 1:
            raise SpecError(f"num_slots is {num_slots}", allowed="at least 1")
        if base.bank is not None:
            raise RouteError("this base already carries a bank", next_step="close it first: base.bank.close()")
        self.base = base
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.dtype = dtype
        self.route_now: Route | None = None
        self.stacks: dict[tuple[str, str, int, bool, str | None], Stack] = {}
        self._adapters: dict[int, Adapter] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._by_site: dict[str, list[Stack]] = {}
        self._plans: dict[tuple, list[tuple[Method, list[Use]]]] = {}
        self.recorded: dict[str, list[Tensor]] | None = None
        self._ahead: _Ahead | None = None
        self._proven: set[str] | None = None
        base.bank = self
        self._stand_ins = [
            place_stand_in(site.module, _SiteForward(self, site), Level.SITE) for site in base.sites.values()
        ]
        if num_slots > 1 and base.example is not None:
            self.prove()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the base back as it was."""
        for stand_in in self._stand_ins:
            stand_in.remove()
        self.base.bank = None

    # -- slots ---------------------------------------------------------------------------------------------------------

    def put(self, adapter: Adapter, *, slot: int) -> None:
        """Copy an adapter into a slot; what the slot held is dropped.

        Raises:
            BaseMismatch: the adapter was made for another base, or its sites are not in this one.
            AdapterBroken: factors of a shape that the site does not have.
        """
        self._check_slot(slot)
        check_base(adapter, self.base)
        self._check_sites(adapter)
        self._vacate(slot)
        for name, factors in adapter.factors.items():
            self._place(self.base.sites[name], factors, adapter, slot)
        self._close_gaps()
        self._adapters[slot] = replace(adapter, factors={})
        self._names[slot] = tuple(adapter.factors)

    def get(self, slot: int) -> Adapter:
        """The adapter in a slot with its present factors, on the CPU; padding is left out.

        Raises:
            RouteError: the slot is empty.
        """
        self._check_slot(slot)
        if slot not in self._adapters:
            raise RouteError(f"slot {slot} is empty", next_step="bank.put(adapter, slot=...)")
        factors = {}
        for stack, place in self.places(slot):
            size = stack.ranks[place] or stack.shape_class  # a method without rank pads nothing
            shapes = METHODS.get(stack.method).stack_shapes(stack.site, size)
            tensors, anchors = (
                {
                    name: tensor.detach()[place][tuple(slice(0, size) for size in shapes[name])].cpu().clone()
                    for name, tensor in held.items()
                }
                for held in (stack.tensors, stack.anchors)
            )
            factors[stack.site.name] = Factors(stack.method, tensors, anchors)
        return replace(self._adapters[slot], factors={name: factors[name] for name in self._names[slot]})

    @torch.no_grad()
    def follow(self, slot: int, follower: int, decay: float) -> None:
        """Move the factors in a follower's slot towards those of a slot: it keeps the share `decay` of what it was.

        Both slots hold adapters of one specification.
        """
        if decay == 1.0:
            return
        for stack in self.stacks.values():
            if slot in stack.slots:
                to, of = stack.slots.index(follower), stack.slots.index(slot)
                for tensor in stack.tensors.values():
                    tensor[to].lerp_(tensor[of], 1.0 - decay)
        self._ahead = None

    def clear(self, slot: int) -> None:
        """Empty a slot and give back what it held in memory."""
        self._check_slot(slot)
        self._vacate(slot)
        self._close_gaps()

    def _vacate(self, slot: int) -> None:
        """Empty a slot; its places are zeroed and may be used again."""
        for stack, place in self.places(slot):
            with torch.no_grad():
                for tensor in (*stack.tensors.values(), *stack.anchors.values(), *stack.states.values()):
                    if place < len(tensor):  # a state may be younger than the place
                        tensor[place].zero_()
            stack.slots[place] = -1
        self._adapters.pop(slot, None)
        self._forget(lambda site, slots: slot in slots)
        self._ahead = None

    def _forget(self, changed: Callable[[str, tuple[int, ...]], bool]) -> None:
        """Drop the plans of what has changed, by site and slots of the rows."""
        for key in [key for key in self._plans if changed(key[0], key[1])]:
            del self._plans[key]

    def _close_gaps(self) -> None:
        """Drop the places that no slot owns, and the stacks that have no other."""
        for key, stack in list(self.stacks.items()):
            kept = [place for place, slot in enumerate(stack.slots) if slot != -1]
            if len(kept) == len(stack.slots):
                continue
            if not kept:
                del self.stacks[key]
                for stacks in self._by_site.values():
                    if stack in stacks:
                        stacks.remove(stack)
                continue
            for held in (stack.tensors, stack.anchors, stack.states):
                for name, tensor in held.items():
                    within = [place for place in kept if place < len(tensor)]
                    with lying_apart():
                        held[name] = tensor.detach()[within].requires_grad_(tensor.requires_grad)
                    held[name].grad = None if tensor.grad is None else tensor.grad[within]
            moved = {name for name, stacks in self._by_site.items() if stack in stacks}
            self._forget(lambda site, slots, moved=moved: site in moved)
            stack.slots, stack.ranks = [stack.slots[p] for p in kept], [stack.ranks[p] for p in kept]
            stack.scales, stack.dropouts = [stack.scales[p] for p in kept], [stack.dropouts[p] for p in kept]

    def places(self, slot: int) -> list[tuple[Stack, int]]:
        """The stacks that hold a slot's factors, and its place in each."""
        return [
            (stack, place) for stack in self.stacks.values() for place, own in enumerate(stack.slots) if own == slot
        ]

    def widths(self, slot: int) -> tuple[int, ...]:
        """How wide the heads of a slot are that the base lacks: rows of equal ones may share a forward."""
        lacking = {site.name for site in self.base.lacking}
        return (
            tuple(stack.shape_class for stack, _ in self.places(slot) if stack.site.name in lacking) if lacking else ()
        )

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.num_slots:
            raise RouteError(f"slot {slot}", allowed=f"0 to {self.num_slots - 1}")

    def _check_sites(self, adapter: Adapter) -> None:
        known = self.base.sites
        missing = [name for name in adapter.factors if name not in known]
        if missing or not adapter.factors:
            first = missing[0] if missing else "nothing"
            raise BaseMismatch(
                f"{len(missing)} of the adapter's {len(adapter.factors)} sites are not in this base, "
                f"the first is {first!r}",
                nearest=nearest_names(first, known),
                next_step="compare `manylora inspect ADAPTER` with `manylora inspect BASE --sites`",
            )
        for name, factors in adapter.factors.items():
            method, site = METHODS.get(factors.method), known[name]
            if not method.adapts(site.kind):
                raise BaseMismatch(f"{name!r} is a {type(site.module).__name__}, which {factors.method} cannot adapt")
            shapes = method.stack_shapes(site, 0)
            for key, tensor in factors.tensors.items():
                if key not in shapes:
                    raise AdapterBroken(f"{name!r} has no tensor {key!r}", allowed=", ".join(shapes))
                if not _fits(tuple(tensor.shape), shapes[key]):
                    raise AdapterBroken(
                        f"{key!r} at {name!r} has shape {tuple(tensor.shape)}",
                        allowed=" x ".join(str(size) if size else "rank" for size in shapes[key]),
                        next_step="the adapter belongs to a base of other sizes",
                    )
            if factors.anchors:
                found = {key: tuple(tensor.shape) for key, tensor in factors.anchors.items()}
                wanted = {key: tuple(factors.tensors[key].shape) for key in found if key in factors.tensors}
                if found != wanted:
                    raise AdapterBroken(f"the anchors at {name!r} have shapes {found}", allowed=str(wanted))
            rank = method.rank(factors)
            if self.max_rank is not None and rank > self.max_rank:
                raise SpecError(f"rank {rank} at {name!r}", allowed=f"this bank holds ranks up to {self.max_rank}")

    def _place(self, site: Site, factors: Factors, adapter: Adapter, slot: int) -> None:
        method = METHODS.get(factors.method)
        shape_class = method.shape_class(site, factors)
        # Tied weights that are both copied share one copy: the stack then stands at each of their sites.
        spec = adapter.spec
        shared = [name for name in spec.full_sites if name not in adapter.factors]
        tied = [name for name in shared if name in self.base.sites and self.base.sites[name].tied_to == site.name]
        names = [site.name, *tied] if method.replaces else [site.name]
        rounding = None if method.replaces else spec.quantize
        key = ("+".join(names), method.name, shape_class, bool(factors.anchors), rounding)
        if key not in self.stacks:
            self.stacks[key] = Stack(site, method.name, shape_class, rounding)
            for name in names:
                self._by_site.setdefault(name, []).append(self.stacks[key])
        stack = self.stacks[key]
        if -1 in stack.slots:
            place = stack.slots.index(-1)
        else:
            place = len(stack.slots)
            stack.slots.append(-1)
            stack.ranks.append(0)
            stack.scales.append(0.0)
            stack.dropouts.append(0.0)
            for name, shape in method.stack_shapes(site, shape_class).items():
                stack.tensors[name] = self._grown(stack.tensors.get(name), shape).requires_grad_()
                if name in factors.anchors:
                    stack.anchors[name] = self._grown(stack.anchors.get(name), shape)
        stack.slots[place] = slot
        stack.ranks[place] = method.rank(factors)
        stack.scales[place] = spec.scale(site.name) if stack.ranks[place] else 1.0
        stack.dropouts[place] = 0.0 if method.replaces else spec.dropout
        with torch.no_grad():
            for given, into in ((factors.tensors, stack.tensors), (factors.anchors, stack.anchors)):
                for name, value in given.items():
                    target = into[name][place]
                    target[tuple(slice(0, size) for size in value.shape)] = value.to(target)

    def _grown(self, held: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """A stacked tensor with one place more, which is zero."""
        count = 0 if held is None else held.shape[0]
        with lying_apart():
            grown = torch.zeros(count + 1, *shape, dtype=self.dtype, device=self.base.device)
        if held is not None:
            grown[:count] = held.detach()
        return grown

    # -- routing -------------------------------------------------------------------------------------------------------

    @contextmanager
    def route(self, slots: Sequence[int] | Route, streams: Sequence[int] | None = None) -> Iterator[Route]:
        """Within it, row r of every batch belongs to `slots[r]`; with `streams`, dropout is on and seeded by row.

        Raises:
            RouteError: a slot that the bank does not have.
        """
        route = slots if isinstance(slots, Route) else Route(tuple(slots), None if streams is None else tuple(streams))
        for slot in set(route.slots):
            if slot != -1 and slot not in self._adapters:
                self._check_slot(slot)
                raise RouteError(
                    f"slot {slot} is empty", next_step="bank.put(adapter, slot=...), or -1 for the bare base"
                )
        if route.streams is not None and len(route.streams) != len(route.slots):
            raise RouteError(f"{len(route.streams)} streams for {len(route.slots)} rows")
        before, self.route_now = self.route_now, route
        self._ahead = None
        try:
            yield route
        finally:
            self.route_now = before
            self._ahead = None

    def prove(self) -> None:
        """Show that each site sees the batch's rows one after another: three rows together against each row alone.

        A site that does not (a table of positions shared by all rows, a sequence-first module) may still be adapted
        where all rows of a batch belong to one slot; a mixed batch that reaches it is an error that names it.

        Raises:
            RouteError: the base offers no example inputs.
        """
        if self.base.example is None:
            raise RouteError(
                "this base has no example inputs", next_step="FrozenModel(module, example=lambda rows: {...})"
            )
        inputs = self.base.example(3)
        together = self._record(inputs)
        alone = [self._record({key: value[row : row + 1] for key, value in inputs.items()}) for row in range(3)]
        self._proven = {name for name in together if _rows_lead(together[name], [seen.get(name) for seen in alone])}

    def _record(self, inputs: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """The inputs of every site in one forward of the bare base, by name."""
        self.recorded = {}
        try:
            with torch.no_grad(), self.route((-1,)):
                self.base.model(**inputs)
            return self.recorded
        finally:
            self.recorded = None

    def adapts(self, site: Site) -> bool:
        """Whether any slot changes this site."""
        return bool(self._by_site.get(site.name))

    def uses(self, site: Site, x: Tensor) -> list[tuple[Method, list[Use]]]:
        """Which stacks change this site's output for the present route, and where; by method, replacing ones last."""
        route = self.route_now
        if route is None:
            raise RouteError(
                f"{site.name!r} was run without a route",
                next_step="with bank.route([slot of each row]): base.model(...)",
            )
        stacks = self._by_site.get(site.name)
        if not stacks:
            return []
        if route.streams is not None:
            return self._plan(route, site, stacks, x)
        key = (site.name, route.slots, route.counts, tuple(x.shape))
        found = self._plans.get(key)
        if found is None:
            if len(self._plans) >= MAX_PLANS:  # the oldest half goes: what is in use now stays
                for old in list(self._plans)[: MAX_PLANS // 2]:
                    del self._plans[old]
            found = self._plans[key] = self._plan(route, site, stacks, x)
        return found

    def together(self, site: Site, x: Tensor, method: Method, uses: list[Use]) -> Tensor | None:
        """A site's output, computed along with those of the sites that read x after it; None where none does.

        What is computed ahead is held until its site is called, or another route or adapter comes.
        """
        names = self.base.reads_along.get(site.name)
        if not names or x.is_inference():
            return None
        sites = [(site, uses)]
        for name in names:
            other = self.base.sites[name]
            found = self.uses(other, x)
            if len(found) == 1 and found[0][0] is method:
                sites.append((other, found[0][1]))
        made = method.together(x, sites) if len(sites) > 1 else None
        if made is None:
            return None
        later = {other.name: y for (other, _), y in zip(sites[1:], made[1:], strict=True)}
        self._ahead = _Ahead(x, x._version, later)
        return made[0]

    def ahead(self, site: Site, x: Tensor) -> Tensor | None:
        """What was computed for a site along with another, if it was from this very input."""
        held = self._ahead
        if held is None or held.x is not x or x._version != held.version:
            return None
        return held.outputs.pop(site.name, None)

    def _plan(self, route: Route, site: Site, stacks: list[Stack], x: Tensor) -> list[tuple[Method, list[Use]]]:
        by_method: dict[str, list[Use]] = {}
        mixed = len(route.reached) > 1
        for stack in stacks:
            slots = tuple(stack.slots)
            if (route.reached - {-1}).isdisjoint(slots):
                continue
            if mixed and route.counts is None and (self._proven is None or site.name not in self._proven):
                raise RouteError(
                    f"{site.name!r} has not been shown to see the batch's rows one after another, "
                    "so slots cannot be mixed there",
                    next_step="leave the site out, or give FrozenModel an example and call bank.prove()",
                )
            items = METHODS.get(stack.method).num_items(site, x)
            whole = not mixed and (route.streams is None or not any(stack.dropouts))
            runs = route.runs.get((slots, items, whole))
            if runs is None:
                runs = route.runs[slots, items, whole] = runs_of(route, site, slots, items, whole)
            if runs.segments:
                by_method.setdefault(stack.method, []).append(Use(stack, runs))
        methods = [(METHODS.get(name), uses) for name, uses in by_method.items()]
        return sorted(methods, key=lambda pair: pair[0].replaces)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size == want or want == 0 for size, want in zip(shape, wanted, strict=True)
    )


def _rows_lead(together: list[Tensor], alone: list[list[Tensor] | None]) -> bool:
    """Whether the input of three rows is, third by third, the inputs of the rows."""
    for index, whole in enumerate(together):
        if whole.shape[0] % 3:
            return False
        for row, part in enumerate(whole.chunk(3)):
            single = alone[row]
            if single is None or len(single) != len(together) or single[index].shape != part.shape:
                return False
            got, want = part.double(), single[index].double()
            if (got - want).norm() > 0.05 * want.norm() + 1e-6:
                return False
    return True


class _SiteForward:
    """What a bank installs on a site: the base's own map, changed by the stacks that the route reaches."""

    def __init__(self, bank: Bank, site: Site):
        self.bank = bank
        self.site = site
        parameters = list(inspect.signature(type(site.module).forward).parameters)
        self.first = parameters[1] if len(parameters) > 1 else ""  # after self

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not args and self.first not in kwargs:
            if self.bank.adapts(self.site):
                raise RouteError(f"{self.site.name!r} is called without an input, so its rows cannot be told apart")
            return self.site.map(*args, **kwargs)
        x = args[0] if args else kwargs.pop(self.first)
        args = args[1:]
        if self.bank.recorded is not None and isinstance(x, Tensor):
            self.bank.recorded.setdefault(self.site.name, []).append(x.detach())
        plain = not args and not kwargs
        ahead = self.bank.ahead(self.site, x) if plain else None
        if ahead is not None:
            return ahead
        found = self.bank.uses(self.site, x)
        if not found:
            if self.site.lacks is not None and self.bank.recorded is None:
                raise self._lacking()
            return self.site.map(x, *args, **kwargs)
        if plain and len(found) == 1:
            y = self.bank.together(self.site, x, *found[0])
            if y is not None:
                return y
        if self.site.lacks is not None and not any(u.runs.covers_all for _, uses in found for u in uses):
            raise self._lacking()
        y = None
        for method, uses in found:
            y = method.forward(x, y, self.site, uses, (args, kwargs))
        assert y is not None
        return y

    def _lacking(self) -> RouteError:
        return RouteError(
            f"the base has no {self.site.name!r}: a row of the batch belongs to no adapter that brings it, or adapters "
            "with heads of other widths share the batch",
            next_step="leave slot -1 out, and run adapters of other widths apart",
        )
