"""A model whose parameters are there only while they are needed: what spreading them over devices does, on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from manylora.gathering import place_gatherer


class Emptied:
    """The parameters of a model, each of which has room only while somebody asks for it."""

    def __init__(self, model: nn.Module):
        self.opened: Counter[str] = Counter()
        self._users: Counter[int] = Counter()
        self._kept: dict[int, Tensor] = {}
        self.owners = {name: module for name, module in model.named_modules() if _own(module)}
        for module in self.owners.values():
            for parameter in _own(module):
                if id(parameter) not in self._kept:
                    self._kept[id(parameter)] = parameter.detach().clone()
                    parameter.data = parameter.detach().clone()  # a storage of its own, which can be emptied

    def fill(self, module: nn.Module) -> None:
        for parameter in _own(module):
            if not self._users[id(parameter)]:
                storage = parameter.untyped_storage()
                assert storage.size() == 0
                storage.resize_(parameter.nbytes)
                parameter.data.copy_(self._kept[id(parameter)])
            self._users[id(parameter)] += 1

    def empty(self, module: nn.Module) -> None:
        for parameter in _own(module):
            self._users[id(parameter)] -= 1
            assert self._users[id(parameter)] >= 0
            if not self._users[id(parameter)]:
                parameter.untyped_storage().resize_(0)

    @contextmanager
    def gathering(self, name: str) -> Iterator[None]:
        module = self.owners[name]
        self.opened[name] += 1
        self.fill(module)
        try:
            yield
        finally:
            self.empty(module)

    def present(self) -> list[str]:
        """The modules whose parameters have room now."""
        return [name for name, module in self.owners.items() if any(p.untyped_storage().size() for p in _own(module))]


@contextmanager
def emptied(model: nn.Module) -> Iterator[Emptied]:
    """While it is open, a module's parameters have room while its own forward runs or it is gathered, and no longer."""
    state = Emptied(model)
    with ExitStack() as stack:
        for name, module in state.owners.items():
            before = module.register_forward_pre_hook(lambda module, args: state.fill(module))
            after = module.register_forward_hook(lambda module, args, made: state.empty(module), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
            place_gatherer(module, lambda name=name: state.gathering(name))
            stack.callback(place_gatherer, module, None)
        for module in state.owners.values():
            for parameter in _own(module):
                parameter.untyped_storage().resize_(0)
        try:
            yield state
        finally:
            for module in state.owners.values():
                state.fill(module)


def _own(module: nn.Module) -> list[Any]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]
