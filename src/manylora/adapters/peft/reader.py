"""Reading PEFT's folder, so strictly that nothing is lost in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.compress.file import COMPRESSED_FILE, read_coded
from manylora.adapters.peft.config import (
    ADDED_HEADS,
    CONFIG_FILE,
    PICKLE_FILE,
    PREFIX,
    TENSORS_FILE,
    check_settings,
    master,
    method_of,
    spec_of,
    spelled_out,
    targets_of,
    under_any,
)
from manylora.adapters.receipt import check_scales, read_receipt, samples
from manylora.base.kinds import KINDS
from manylora.errors import AdapterBroken
from manylora.methods import METHODS, WHOLE_COPY
from manylora.types import Factors, SiteKind

if TYPE_CHECKING:
    from collections.abc import Mapping

_BASE_COPY = re.compile(r"(?P<site>.+)\.base_layer\.(?P<parameter>weight|bias)")

_Tensors = dict[str, dict[str, Tensor]]


def load_adapter(folder: Path) -> Adapter:
    """The adapter of a folder that was written here or by PEFT, its sites spelled out and its factors in float32.

    The sites are those that the tensors name. Only safetensors are read; nothing is unpickled. The factors of a
    compressed adapter are what its codes stand for.

    Raises:
        AdapterBroken: a file, tensor or setting that is missing, unexpected, misshapen or cannot be honoured.
    """
    folder = Path(folder)
    config = _read_config(folder)
    check_settings(config, str(folder / CONFIG_FILE))
    path = _tensor_path(folder)
    receipt = read_receipt(folder, path)
    tensors = _read_tensors(path)
    for key in receipt.get("copied", []):
        tensors.pop(key, None)
    low_rank, full, kinds, frozen = _sort_out(tensors, config, path)
    tied = _drop_tied(full, receipt.get("tied", {}), path)
    _check_all_there(low_rank, full | {key_0: {} for key_0 in tied}, config, path)
    sites = tuple(_in_order(low_rank, config.get("target_modules")))
    full_sites = tuple(_in_order({**full, **{key_0: {} for key_0 in tied}}, config.get("modules_to_save")))
    spec = spec_of(config, sites, full_sites, str(folder / CONFIG_FILE))
    factors = {name: Factors(spec.method, low_rank[name]) for name in sites}
    factors |= {name: Factors(WHOLE_COPY, full[name]) for name in full_sites if name in full}
    said = receipt.get("sites", {})
    if config.get("fan_in_fan_out") or any(site.get("kind") == "conv1d" for site in said.values()):
        conv1d = [
            name for name in sites if name not in kinds and said.get(name, {"kind": "conv1d"}).get("kind") == "conv1d"
        ]
        kinds |= dict.fromkeys(conv1d, "conv1d")
    origin = receipt.get("base", {})
    adapter = Adapter(
        spec,
        factors,
        origin.get("name") or config.get("base_model_name_or_path") or "",
        origin.get("fingerprint"),
        receipt=receipt | ({"frozen": frozen} if frozen else {}),
        kinds={name: kinds[name] for name in sites if name in kinds},
        tied=tied,
        record=receipt.get("task", {}),
        task_type=config.get("task_type"),
        targets=targets_of(config),
    )
    _check_ranks(adapter, path)
    check_scales(receipt, adapter, str(folder / CONFIG_FILE))
    return adapter


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        inner = (
            sorted(child.name for child in folder.glob("*") if (child / CONFIG_FILE).is_file())
            if folder.is_dir()
            else []
        )
        if inner:
            raise AdapterBroken(
                f"{folder} holds adapters in folders of their own",
                allowed=", ".join(inner),
                next_step=f"name one: {folder / inner[0]}",
            )
        what = f"no {CONFIG_FILE} in {folder}" if folder.is_dir() else f"no folder {folder}"
        raise AdapterBroken(what, next_step=f"an adapter is a folder with {CONFIG_FILE} and {TENSORS_FILE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterBroken(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterBroken(f"{path} holds a {type(config).__name__}", allowed="an object of settings")
    return config


def _tensor_path(folder: Path) -> Path:
    path, coded = folder / TENSORS_FILE, folder / COMPRESSED_FILE
    if path.is_file() and coded.is_file():
        raise AdapterBroken(
            f"{folder} holds both {TENSORS_FILE} and {COMPRESSED_FILE}",
            allowed="one of the two",
            next_step="move away the one that is not meant",
        )
    if path.is_file() or coded.is_file():
        return path if path.is_file() else coded
    if (folder / PICKLE_FILE).is_file():
        raise AdapterBroken(
            f"{folder} holds only {PICKLE_FILE}, a pickle, which can run code when it is read",
            allowed=TENSORS_FILE,
            next_step="if you trust it: open it with peft.PeftModel.from_pretrained and save_pretrained it again",
        )
    raise AdapterBroken(f"no {TENSORS_FILE} in {folder}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        stored = read_coded(path) if path.name == COMPRESSED_FILE else load_file(path)
    except AdapterBroken:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterBroken(
            f"{path} is truncated or no safetensors file: {error}", next_step="fetch the folder again"
        ) from error
    if not stored:
        raise AdapterBroken(f"{path} holds no tensors")
    for key, value in stored.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterBroken(f"{key!r} in {path} holds a number that is not finite")
    return {key: master(value) for key, value in stored.items()}


def _sort_out(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], path: Path
) -> tuple[_Tensors, _Tensors, dict[str, str], dict[str, Any]]:
    """The factors by site, the trained copies by site, the kinds that the keys tell, and samples of the base's own."""
    low_rank: _Tensors = {}
    full: _Tensors = {}
    told: dict[str, str] = {}
    frozen: dict[str, Any] = {}
    saved = config.get("modules_to_save") or []
    ends = _ends(method_of(config))
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        factor, copy = _factor_of(name, value, ends), _BASE_COPY.fullmatch(name)
        site, _, parameter = name.rpartition(".")
        if name == key:
            raise _unexpected(key, path)
        if factor is not None:
            owner, tensor, kind = factor
            if kind is None:
                raise AdapterBroken(
                    f"{key!r} in {path} has shape {tuple(value.shape)}", allowed="two dimensions: a linear map"
                )
            low_rank.setdefault(owner, {})[tensor] = value
            if tensor in KINDS.get(kind).stored and told.setdefault(owner, kind) != kind:
                raise AdapterBroken(
                    f"{key!r} in {path} has shape {tuple(value.shape)}, of a {kind}, and its other factor is of a "
                    f"{told[owner]}",
                    allowed="two factors of one kind of map",
                )
        elif copy:
            # PEFT adds the base's own embedding to an adapter that stands on it; the bank compares it.
            frozen[f"{copy['site']}.{copy['parameter']}"] = samples(value)
        elif "lora_" not in name and under_any(site, saved):
            full.setdefault(site, {})[parameter] = value
        else:
            raise _unexpected(key, path)
    lost = [name for name in frozen if name.rpartition(".")[0] not in low_rank]
    if lost:
        raise AdapterBroken(f"{path} brings the base's {lost[0]!r} and no factors for it")
    return low_rank, full, {owner: kind for owner, kind in told.items() if kind != "linear"}, frozen


def _ends(method: str) -> list[tuple[str, str, SiteKind]]:
    """The ends of keys under which a method's tensors are stored, whose tensor each is, at what kind of site."""
    kinds = [KINDS.get(name) for name in KINDS]
    return [(end, tensor, kind) for kind in kinds for tensor, end in METHODS.get(method).stored(kind).items()]


def _factor_of(name: str, value: Tensor, ends: list[tuple[str, str, SiteKind]]) -> tuple[str, str, str | None] | None:
    """Site, tensor and the kind of site that a key and a value's dimensions tell; no kind: none has so many.

    None: no factor of the method. What is not one of the product's two factors tells nothing of the kind.
    """
    found = [(tensor, kind) for end, tensor, kind in ends if name.endswith(f".{end}")]
    if not found:
        return None
    tensor = found[0][0]
    site = next(name.removesuffix(f".{end}") for end, _, _ in ends if name.endswith(f".{end}"))
    if tensor not in found[0][1].stored:
        return site, tensor, "linear"
    return site, tensor, next((kind.name for _, kind in found if kind.stored_dims == value.dim()), None)


def _unexpected(key: str, path: Path) -> AdapterBroken:
    return AdapterBroken(
        f"unexpected tensor {key!r} in {path}",
        allowed=f"{PREFIX}SITE.lora_A.weight, .lora_B.weight, .lora_embedding_A/B, and what modules_to_save names",
        next_step="its adapter has a part that is not computed here, or a vocabulary of another size",
    )


def _drop_tied(full: _Tensors, tied: Mapping[str, str], path: Path) -> dict[str, str]:
    """Take from `full` what repeats its owner's copy; name by owner."""
    for name, owner in tied.items():
        for key, value in full.pop(name, {}).items():
            if owner not in full or not torch.equal(value, full[owner].get(key, torch.empty(0))):
                raise AdapterBroken(f"{name!r} and {owner!r} share one weight, and {path} holds two that differ")
    return dict(tied)


def _check_all_there(low_rank: _Tensors, full: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> None:
    optional = METHODS.get(method_of(config)).optional
    wanted = dict.fromkeys(tensor for _, tensor, _ in _ends(method_of(config)) if tensor not in optional)
    for site, found in low_rank.items():
        for factor in wanted:
            if factor not in found:
                raise AdapterBroken(
                    f"{path} lacks {f'factor {factor.upper()}' if len(factor) == 1 else factor} of {site!r}",
                    next_step="fetch the folder again",
                )
    gone = [name for name in spelled_out(config) if not any(s == name or s.endswith("." + name) for s in low_rank)]
    if gone:
        raise AdapterBroken(f"{path} lacks the factors of {gone[0]!r}, which target_modules names")
    for entry in config.get("modules_to_save") or []:
        if entry not in ADDED_HEADS and not any(under_any(name, [entry]) for name in full):
            raise AdapterBroken(f"{path} lacks the tensors of {entry!r}, which modules_to_save names")
    both = [name for name in low_rank if name in full]
    if both:
        raise AdapterBroken(f"{path} holds factors and a whole copy of {both[0]!r}", allowed="one of the two")


def _check_ranks(adapter: Adapter, path: Path) -> None:
    for name in adapter.spec.sites:
        own = adapter.factors[name]
        a, b = METHODS.get(own.method).product(own)
        rank = adapter.spec.rank_at(name)
        for letter, shape, found in (("A", a.shape, a.shape[0]), ("B", b.shape, b.shape[1])):
            if found != rank:
                raise AdapterBroken(
                    f"factor {letter} of {name!r} in {path} has shape {tuple(shape)}, a rank of {found}",
                    allowed=f"rank {rank}, from r and rank_pattern",
                )


def _in_order(found: Mapping[str, Any], named: object) -> list[str]:
    """The names as the config lists them where it spells them out, the rest in counting order of their numbers."""
    listed = [name for name in named if name in found] if isinstance(named, list) else []
    rest = sorted((name for name in found if name not in listed), key=_counting)
    return listed + rest


def _counting(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
