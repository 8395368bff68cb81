"""A part of a model whose inner results are not kept: its backward computes them again, all or all but products.

`recomputed` keeps the inputs alone. With a `Products`, it also keeps what the expensive operations inside gave, and the
second computation takes that in place of doing them again: norms, activations and rotations are cheap, products are
not. Autograd's own graph of the first computation is the one that runs backward; the second one only has to bring back
the tensors that it saved. So an operation in between, whatever it is (a `torch.autograd.Function` that writes in place
among them), has only to be named as one: its inputs are brought back, and what else it saved stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from manylora.forwards import Level, standing_in
from manylora.ops.attention import attention

WEIGHTED = {functional.linear, functional.conv1d, functional.conv2d, functional.conv3d, torch.addmm, torch.mm,
            functional.grouped_mm, functional.scaled_dot_product_attention, attention}  # fmt: skip
"""Functions whose results are kept."""
BATCHED = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
"""Products of two activations: kept where they add up at least as many numbers as a row of the result has."""


def recomputed(
    run: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    products: Products | None = None,
) -> Any:
    """`run(*args, **kwargs)`, of which only the tensors among its arguments are kept, and what `products` keeps.

    `around` opens what must stand around `run`, in the second computation too. Random numbers are drawn the same again.
    """
    leaves, layout = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place] for place in places]
    for place in places:
        leaves[place] = None  # what is kept of them is kept by the checkpoint alone

    def call(*given: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        own_args, own_kwargs = tree_unflatten(filled, layout)
        with around():
            return run(*own_args, **own_kwargs)

    if products is None:
        return checkpoint(call, *tensors, use_reentrant=False)
    keeper = _Keeper(products)
    contexts = partial(_contexts, keeper)
    result = checkpoint(call, *tensors, use_reentrant=False, context_fn=contexts)
    keeper.store()
    return result


def _contexts(keeper: _Keeper) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return _Around(keeper, keeper.record), _Around(keeper, keeper.replay)


@dataclass(slots=True)
class Products:
    """What of a part of a model is an expensive operation: its `modules`, and functions of torch.

    `needed` is how many of its products a second computation has asked for, None before the first: those after them
    are not kept.
    """

    modules: tuple[nn.Module, ...]
    needed: int | None = None


@dataclass(slots=True)
class _Call:
    """A product of the first computation: where its result lies, and whether it wanted a gradient."""

    kept: int | None
    requires_grad: bool
    changed: bool = False


@dataclass(slots=True, eq=False)
class _Keeper:
    """What one run of a part keeps: the results of its products, and what they saved beside their inputs."""

    products: Products
    calls: list[_Call] = field(default_factory=list)
    _held: list[Tensor] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _node: Any = None
    _reached: int = 0

    def begin(self) -> None:
        """The products come from the first one on."""
        self._reached = 0

    def store(self) -> None:
        """Hand what is kept to autograd, as a checkpoint's inputs are: whoever counts or moves those sees these too."""
        for call in self.calls:
            if call.kept is not None and self._held[call.kept]._version != self._versions[call.kept]:
                call.changed = True
        self._node = _Saved.apply(_anchor(), self._held).grad_fn
        self._held = []

    def keep(self, tensor: Tensor) -> int:
        self._held.append(tensor.detach())
        self._versions.append(tensor._version)
        return len(self._held) - 1

    def kept(self, index: int) -> Tensor:
        if not self._held:
            self._held = list(self._node.saved_tensors)
        return self._held[index]

    def record(self, function: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        inputs = _inputs((args, kwargs))
        node = _Saved.apply(_anchor(), inputs).grad_fn
        again = _Inputs(node)
        # Not the inputs themselves: what was saved holds its hooks, and they would hold what is not to be kept.
        where = {_storage(tensor): (place, tensor.storage_offset()) for place, tensor in enumerate(inputs)}
        del inputs

        def pack(tensor: Tensor) -> Any:
            found = where.get(_storage(tensor))
            if found is None:
                return self.keep(tensor)
            return found[0], tensor.size(), tensor.stride(), tensor.storage_offset() - found[1]

        def unpack(packed: Any) -> Tensor:
            return self.kept(packed) if isinstance(packed, int) else again.view(*packed)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            result = function(*args, **kwargs)
        wanted = self.products.needed is None or len(self.calls) < self.products.needed
        self.calls.append(_Call(self.keep(result) if wanted else None, result.requires_grad))
        return result

    def replay(self, function: Callable[..., Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        # This saves what `record` saved, in the same place of the order; the last one ends the second computation.
        _Saved.apply(_anchor(), _inputs((args, kwargs)))
        call = self.calls[self._reached]
        self._reached += 1
        self.products.needed = max(self._reached, self.products.needed or 0)
        if call.kept is None or call.changed:
            with torch.no_grad():
                result = function(*args, **kwargs)
        else:
            result = self.kept(call.kept)
        return _Given.apply(_anchor(), [result]) if call.requires_grad else result


class _Around:
    """Within it, each product of a part is done by `answer(function, args, kwargs)`; it may be opened again."""

    def __init__(self, keeper: _Keeper, answer: Callable[[Callable[..., Tensor], tuple, dict[str, Any]], Tensor]):
        self.keeper = keeper
        self.answer = answer
        self.inside = False
        self.opened: list[ExitStack] = []

    def __enter__(self) -> None:
        self.keeper.begin()
        with ExitStack() as stack:
            for module in self.keeper.products.modules:
                stack.enter_context(_forward_of(module, self.once))
            stack.enter_context(_Functions(self.once))
            self.opened.append(stack.pop_all())

    def __exit__(self, *exception: object) -> None:
        self.opened.pop().close()

    def once(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """A product that is no part of another."""
        if self.inside:
            return function(*args, **kwargs)
        self.inside = True
        try:
            return self.answer(function, args, kwargs)
        finally:
            self.inside = False


class _Saved(torch.autograd.Function):
    """A node that saves tensors and does nothing else."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensors: list[Tensor]) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


class _Given(torch.autograd.Function):
    """A result that is known, as one that wants a gradient and may be written to."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, known: list[Tensor]) -> Tensor:
        return known[0].detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(slots=True)
class _Inputs:
    """The inputs of a product, brought back once for all that it saved of them."""

    node: Any
    tensors: tuple[Tensor, ...] | None = None

    def view(self, place: int, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        tensors = self.node.saved_tensors if self.tensors is None else self.tensors
        self.tensors, own = tensors, tensors[place]
        return own.as_strided(size, stride, own.storage_offset() + offset)


def _anchor() -> Tensor:
    return torch.zeros((), requires_grad=True)


def _inputs(given: Any) -> list[Tensor]:
    """The activations among the arguments of a product, each storage once; parameters stay where they are."""
    found: dict[int, Tensor] = {}
    for leaf in tree_leaves(given):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter) and leaf.is_floating_point():
            found.setdefault(_storage(leaf), leaf.detach())
    return list(found.values())


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor lies in; one without numbers has no address, so it is not that."""
    return tensor.untyped_storage()._cdata


class _Functions(TorchFunctionMode):
    """Sends calls of torch's products to `once`, and all others on."""

    def __init__(self, once: Callable[..., Tensor]):
        super().__init__()
        self.once = once

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        chosen = func in WEIGHTED or (func in BATCHED and _adds_up(*args, **kwargs))
        # Without a gradient it is a step inside of an autograd.Function, whose own result is what others see.
        if chosen and torch.is_grad_enabled():
            return self.once(func, *args, **kwargs)
        return func(*args, **kwargs)


def _adds_up(left: Tensor, right: Tensor, **_: Any) -> bool:
    return right.dim() > 1 and left.shape[-1] >= right.shape[-1]


@contextmanager
def _forward_of(module: nn.Module, once: Callable[..., Tensor]) -> Iterator[None]:
    """A module whose forward is called through `once`."""
    with standing_in(module, lambda *args, **kwargs: once(entry.beneath, *args, **kwargs), Level.PRODUCT) as entry:
        yield
