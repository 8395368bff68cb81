"""The weights that a packed base was made from, read again from their own files, one at a time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from manylora.base.fingerprint import folder_fingerprint, named_weight_files
from manylora.base.frozen import FrozenModel
from manylora.base.load import find_base
from manylora.base.packing.stored import METHOD, stored_format
from manylora.base.tensors import TensorFiles
from manylora.errors import BaseBroken, BaseMismatch, BaseNotFound
from manylora.types import Site


class Originals:
    """The weights of a base as they were before it was packed; no file is opened before the first is asked for."""

    def __init__(self, base: FrozenModel):
        self._base = base
        self._files: TensorFiles | None = None

    def weight(self, site: Site) -> Tensor:
        """(out, in) in the dtype of the file; the weight in use where the site is not packed.

        Raises:
            BaseNotFound: the original files are not at hand. BaseMismatch: those found are of another base.
            BaseBroken: they do not hold this weight as one tensor.
        """
        if site.packed is None:
            return site.weight()
        if self._files is None:
            self._files = TensorFiles(named_weight_files(self._folder()))
        name, prefix = f"{site.name}.weight", f"{getattr(self._base.model, 'base_model_prefix', '')}."
        tried = (name, name.removeprefix(prefix), prefix + name)
        found = next((key for key in tried if key in self._files), None)
        if found is None:
            raise BaseBroken(
                f"the original weights of {self._base.name} have no tensor {name!r}: it is stored otherwise",
                next_step="choose another adapter.init; this one needs the weight before packing",
            )
        weight = self._files.read(found)
        weight = site.kind.as_map(weight)
        if tuple(weight.shape) != site.out_in:
            raise BaseBroken(f"{found!r} of the original weights is {tuple(weight.shape)}", allowed=str(site.out_in))
        return weight

    def _folder(self) -> Path:
        base = self._base
        folder = getattr(base, "folder", None)
        if folder is None:
            raise _absent(f"{base.name or 'this base'} was not read from a folder", BaseNotFound)
        stored = stored_format(folder)
        if stored is None:
            return folder
        if stored.maker != METHOD:
            raise _absent(f"{folder} was packed by {stored.maker}, and does not say from what", BaseNotFound)
        said = stored.block.get("original", {})
        try:
            original = find_base(str(said.get("name") or ""))
        except BaseNotFound as error:
            raise _absent(f"{folder} was packed from {said.get('name')!r}, which is not there", BaseNotFound) from error
        if stored_format(original) is not None or folder_fingerprint(original) != said.get("fingerprint"):
            raise _absent(f"{original} is not what {folder} was packed from", BaseMismatch)
        return original


def _absent(what: str, kind: type[BaseNotFound] | type[BaseMismatch]) -> BaseNotFound | BaseMismatch:
    return kind(
        f"the weights before packing are needed, and {what}",
        next_step="set base to the original folder and quantize to the format, or choose another adapter.init",
    )
