"""What a computation holds at each moment, found without doing it: its operations run on tensors that have no numbers.

Whole numbers and truth values are real (tokens, positions, masks, indices), for code reads them to decide what to
compute: sequences of a row, blocks of attention, supervised places. All other numbers are torch's fake tensors, which
have shapes, dtypes and storages, and take no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from manylora.ops.repeated import counting

UNWRITTEN = {"aten::empty", "aten::empty_strided", "aten::empty_permuted"}
"""Made without numbers: what fills them later is what counts, so they may be fake whatever their dtype."""
MASKED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
"""Selections by masks: how much they give depends on the mask, which is real."""


PACKING = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
PACKED_DTYPES = (torch.bfloat16, torch.float16)
"""Products before which oneDNN may copy the second matrix in an order of its own. Measured on 2026-11-21: behind a head
of 144 MiB, generating holds 144 MiB more than all its tensors."""


@dataclass(slots=True, eq=False)
class Block:
    """A storage: its bytes, what it is for, and when it came and went, in events counted from 0 (None: it stayed)."""

    num_bytes: int
    category: str
    born: int
    died: int | None = None
    op: str = ""


@dataclass(slots=True)
class Work:
    """What a part of a computation does: floating-point operations of its products, and bytes that the rest moves."""

    flops: float = 0.0
    moved_bytes: float = 0.0
    num_ops: int = 0


class Trace(TorchDispatchMode):
    """While it is entered, floating-point tensors that are made are fake, and every storage made is recorded.

    `category` is what is written to new storages; `blocks` are all of them in the order in which they were made.
    With `packs`, the copies that oneDNN makes of matrices count too. `products` are the operations of products by the
    shapes of what they are given, each once.
    """

    now: ClassVar[Trace | None] = None
    """The one that is running."""

    def __init__(self, *, packs: bool = False) -> None:
        super().__init__()
        self.packs = packs
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.blocks: list[Block] = []
        self.category = "activations"
        self.phase = ""
        self.work: dict[str, Work] = {}
        self.products: set[tuple[Any, ...]] = set()
        self.events: list[tuple[Block, bool]] = []
        self._known: dict[int, tuple[Any, Block]] = {}
        self._repeats: dict[Any, tuple[int, Work, Any]] = {}

    @contextmanager
    def of(self, category: str) -> Iterator[None]:
        """Within it, what is made is of a category."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def begin(self, phase: str) -> None:
        """From here on, work is that of a phase."""
        self.phase = phase

    def fake_of(self, tensor: Tensor, category: str, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous fake tensor of a tensor's shape and dtype, which counts as made now."""
        with self.fake:
            made = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
        self._made(made, category, "given")
        return made

    def mark(self, tensors: Sequence[Tensor], category: str) -> None:
        """Say of tensors that were made what they turned out to be."""
        for tensor in tensors:
            known = self._known.get(tensor.untyped_storage()._cdata)
            if known is not None:
                known[1].category = category

    def scale_work(self, phase: str, factor: float) -> None:
        """Count the work of a phase so many times."""
        work = self.work[phase]
        work.flops, work.moved_bytes = factor * work.flops, factor * work.moved_bytes

    @contextmanager
    def running(self) -> Iterator[Trace]:
        """Within it operations are recorded; parts that repeat with the same shapes are run once and then counted."""
        before, Trace.now = Trace.now, self
        try:
            with counting(self._repeat), self:
                yield self
        finally:
            Trace.now = before

    def _repeat(self, part: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a part, or count again what it did with the same shapes: its scratch, its work, its results."""
        key = part, _signature((args, kwargs))
        if key not in self._repeats:
            first, before = len(self.events), replace(self.work.setdefault(self.phase, Work()))
            result = part(*args, **kwargs)
            most, _ = self.peak(first)
            now = self.work[self.phase]
            done = Work(*(getattr(now, name) - getattr(before, name) for name in ("flops", "moved_bytes", "num_ops")))
            self._repeats[key] = most, done, tree_map_only(Tensor, _Like.of, result)
            return result
        scratch, work, result = self._repeats[key]
        total = self.work.setdefault(self.phase, Work())
        for name in ("flops", "moved_bytes", "num_ops"):
            setattr(total, name, getattr(total, name) + getattr(work, name))
        with self.fake:
            space = torch.empty(scratch, dtype=torch.uint8, device="cpu")
            made = tree_map_only(_Like, _Like.make, result)
        self._made(space, self.category, part.__name__)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._made(tensor, self.category, part.__name__)
        return made

    def peak(self, begin: int = 0, left_out: Sequence[str] = ()) -> tuple[int, int]:
        """(bytes, event) of the most that was alive at one time of what the events since `begin` made and freed.

        Categories in `left_out` do not count.
        """
        held = peak = 0
        at = begin - 1
        for index, (block, made) in enumerate(self.events[begin:], begin):
            if block.category not in left_out:
                held += block.num_bytes if made else -block.num_bytes
            if held > peak:
                peak, at = held, index
        return peak, at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _is_real(func, given, kwargs):
            made = func(*args, **kwargs)
        else:
            if func in MASKED:
                args = args[0], _by_place(args[1]), *args[2:]
            with self.fake:
                # What autograd made of real numbers: to be converted, its gradient would be asked for.
                args, kwargs = tree_map_only(Tensor, _without_graph, (args, kwargs))
                made = func(*args, **kwargs)
        found = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self._count(func, given, found, args, kwargs, made)
        own = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in found:
            if tensor.untyped_storage()._cdata not in own:
                self._made(tensor, self.category, func._schema.name)
        if self.packs and func in PACKING and given[-1].dtype in PACKED_DTYPES:
            self._passing(given[-1].nbytes, func._schema.name)
        return made

    def _passing(self, num_bytes: int, op: str) -> None:
        """Record a block that a kernel takes and gives back within itself."""
        block = Block(num_bytes, self.category, len(self.events), len(self.events) + 1, op)
        self.blocks.append(block)
        self.events += [(block, True), (block, False)]

    def _made(self, tensor: Tensor, category: str, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        block = Block(storage.nbytes(), category, len(self.events), op=op)
        self.events.append((block, True))
        self.blocks.append(block)
        self._known[key] = (weakref.ref(storage, lambda _, key=key: self._gone(key)), block)

    def _gone(self, key: int) -> None:
        _, block = self._known.pop(key)
        block.died = len(self.events)
        self.events.append((block, False))

    def _count(self, func: Any, given: list[Tensor], found: list[Tensor], args: Any, kwargs: Any, made: Any) -> None:
        work = self.work.setdefault(self.phase, Work())
        packet = func._overloadpacket
        if packet in flop_registry:
            self.products.add((packet, *(tuple(tensor.shape) for tensor in given)))
            work.flops += flop_registry[packet](*args, **kwargs, out_val=made)
            work.num_ops += 1
        elif not func.is_view:
            work.moved_bytes += sum(t.nbytes for t in (*given, *found))
            work.num_ops += 1


def _without_graph(tensor: Tensor) -> Tensor:
    real = not isinstance(tensor, FakeTensor) and tensor.is_floating_point()
    return _Like.of(tensor).make() if real and (tensor.grad_fn is not None or tensor._is_view()) else tensor


def _by_place(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same selection with the places that real masks name, in place of the masks."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            found.append(index)
        else:
            found += index.nonzero().unbind(dim=1)
    return found


@dataclass(frozen=True, slots=True)
class _Like:
    """The layout of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="cpu")


def _signature(values: Any) -> tuple[Any, ...]:
    """What decides a part's work: shapes in place of tensors, everything else as it is."""
    leaves, tree = tree_flatten(values)
    return str(tree), *(_Like.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


def _is_real(func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    if any(isinstance(tensor, FakeTensor) for tensor in given):
        return False
    if given:
        return not any(tensor.is_meta for tensor in given)
    dtype = kwargs.get("dtype")
    whole = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    return (whole or func._schema.name in ("aten::arange",)) and func._schema.name not in UNWRITTEN
