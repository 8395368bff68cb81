"""The repeated layers of a model: the stacks of like modules that hold most of its sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

LEAST_SHARE = 0.5
"""Of the sites, what the layers must hold between them to be called the model's layers."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One of the repeated layers, in the order of the model, and the names of the sites inside it."""

    name: str
    module: nn.Module
    sites: tuple[str, ...]


def repeated_layers(model: nn.Module, sites: Iterable[str]) -> list[Layer]:
    """The layers whose inputs are worth keeping in place of all that is inside them; [] where no such stack is found.

    A layer stands in an `nn.ModuleList` or `nn.Sequential`, holds a site strictly inside it, and has a neighbour of the
    same class there that does too. Where stacks lie inside each other (stages of blocks, layers of experts), those are
    taken that leave least: an input for each layer, the sites outside of all layers, and the largest layer while it is
    computed again, each counted as one.
    """
    names = tuple(sites)
    found = _layers_in("", model, names)
    held = sum(len(layer.sites) for layer in found)
    return found if held >= LEAST_SHARE * len(names) else []


def _layers_in(name: str, module: nn.Module, names: tuple[str, ...]) -> list[Layer]:
    """The layers below a module, whose sites are `names`."""
    own = _stack(name, module, names)
    inner: list[Layer] = []
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        below = _below(path, names)
        if below:
            inner += _layers_in(path, child, below)
    if not own or not inner:
        return own or inner
    return own if _left(own, names) <= _left(inner, names) else inner


def _stack(name: str, module: nn.Module, names: tuple[str, ...]) -> list[Layer]:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    paths = {child: f"{name}.{child}" if name else child for child, _ in module.named_children()}
    layers = [Layer(paths[child], part, _below(paths[child], names)) for child, part in module.named_children()]
    held = [layer for layer in layers if layer.sites]
    counts = {kind: sum(type(layer.module) is kind for layer in held) for kind in {type(one.module) for one in held}}
    return [layer for layer in held if counts[type(layer.module)] > 1]


def _left(layers: list[Layer], names: tuple[str, ...]) -> int:
    sizes = [len(layer.sites) for layer in layers]
    return len(layers) + max(sizes) + len(names) - sum(sizes)


def _below(name: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The sites strictly inside a module."""
    return tuple(site for site in names if site.startswith(name + "."))
