"""Where the weights before merging come from: the base's own files, one tensor at a time, or the model in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from manylora.base.fingerprint import named_weight_files
from manylora.base.frozen import FrozenModel
from manylora.base.packing.stored import stored_format
from manylora.base.tensors import TensorFiles
from manylora.gathering import gathered
from manylora.types import Site


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the base: its key on disk, and the site and parameter that it is (None, "": no site's)."""

    key: str
    dtype: torch.dtype
    site: str | None = None
    parameter: str = ""


class Source(Protocol):
    """The base's tensors, each read when it is asked for."""

    places: tuple[Place, ...]
    main_dtype: torch.dtype
    note: str | None

    def read(self, place: Place) -> Tensor: ...

    def key_of(self, name: str) -> str:
        """The key under which a parameter of the model is written."""
        ...


class FolderSource:
    """The safetensors of a model folder: the weights as they were published, whatever dtype they were loaded in."""

    note: str | None = None

    def __init__(self, base: FrozenModel, folder: Path):
        self._files = TensorFiles(named_weight_files(folder))
        sizes: Counter[torch.dtype] = Counter()
        for key in self._files:
            if self._files.dtype(key).is_floating_point:
                sizes[self._files.dtype(key)] += self._files.num_bytes(key)
        self.main_dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
        self._prefix = getattr(base.model, "base_model_prefix", "")
        owners = {found: name for name in _parameters(base) if (found := self._find(name)) is not None}
        self.places = tuple(_place(key, self._files.dtype(key), owners.get(key)) for key in self._files)

    def _find(self, name: str) -> str | None:
        """The key of a model's parameter; a checkpoint may leave the backbone's prefix out, or have it beside none."""
        tried = (name, name.removeprefix(self._prefix + "."), f"{self._prefix}.{name}")
        return next((key for key in tried if key in self._files), None)

    def key_of(self, name: str) -> str:
        return self._find(name) or name

    def read(self, place: Place) -> Tensor:
        return self._files.read(place.key)


class MemorySource:
    """The model's own tensors, in the dtype that they were loaded in."""

    def __init__(self, base: FrozenModel, why: str):
        self.note: str | None = f"the weights before merging are those in memory ({base.dtype}): {why}"
        self._state = _named_tensors(base)
        self.main_dtype = base.dtype
        owned = set(_parameters(base))
        self.places = tuple(
            _place(key, base.dtype if isinstance(value, Site) else value.dtype, key if key in owned else None)
            for key, value in self._state.items()
        )

    def key_of(self, name: str) -> str:
        return name

    def read(self, place: Place) -> Tensor:
        value = self._state[place.key]
        return (value.parameters()["weight"] if isinstance(value, Site) else value).detach().cpu()


def source_of(base: FrozenModel, sites: Sequence[str]) -> Source:
    """The base's files where they hold every parameter of `sites` as the model has it, else the model in memory."""
    folder = getattr(base, "folder", None)
    if folder is None:
        return MemorySource(base, "this base was not read from a folder")
    if stored_format(folder) is not None:
        return MemorySource(base, "its folder holds packed weights, so these are all there is")
    source = FolderSource(base, folder)
    found = {(place.site, place.parameter): place for place in source.places}
    for name in sites:
        site = base.sites[name]
        for parameter, shape in site.shapes().items():
            place = found.get((site.tied_to or name, parameter)) or found.get((name, parameter))
            if place is None:
                return MemorySource(base, f"its files hold no tensor that is {name}.{parameter} as it is")
            value = source.read(place)
            # A packed weight is another number than its file's, and only the shape can be compared.
            own = None if parameter == "weight" and site.packed is not None else site.module.get_parameter(parameter)
            with gathered(site.module):
                same = own is None or torch.equal(value.to(own.dtype), own.detach().cpu())
            if tuple(value.shape) != shape or not same:
                return MemorySource(base, f"{place.key!r} in its files is not {name}.{parameter} as it was loaded")
    return source


def _place(key: str, dtype: torch.dtype, name: str | None) -> Place:
    if name is None:
        return Place(key, dtype)
    site, _, parameter = name.rpartition(".")
    return Place(key, dtype, site, parameter)


def _parameters(base: FrozenModel) -> Iterator[str]:
    """The names of all parameters that a site owns; those of tied weights by their first owner."""
    seen: set[int] = set()
    for site in base.sites.values():
        for parameter in site.shapes():
            value = site.module._parameters.get(parameter)
            if value is None or id(value) not in seen:  # None: packed, so nobody else's
                seen.add(id(value))
                yield f"{site.name}.{parameter}" if site.name else parameter


def _named_tensors(base: FrozenModel) -> dict[str, Tensor | Site]:
    """The model's state by name, a tensor that has several names under its first; a site where its weight is packed."""
    state: dict[str, Tensor | Site] = {}
    seen: set[tuple[int, int]] = set()
    packed = {f"{site.name}.weight": site for site in base.sites.values() if site.packed is not None}
    for key, value in base.model.state_dict().items():
        owner = key.rpartition(".")[0]
        if owner in packed:
            state[owner] = packed[owner]
            continue
        mark = (value.data_ptr(), value.numel())
        if value.numel() and mark in seen:
            continue
        seen.add(mark)
        state[key] = value
    return state
