"""The one gate through which the frozen weights of a base are read.

A module's parameters may be away (spread over devices, say) but while its own forward runs. Whoever takes them away
places a gatherer on the module; whoever reads them elsewhere does so within `gathered`, and keeps none of them between
a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Gatherer = Callable[[], AbstractContextManager[Any]]
"""Opens what brings a module's parameters for as long as it is open; it may be open already when it is called."""
GATHERER = "_manylora_gatherer"
"""Where a module's own dictionary holds its gatherer, so that the two go together."""

_AT_HAND: AbstractContextManager[Any] = nullcontext()


def place_gatherer(module: nn.Module, gatherer: Gatherer | None) -> None:
    """Have `gathered` open this for a module; None: its parameters are always at hand."""
    if gatherer is None:
        module.__dict__.pop(GATHERER, None)
    else:
        module.__dict__[GATHERER] = gatherer


def is_gathered(module: nn.Module) -> bool:
    """Whether somebody brings the module's own parameters when they are needed, and takes them away again."""
    return GATHERER in module.__dict__


def gathered(module: nn.Module) -> AbstractContextManager[Any]:
    """While it is open, the module's own parameters hold their numbers; it may be opened again meanwhile.

    A parameter must be asked of the module within: it may be another object each time.
    """
    gatherer: Gatherer | None = module.__dict__.get(GATHERER)
    return _AT_HAND if gatherer is None else gatherer()


@contextmanager
def gathered_again(module: nn.Module) -> Iterator[None]:
    """`gathered`, in which a graph that is made keeps no parameter of the module: its backward gathers them anew.

    What else the graph keeps goes to the hooks that were there before, as if these were not.
    """
    with gathered(module):
        if not torch.is_grad_enabled():
            yield
            return
        before = _hooks_now()
        own = {_storage(parameter): name for name, parameter in module._parameters.items() if parameter is not None}

        def pack(tensor: Tensor) -> Any:
            name = own.get(_storage(tensor))
            if name is not None:
                return _Kept.of(module, name, tensor)
            return tensor if before is None else before[0](tensor)

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, _Kept):
                return kept.read()
            return kept if before is None else before[1](kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


@dataclass(frozen=True, slots=True)
class _Kept:
    """What a graph keeps in place of a module's parameter, or of a view of one: where it is read again."""

    module: nn.Module
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any

    @classmethod
    def of(cls, module: nn.Module, name: str, tensor: Tensor) -> _Kept:
        offset = tensor.storage_offset() - module.get_parameter(name).storage_offset()
        return cls(module, name, tensor.size(), tensor.stride(), offset)

    def read(self) -> Tensor:
        """A copy, since what is given outlives the gate."""
        with gathered(self.module):
            parameter = self.module.get_parameter(self.name).detach()
            place = parameter.storage_offset() + self.offset
            return parameter.as_strided(self.size, self.stride, place).clone()


def _hooks_now() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """Who packs what a graph keeps at present, and unpacks it again: a part that is computed again in backward, say."""
    autograd: Any = getattr(torch._C, "_autograd")  # noqa: B009 - no part of torch's stubs
    return autograd._top_saved_tensors_default_hooks(False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
