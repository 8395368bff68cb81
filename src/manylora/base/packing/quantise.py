"""A model whose linear weights are packed as they are read: one dense weight exists at a time.

What is packed: the weight of every linear and Conv1D site but the output head, from the numbers of the checkpoint, not
from what a cast made of them. Norms, biases, embeddings and the head stay dense, in the base's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.fingerprint import named_weight_files
from manylora.base.packing.bitsandbytes import stored_weights
from manylora.base.packing.linear import pack_module, packable, put_module
from manylora.base.packing.stored import METHOD, Stored
from manylora.base.sites import find_sites
from manylora.base.skeleton import NotOneToOne, Skeleton
from manylora.base.tensors import TensorFiles, give_back_memory
from manylora.errors import BaseBroken
from manylora.types import Packed, Site, dense_parameters

GIVE_BACK_BYTES = 1 << 20
"""Above it a weight's scratch memory is worth the milliseconds that it takes to give it back."""

Pack = Callable[[str, Tensor], Packed]
"""From a site's name and its weight (O, I) to the packed weight."""


@dataclass(slots=True)
class PackReport:
    """What was packed and what was not: bytes of the packed sites' weights before and after, in words for the log."""

    format: str
    num_sites: int = 0
    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    left_dense: dict[str, str] = field(default_factory=dict)
    """Linear sites that were left as they are, and why."""
    dense_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of all that is dense, by type of module."""
    whole: str | None = None
    """Why the dense model was loaded whole before it was packed; None: it was packed as it was read."""

    def count(self, packed: Packed, before: int) -> None:
        rows, columns = packed.shape
        self.num_sites += 1
        self.num_weights += rows * columns
        self.bytes_before += before
        self.bytes_after += packed.nbytes()

    def count_dense(self, model: nn.Module) -> None:
        """Add up what has stayed dense: experts in one tensor are no linear site, and may be most of a model."""
        seen: set[int] = set()
        for module in model.modules():
            for parameter in dense_parameters(module).values():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    kind = type(module).__name__
                    self.dense_bytes[kind] = self.dense_bytes.get(kind, 0) + parameter.nbytes

    def notes(self, device: torch.device) -> list[str]:
        """What was done, and by what the weights are unpacked, in lines for the log."""
        from manylora.quant import backend

        bits = 8 * self.bytes_after / max(1, self.num_weights)
        packed = (
            f"packed as {self.format}: {self.num_sites} linear weights, from {self.bytes_before:,} to "
            f"{self.bytes_after:,} bytes in memory ({bits:.3f} bits a weight)"
        )
        lines = [packed]
        if self.format in ("nf4", "fp4"):
            lines.append("packed weights are unpacked by {}: {}".format(*backend(device)))
        if self.dense_bytes:
            kinds = sorted(self.dense_bytes.items(), key=lambda pair: -pair[1])
            listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds)
            lines.append(f"not packed: {sum(self.dense_bytes.values()):,} bytes ({listed})")
        if self.left_dense:
            lines.append(
                "linear sites left dense: " + ", ".join(f"{name} ({why})" for name, why in self.left_dense.items())
            )
        if self.whole:
            lines.append(f"the dense model was loaded whole before it was packed: {self.whole}")
        return lines


def packer(name: str, options: Mapping[str, Any] | None = None) -> Pack:
    """What packs one site's weight; a weight that the format cannot hold is an error that names the site."""
    from manylora.quant import PACKINGS, PackError

    made = PACKINGS.get(name)

    def pack(site: str, weight: Tensor) -> Packed:
        try:
            return made.pack(weight, **(options or {}))
        except PackError as error:
            raise PackError(f"{site!r}: {error.what}", allowed=error.allowed, next_step=error.next_step) from error

    return pack


def choose_sites(model: Any, in_float32: Callable[[str], bool]) -> tuple[list[Site], dict[str, str]]:
    """The sites whose weight is packed, and the linear ones that are not, each with the reason."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    sites = find_sites(model, head)
    owners = {site.tied_to for site in sites.values()}
    chosen: list[Site] = []
    left: dict[str, str] = {}
    for site in sites.values():
        if not site.kind.product:
            continue
        if site.is_head:
            left[site.name] = "the head"
        elif site.tied_to or site.name in owners:
            left[site.name] = "its weight is shared"
        elif not packable(site.module):
            left[site.name] = f"a {type(site.module).__name__} may read its weight in ways of its own"
        elif in_float32(f"{site.name}.weight"):
            left[site.name] = "kept in float32 by its class"
        else:
            chosen.append(site)
    return chosen, left


def load_packing(
    folder: Path, auto: str, pack: Pack, report: PackReport, *, dtype: torch.dtype | None, device: torch.device,
    trust_remote_code: bool, load_whole: Callable[[torch.dtype | None], nn.Module],
) -> nn.Module:  # fmt: skip
    """The model of a folder of dense weights, packed as they are read.

    `dtype` None keeps what is not packed in the dtype of the files. `load_whole` is the ordinary load (None: in the
    dtype of the files): it is used where the model's tensors are not the files' one by one, and `report` says so.
    """
    skeleton: Skeleton | None = None
    try:
        skeleton = Skeleton(folder, auto, dtype, trust_remote_code)
        files = TensorFiles(named_weight_files(folder))
        targets = _targets(list(files), files, skeleton)
    except NotOneToOne as error:
        report.whole = str(error)
        return _pack_whole(load_whole, skeleton, pack, report, dtype, device)
    sites, report.left_dense = choose_sites(skeleton.model, skeleton.in_float32)
    of_weight = {f"{site.name}.weight": site for site in sites}
    for name, target in targets.items():
        site = of_weight.get(target)
        if site is None:
            skeleton.put(target, files.read(name), device)
        else:
            _pack_site(skeleton.model, site, files.read(name).to(device), pack, report, dtype)
    report.count_dense(skeleton.model)
    return skeleton.model


def load_stored(
    folder: Path, stored: Stored, auto: str, report: PackReport, *, dtype: torch.dtype, device: torch.device,
    trust_remote_code: bool,
) -> nn.Module:  # fmt: skip
    """The model of a folder whose linear weights are packed already, taken as they are.

    Raises:
        BaseBroken: tensors are absent, or do not belong to the model that the configuration describes.
    """
    files = TensorFiles(named_weight_files(folder))
    try:
        skeleton = Skeleton(folder, auto, dtype, trust_remote_code)
        found = _own_weights(files, stored) if stored.maker == METHOD else stored_weights(files)
        rename = (lambda name: name) if stored.maker == METHOD else skeleton.renamer()
        packed_names = {full for weight in found.values() for full in weight.names}
        weights = {rename(name): weight for name, weight in found.items()}
        targets = _targets([name for name in files if name not in packed_names], files, skeleton, set(weights))
    except NotOneToOne as error:
        raise BaseBroken(f"{folder} cannot be read as it is packed: {error}") from error
    sites, report.left_dense = choose_sites(skeleton.model, skeleton.in_float32)
    of_weight = {f"{site.name}.weight": site for site in sites}
    for target, weight in weights.items():
        packed, site = weight.read().to(device), of_weight.pop(target, None)
        rows_columns = packed.shape[::-1] if site is not None and site.kind.transposed else packed.shape
        if target not in skeleton or tuple(rows_columns) != skeleton.shape(target):
            raise BaseBroken(f"{target!r} is packed with the shape {packed.shape}, which this model has not")
        if site is None:
            skeleton.put(target, packed.dense(dtype), device)
        else:
            report.count(packed, packed.shape[0] * packed.shape[1] * dtype.itemsize)
            put_module(skeleton.model, site.name, pack_module(site.module, packed, dtype))
    for name, target in targets.items():
        skeleton.put(target, files.read(name), device)
    report.left_dense |= {target.removesuffix(".weight"): "dense in the folder" for target in of_weight}
    report.count_dense(skeleton.model)
    return skeleton.model


@dataclass(frozen=True, slots=True)
class _OwnWeight:
    """A packed weight in a folder that was written here."""

    files: TensorFiles
    parts: Mapping[str, str]
    format: str
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return list(self.parts.values())

    def read(self) -> Packed:
        from manylora.quant import PACKINGS

        tensors = {short: self.files.read(full) for short, full in self.parts.items()}
        return PACKINGS.get(self.format).from_tensors(tensors, self.settings)


def _own_weights(files: TensorFiles, stored: Stored) -> dict[str, _OwnWeight]:
    found: dict[str, _OwnWeight] = {}
    parts: dict[str, dict[str, str]] = {}
    for full in files:
        weight, _, short = full.rpartition(".")
        parts.setdefault(weight, {})[short] = full
    for site, settings in stored.block["sites"].items():
        name = f"{site}.weight"
        if name not in parts:
            raise NotOneToOne(f"the tensors of {site!r} are not there")
        found[name] = _OwnWeight(files, parts[name], str(stored.format), settings)
    return found


def _targets(
    names: Sequence[str], files: TensorFiles, skeleton: Skeleton, filled: Collection[str] = ()
) -> dict[str, str]:
    """The model's tensor for each of the files'; those that the model does not know are left out, as transformers does.

    `filled` are tensors of the model that come from elsewhere.

    Raises:
        NotOneToOne: a tensor is made of several, is stored under two names, is absent, or has another shape.
    """
    rename = skeleton.renamer()
    targets: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        target = rename(name)
        if target not in skeleton:
            continue
        for alias in skeleton.aliases(target):
            if alias in taken:
                raise NotOneToOne(f"{name!r} and {taken[alias]!r} are one tensor of the model")
            taken[alias] = name
        if files.shape(name) != skeleton.shape(target):
            raise NotOneToOne(f"{name!r} has the shape {files.shape(name)}, the model's is {skeleton.shape(target)}")
        targets[name] = target
    missing = skeleton.missing({*targets.values(), *filled})
    if missing:
        raise NotOneToOne(f"{missing[0]!r} is not in the files under this name")
    return targets


def _pack_site(
    model: nn.Module, site: Site, weight: Tensor, pack: Pack, report: PackReport, dtype: torch.dtype | None
) -> None:
    """Put a packed layer in a site's place; `dtype` None: it computes in the weight's own."""
    before = weight.numel() * weight.element_size()
    packed = pack(site.name, site.kind.as_map(weight).contiguous())
    report.count(packed, before)
    put_module(model, site.name, pack_module(site.module, packed, dtype or weight.dtype))
    if before >= GIVE_BACK_BYTES and weight.device.type == "cpu":
        give_back_memory()


def _pack_whole(
    load_whole: Callable[[torch.dtype | None], nn.Module], skeleton: Skeleton | None, pack: Pack, report: PackReport,
    dtype: torch.dtype | None, device: torch.device,
) -> nn.Module:  # fmt: skip
    """Pack a loaded model's weights one by one, each dense one freed as soon as it is packed, and cast the rest.

    Without a skeleton nothing says which of the rest is cast, so the load casts all, and the cast weights are packed.
    """
    model = load_whole(None if skeleton is not None else dtype)
    in_float32 = skeleton.in_float32 if skeleton is not None else lambda name: False
    sites, report.left_dense = choose_sites(model, in_float32)
    for site in sites:
        weight = site.module.get_parameter("weight").detach()
        site.module._parameters["weight"] = None
        _pack_site(model, site, weight.to(device), pack, report, dtype)
        del weight
    if skeleton is not None and dtype is not None:
        skeleton.cast(model)
    report.count_dense(model)
    return model.to(device)
