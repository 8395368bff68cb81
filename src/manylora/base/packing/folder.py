"""A folder that holds a base with its linear weights packed, and loads without the original.

`config.json` is the original's with a block that says the format, what each packed weight needs beside its tensors, and
the name and fingerprint of the original. A packed weight `X` is the tensors `X.codes` and those of its scales.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.auto import auto_class_of
from manylora.base.fingerprint import content_digest, folder_fingerprint, read_header, weight_files
from manylora.base.load import base_name, check_quantize, find_base, load_dense, reading
from manylora.base.packing.linear import PackedLinear
from manylora.base.packing.quantise import Pack, PackReport, load_packing, packer
from manylora.base.packing.stored import METHOD, VERSION
from manylora.errors import ConfigError
from manylora.files import refuse_occupied, write_folder_atomic
from manylora.types import Packed

FILE_BYTES = 1 << 31
"""A file is closed once it holds so much."""
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*")
TEMPLATES = "additional_chat_templates"


@dataclass(slots=True)
class Loss:
    """What packing the sites of one kind (the last part of their names) cost; the error is over all their weights."""

    num_sites: int = 0
    num_weights: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    squared_error: float = 0.0
    squared_weight: float = 0.0

    @property
    def relative_error(self) -> float:
        """|dense - original| / |original|, Frobenius."""
        return (self.squared_error / self.squared_weight) ** 0.5 if self.squared_weight else 0.0

    @property
    def bits(self) -> float:
        return 8 * self.bytes_after / self.num_weights

    def add(self, weight: Tensor, packed: Packed) -> None:
        """Count one weight and measure it against what its codes stand for."""
        dense = packed.dense(torch.float32)
        for rows in range(0, len(dense), 256):
            original = weight[rows : rows + 256].double()
            self.squared_error += float((dense[rows : rows + 256].double() - original).square().sum())
            self.squared_weight += float(original.square().sum())
        self.num_sites += 1
        self.num_weights += weight.numel()
        self.bytes_before += weight.numel() * weight.element_size()
        self.bytes_after += sum(tensor.nbytes for tensor in packed.tensors().values())


@dataclass(slots=True)
class Written:
    """A packed folder: what it cost by kind of site, and the bytes of all tensors before and after."""

    folder: Path
    format: str
    fingerprint: str
    notes: list[str]
    losses: dict[str, Loss] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def total(self) -> Loss:
        whole = Loss()
        for loss in self.losses.values():
            for key in Loss.__slots__:
                setattr(whole, key, getattr(whole, key) + getattr(loss, key))
        return whole


def quantise_folder(
    name: str, output: str | Path, format_name: str, options: Mapping[str, Any] | None = None, *,
    fit: Pack | None = None, device: torch.device | None = None, trust_remote_code: bool = False,
) -> Written:  # fmt: skip
    """Write a base with its linear weights packed; what is not packed keeps the dtype of its file.

    `fit` packs a weight itself, to fit an adapter that starts on it (LoftQ): the folder is then a base of its own, with
    a fingerprint of its own.

    Raises:
        OutputExists: `output` holds something. ConfigError: the base is packed already.
        DiskFull: nothing is left behind.
    """
    output = Path(output)
    refuse_occupied(output)
    folder = find_base(name)
    for path in weight_files(folder):
        read_header(path)
    if check_quantize(name, folder, format_name) is not None:
        raise ConfigError(f"{name} is packed already, as {format_name}", next_step="use it as it is")
    fingerprint = folder_fingerprint(folder)
    written = Written(output, format_name, fingerprint, [])
    pack_one, report = fit or packer(format_name, options), PackReport(format_name)

    def pack(site: str, weight: Tensor) -> Packed:
        packed = pack_one(site, weight)
        written.losses.setdefault(site.rpartition(".")[2], Loss()).add(weight, packed)
        return packed

    auto = auto_class_of(folder)
    device = device or torch.device("cpu")
    with reading(folder):
        model = load_packing(
            folder, auto, pack, report, dtype=None, device=device, trust_remote_code=trust_remote_code,
            load_whole=lambda dtype: load_dense(folder, auto, dtype, trust_remote_code),
        )  # fmt: skip
    written.notes = report.notes(device)
    original = {"name": base_name(name), "fingerprint": fingerprint}
    with write_folder_atomic(output) as new:
        written.bytes_after = _write_tensors(model, new)
        copy_rest(folder, new)
        _write_config(folder, new, model, format_name, original, fitted=fit is not None)
    written.fingerprint = folder_fingerprint(output)
    written.bytes_before = written.bytes_after + written.total.bytes_before - written.total.bytes_after
    return written


def _write_tensors(model: nn.Module, folder: Path) -> int:
    """Write each tensor of the model once, in as few files as FILE_BYTES allows; their bytes."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
        elif isinstance(tensor, nn.Parameter):
            continue  # tied: the model ties it again
        else:
            tensor = tensor.clone()  # a table that all weights of a format share: each is written with its own
        if shards[-1] and _bytes_of(shards[-1]) + tensor.nbytes > FILE_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach()
    for place, shard in enumerate(shards, 1):
        file = "packed.safetensors" if len(shards) == 1 else f"packed-{place:05d}-of-{len(shards):05d}.safetensors"
        whole = {name: tensor.cpu().contiguous() for name, tensor in shard.items()}
        save_file(whole, folder / file, metadata={"format": "pt"})
    return sum(map(_bytes_of, shards))


def _bytes_of(shard: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in shard.values())


def copy_rest(folder: Path, new: Path) -> None:
    """Copy the tokenizer, chat templates, generation settings, code and licence; what is there already stays.

    No weights, no index of them, no `config.json` and no card: those are of the new folder.
    """
    for path in sorted(path for pattern in COPIED for path in folder.glob(pattern)):
        written_anew = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and not written_anew and not (new / path.name).exists():
            shutil.copyfile(path, new / path.name)
    if (folder / TEMPLATES).is_dir():
        shutil.copytree(folder / TEMPLATES, new / TEMPLATES, dirs_exist_ok=True)


def _write_config(
    folder: Path, new: Path, model: nn.Module, format_name: str, original: Mapping[str, str], *, fitted: bool
) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = {
        name: module.packed_weight.settings()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
    }
    block: dict[str, Any] = {
        "quant_method": METHOD, "version": VERSION, "format": format_name, "original": original, "sites": settings,
        "fitted": fitted,
    }  # fmt: skip
    path = new / "config.json"
    path.write_text(json.dumps({**config, "quantization_config": block}, indent=2) + "\n", encoding="utf-8")
    block["content"] = content_digest(new)
    path.write_text(json.dumps({**config, "quantization_config": block}, indent=2) + "\n", encoding="utf-8")
