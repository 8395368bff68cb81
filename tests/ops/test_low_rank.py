"""What the fast low-rank update owes, whatever the route: autograd's numbers, few calls, rows kept apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from drawn import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.base.kinds.linear import LINEAR
from manylora.ops.dropout import dropout_mask
from manylora.ops.groups import LEAST_UNIT, LONGEST_COPIED, PADDED_RATIO, blocks
from manylora.ops.low_rank import low_rank, low_rank_together, reference
from manylora.types import Runs, Segment, Site, Stack, Use

COLUMNS, ROWS = 6, 5
SITE = Site("site", LINEAR, nn.Linear(COLUMNS, ROWS).double().requires_grad_(False), textbook=True)


@dataclass(frozen=True)
class Kind:
    """A stack as it is drawn: `ranks` of its places, whether it has anchors, the grid, and each place's dropout."""

    shape_class: int
    ranks: tuple[int, ...]
    anchored: bool = False
    rounding: str | None = None
    dropouts: tuple[float, ...] = ()


def stack_of(kind: Kind, seed: int, dtype: torch.dtype = torch.float64, site: Site = SITE) -> Stack:
    """A stack of random factors, zero beyond each place's rank."""
    draw = torch.Generator().manual_seed(seed)
    rows, columns = site.out_in
    count = len(kind.ranks)
    keep = (torch.arange(kind.shape_class) < torch.tensor(kind.ranks)[:, None]).double()

    def factors() -> dict[str, Tensor]:
        a = torch.randn(count, kind.shape_class, columns, generator=draw, dtype=torch.float64) * keep[:, :, None]
        b = torch.randn(count, rows, kind.shape_class, generator=draw, dtype=torch.float64) * keep[:, None, :]
        return {"a": a.to(dtype), "b": b.to(dtype)}

    return Stack(
        site,
        "lora",
        kind.shape_class,
        kind.rounding,
        {name: tensor.requires_grad_() for name, tensor in factors().items()},
        factors() if kind.anchored else {},
        list(range(count)),
        list(kind.ranks),
        [0.5 + 0.7 * place for place in range(count)],
        list(kind.dropouts or (0.0,) * count),
    )


def uses_of(stacks: list[Stack], rows: list[tuple[int, int, int]]) -> tuple[list[Use], int]:
    """Uses for rows of (stack or -1, place, items), neighbours of one place joined, and the number of items."""
    found: list[list[Segment]] = [[] for _ in stacks]
    start = 0
    for index, (which, place, items) in enumerate(rows):
        stop = start + items
        if which != -1 and items:
            part = (start, stop, 1000 + index)
            own = found[which]
            if own and own[-1].place == place and own[-1].stop == start:
                last = own.pop()
                own.append(Segment(place, last.start, stop, (*last.parts, part)))
            else:
                own.append(Segment(place, start, stop, (part,)))
        start = stop
    uses = [
        Use(stack, Runs(tuple(own), covers_all=sum(s.stop - s.start for s in own) == start))
        for stack, own in zip(stacks, found, strict=True)
        if own
    ]
    return uses, start


@st.composite
def kinds(draw: Any) -> Kind:
    shape_class = draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(1, 4))
    ranks = draw(st.lists(st.integers(1, shape_class), min_size=count, max_size=count))
    dropouts = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1]), min_size=count, max_size=count))
    form = draw(st.sampled_from(["plain", "plain", "anchored", "int8", "int4"]))
    rounding = form if form.startswith("int") else None
    return Kind(shape_class, tuple(ranks), form == "anchored", rounding, tuple(dropouts))


@st.composite
def routes(draw: Any) -> tuple[list[Kind], list[tuple[int, int, int]]]:
    """Stacks, and rows of equal length, of multiples of one length, or of any; long runs among them now and then."""
    found = draw(st.lists(kinds(), min_size=1, max_size=3))
    length = draw(st.sampled_from([1, 3, LEAST_UNIT, 20]))
    items = draw(
        st.sampled_from(
            [
                st.just(length),
                st.integers(0, 3).map(lambda times: times * length),
                st.integers(0, 24),
                st.sampled_from([0, 5, 17, LONGEST_COPIED + 1, LONGEST_COPIED + 40]),
            ]
        )
    )
    owners = [(-1, 0)] + [(which, place) for which, kind in enumerate(found) for place in range(len(kind.ranks))]
    rows = draw(st.lists(st.tuples(st.sampled_from(owners), items), min_size=1, max_size=9))
    return found, [(which, place, count) for (which, place), count in rows]


def results(run: Any, x: Tensor, stacks: list[Stack], weight: Tensor) -> list[Tensor]:
    """The output, and the gradients of a fixed functional of it for x and each factor that is reached."""
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *(tensor for stack in stacks for tensor in stack.tensors.values())]
    y = run(leaf)
    found = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(own) if g is None else g for own, g in zip(leaves, found, strict=True))]


@settings(max_examples=examples(250), deadline=None)
@given(routes(), st.booleans())
def test_any_route_gives_what_autograd_gives(route: tuple, with_base: bool) -> None:
    found, rows = route
    stacks = [stack_of(kind, seed) for seed, kind in enumerate(found)]
    uses, items = uses_of(stacks, rows)
    assume(uses)
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(items, COLUMNS, generator=draw, dtype=torch.float64)
    weight = torch.randn(items, ROWS, generator=draw, dtype=torch.float64)

    def base(leaf: Tensor) -> Tensor:
        return SITE.map(leaf) if with_base else leaf.new_zeros(items, ROWS)

    fast = results(lambda leaf: low_rank(leaf, SITE, uses, with_base=with_base), x, stacks, weight)
    truth = results(lambda leaf: reference(leaf, SITE, uses, base), x, stacks, weight)
    for got, want in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    for stack, grads in zip(stacks, zip(fast[2::2], fast[3::2], strict=True), strict=True):
        for place, rank in enumerate(stack.ranks):
            assert not grads[0][place, rank:].any(), "padding got a gradient"
            assert not grads[1][place, :, rank:].any(), "padding got a gradient"


@st.composite
def neighbours(draw: Any) -> list[list[Kind]]:
    """The stacks of two or three sites for the same two sets of slots, whatever their ranks, anchors and dropout."""
    counts = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    sites = []
    for _ in range(draw(st.integers(2, 3))):
        own = []
        for count in counts:
            kind = draw(kinds())
            ranks = tuple((kind.ranks * count)[:count])
            dropouts = tuple((kind.dropouts * count)[:count]) if draw(st.booleans()) else ()
            own.append(Kind(kind.shape_class, ranks, kind.anchored, kind.rounding, dropouts))
        sites.append(own)
    return sites


@settings(max_examples=examples(150), deadline=None)
@given(
    neighbours(), st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 2), st.integers(0, 20)), min_size=1, max_size=8)
)
def test_sites_of_one_input_give_what_autograd_gives_of_each(of_sites: list, rows: list) -> None:
    counts = [len(kind.ranks) for kind in of_sites[0]]
    rows = [(which, place % counts[which] if which >= 0 else 0, items) for which, place, items in rows]
    uses, items = uses_of([stack_of(kind, 0) for kind in of_sites[0]], rows)
    assume(uses)
    reached = [index for index, _ in enumerate(counts) if any(which == index and count for which, _, count in rows)]
    runs = [use.runs for use in uses]
    draw = torch.Generator().manual_seed(9)
    x = torch.randn(items, COLUMNS, generator=draw, dtype=torch.float64)
    sites, stacks = [], []
    for number, own in enumerate(of_sites):
        torch.manual_seed(number)
        module = nn.Linear(COLUMNS, ROWS + number, bias=number == 1).double().requires_grad_(False)
        site = Site(f"site {number}", LINEAR, module, textbook=True)
        made = [stack_of(own[index], 10 * number + index, site=site) for index in reached]
        stacks += made
        sites.append((site, [Use(stack, run) for stack, run in zip(made, runs, strict=True)]))
    weight = torch.randn(items, sum(site.out_in[0] for site, _ in sites), generator=draw, dtype=torch.float64)

    fast = results(lambda leaf: torch.cat(low_rank_together(leaf, sites), dim=1), x, stacks, weight)
    truth = results(
        lambda leaf: torch.cat([reference(leaf, *own, own[0].map) for own in sites], dim=1), x, stacks, weight
    )
    for got, want in zip(fast, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, 2), (torch.float32, 0)])
def test_what_factors_are_cast_to_is_kept_where_it_is_smaller(dtype: torch.dtype, kept: int) -> None:
    """In bfloat16 the masters are read once; in their own dtype nothing is copied."""
    stack = stack_of(Kind(2, (2, 2)), 1, torch.float32)
    site = Site("site", LINEAR, nn.Linear(COLUMNS, ROWS, dtype=dtype).requires_grad_(False), textbook=True)
    uses, items = uses_of([stack], [(0, 0, 4), (0, 1, 4)])
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = low_rank(torch.randn(items, COLUMNS, dtype=dtype), site, uses, with_base=True)
    shapes = {(2, 2, COLUMNS), (2, ROWS, 2)}
    masters = [tensor for tensor in saved if tensor.dtype == torch.float32 and tuple(tensor.shape) in shapes]
    casts = [tensor for tensor in saved if tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes]
    assert (len(masters), len(casts)) == (2, kept)
    y.sum().backward()


@settings(max_examples=examples(200), deadline=None)
@given(routes())
def test_blocks_hold_each_item_of_a_segment_once(route: tuple) -> None:
    found, rows = route
    uses, items = uses_of([stack_of(kind, 0) for kind in found], rows)
    numbered = torch.arange(items, dtype=torch.float64)[:, None]
    for use in uses:
        place_of = {item: s.place for s in use.runs.segments for item in range(s.start, s.stop)}
        seen: Counter[int] = Counter()
        for block in blocks(use.runs.segments):
            taken = block.take(numbered)
            assert taken.shape == (len(block.places), block.length, 1)
            for place, start, stop, own in zip(block.places, block.starts, block.stops, taken, strict=True):
                held = [int(value) for value in own.view(-1)]
                assert held[: stop - start] == list(range(start, stop))
                assert all(place_of[item] == place for item in held), "a group holds another member's items"
                seen.update(range(start, stop))
            assert not block.take_gradient(numbered + 1)[block_padding(block)].any()
        assert seen == Counter(list(place_of))


def block_padding(block: Any) -> Tensor:
    sizes = torch.tensor(block.stops) - torch.tensor(block.starts)
    return torch.arange(block.length) >= sizes[:, None]


def segments(*runs: tuple[int, int]) -> list[Segment]:
    return [Segment(place, start, stop, ((start, stop, None),)) for place, (start, stop) in enumerate(runs)]


LONG = LONGEST_COPIED + 8


@pytest.mark.parametrize(
    ("runs", "forms"),
    [
        ([(0, 7), (7, 14), (14, 21)], [(3, 7, "view")]),
        ([(0, LONG), (LONG, 2 * LONG)], [(2, LONG, "view")]),
        ([(0, 7), (14, 21), (28, 35)], [(3, 7, "view")]),
        ([(0, 32), (32, 64), (96, 128)], [(3, 32, "copy")]),
        ([(0, 64), (64, 96), (96, 128)], [(4, 32, "view")]),
        ([(0, 64), (96, 128), (128, 160)], [(4, 32, "copy")]),
        ([(0, 9), (9, 20), (20, 28)], [(3, 11, "padded")]),
        ([(0, 9), (9, 20), (20, 22)], [(2, 11, "padded"), (1, 2, "view")]),
        ([(0, LONG), (LONG, 2 * LONG + 1)], [(1, LONG, "view"), (1, LONG + 1, "view")]),
        ([(5, 5)], []),
    ],
)
def test_the_rule_of_blocks(runs: list[tuple[int, int]], forms: list[tuple[int, int, str]]) -> None:
    found = []
    for block in blocks(segments(*runs)):
        form = "view" if block.apart is not None else "copy" if block.stops[0] - block.starts[0] == block.length else ""
        padded = any(stop - start < block.length for start, stop in zip(block.starts, block.stops, strict=True))
        found.append((len(block.places), block.length, "padded" if padded else form))
    assert found == forms


def test_padding_adds_at_most_half_to_any_run() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, LONGEST_COPIED, (12,), generator=draw).tolist()
        edges = torch.tensor([0, *sizes]).cumsum(0).tolist()
        made = blocks(segments(*pairwise(edges)))
        for block in made:
            if len(block.places) > 1:
                shortest = min(stop - start for start, stop in zip(block.starts, block.stops, strict=True))
                assert block.length <= PADDED_RATIO * shortest


@pytest.mark.parametrize("form", ["even", "uneven", "ragged", "long"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_members_nan_reaches_no_other_member(form: str, dropout: float) -> None:
    """NaN times zero is NaN, so padding and bare rows must never hold another member's numbers."""
    rows = {
        "even": [(0, 0, 8), (0, 1, 8), (0, 2, 8)],
        "uneven": [(0, 0, LEAST_UNIT), (0, 1, LEAST_UNIT), (-1, 0, LEAST_UNIT), (0, 2, LEAST_UNIT)],
        "ragged": [(0, 0, 9), (0, 1, 11), (-1, 0, 3), (0, 2, 8)],
        "long": [(0, 0, LONG), (0, 1, 11), (-1, 0, 3), (0, 2, 8)],
    }[form]
    stack = stack_of(Kind(2, (2, 2, 2), dropouts=(dropout,) * 3), 1)
    uses, items = uses_of([stack], rows)
    x = torch.randn(items, COLUMNS, dtype=torch.float64)
    bad = range(uses[0].runs.segments[1].start, uses[0].runs.segments[1].stop)
    x[bad.start : bad.stop] = float("nan")
    y, gx, ga, gb = results(lambda leaf: low_rank(leaf, SITE, uses, with_base=True), x, [stack], torch.ones(items, 1))
    others = [item for item in range(items) if item not in bad]
    assert y[others].isfinite().all()
    assert gx[others].isfinite().all()
    assert ga[[0, 2]].isfinite().all()
    assert gb[[0, 2]].isfinite().all()
    assert not ga[1].isfinite().all()


class Products(TorchDispatchMode):
    """Counts the matrix products that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        self.count += name in {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}
        return func(*args, **(kwargs or {}))


def products(rows: list[tuple[int, int, int]], kinds_of: list[Kind]) -> int:
    stacks = [stack_of(kind, 1) for kind in kinds_of]
    uses, items = uses_of(stacks, rows)
    x = torch.randn(items, COLUMNS, dtype=torch.float64, requires_grad=True)
    with Products() as seen:
        low_rank(x, SITE, uses, with_base=True).sum().backward()
    return seen.count


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("members", [1, 2, 32])
def test_equal_members_take_as_many_products_as_one(members: int, dropout: float) -> None:
    """Two of the base, two of the update forward, four backward, for any number of members."""
    kind = Kind(4, (4,) * members, dropouts=(dropout,) * members)
    assert products([(0, place, 16) for place in range(members)], [kind]) == 8


def test_members_of_mixed_ranks_take_as_many_products_as_there_are_stacks() -> None:
    two = [Kind(2, (2,) * 8), Kind(4, (3,) * 8)]
    alternating = [(which, place, 16) for place in range(8) for which in (0, 1)]
    assert products(alternating, two) == 2 + 2 * 6
    with_bare_rows = [row for entry in alternating for row in (entry, (-1, 0, 5))]
    assert products(with_bare_rows, two) == 2 + 2 * 6


def test_members_with_several_rows_take_as_many_products_as_one() -> None:
    rows = [(0, place, 16 * (1 + place % 3)) for place in range(8)]
    assert products(rows, [Kind(4, (4,) * 8)]) == 8


@pytest.mark.parametrize("spread", ["even", "uneven", "ragged"])
def test_a_member_in_bfloat16_has_the_bits_that_it_has_alone(spread: str) -> None:
    """Each group of a batched product is computed as it would be by itself, up to the order of a sum."""
    linear = nn.Linear(64, 48, bias=False).bfloat16().requires_grad_(False)
    site = Site("site", LINEAR, linear, textbook=True)
    stack = stack_of(Kind(8, (8, 8, 8)), 2, torch.float32, site)
    rows = {
        "even": [(0, 0, 16), (0, 1, 16), (0, 2, 16)],
        "uneven": [(0, 0, 16), (0, 1, 16), (-1, 0, 16), (0, 2, 16)],
        "ragged": [(0, 0, 13), (0, 1, 11), (-1, 0, 3), (0, 2, 12)],
    }[spread]
    uses, items = uses_of([stack], rows)
    draw = torch.Generator().manual_seed(4)
    x = torch.randn(items, 64, generator=draw).bfloat16()
    weight = torch.randn(items, 48, generator=draw).bfloat16()
    together = results(lambda leaf: low_rank(leaf, site, uses, with_base=True), x, [stack], weight)
    for segment in uses[0].runs.segments:
        cut = slice(segment.start, segment.stop)
        size = segment.stop - segment.start
        lone = [Use(stack, Runs((Segment(segment.place, 0, size, ((0, size, None),)),), covers_all=True))]
        alone = results(
            lambda leaf, lone=lone: low_rank(leaf, site, lone, with_base=True), x[cut], [stack], weight[cut]
        )
        pairs = [(together[0][cut], alone[0]), (together[1][cut], alone[1])]
        pairs += [(together[k][segment.place], alone[k][segment.place]) for k in (2, 3)]
        for got, want in pairs:
            assert (got - want).norm() <= 1e-2 * want.norm()


def test_gradients_add_up_over_calls() -> None:
    stack = stack_of(Kind(2, (2, 2)), 1)
    uses, items = uses_of([stack], [(0, 1, 4)])
    x = torch.randn(items, COLUMNS, dtype=torch.float64)
    for _ in range(2):
        low_rank(x, SITE, uses, with_base=True).sum().backward()
    once = results(lambda leaf: low_rank(leaf, SITE, uses, with_base=True), x, [stack], torch.ones(items, 1))
    torch.testing.assert_close(stack.tensors["a"].grad, 2 * once[2])
    torch.testing.assert_close(stack.tensors["b"].grad, 2 * once[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_values_of_a_dropout_mask_are_fixed(dtype: torch.dtype) -> None:
    """Runs of earlier versions resume to the same bytes only while these stay."""
    mask = dropout_mask(11, "model.layers.0.mlp.up_proj", (2, 8), 0.25, torch.zeros((), dtype=dtype))
    kept = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    assert mask.dtype == dtype
    assert torch.equal(mask.ne(0), kept)
    assert torch.equal(mask[kept].unique(), torch.tensor([4 / 3], dtype=dtype))
