"""`receipt.json`: what an adapter was trained on, so that another base, tokenizer or template is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manylora.errors import AdapterBroken, BaseMismatch
from manylora.files import file_digest
from manylora.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from manylora.adapters.adapter import Adapter
    from manylora.base.frozen import FrozenModel

RECEIPT_FILE = "receipt.json"
_SAMPLES = 256


def make_receipt(adapter: Adapter, base: FrozenModel | None, tensors: Path, copied: list[str]) -> dict[str, Any]:
    """The receipt of an adapter whose tensors have been written; `copied` are the base's own among them.

    Without a base, what an earlier receipt said of tokenizer and template is kept.
    """
    spec = adapter.spec
    sites: dict[str, dict[str, Any]] = {}
    for name, factors in adapter.factors.items():
        sites[name] = {"method": factors.method}
        if rank := METHODS.get(factors.method).rank(factors):
            sites[name] |= {"rank": rank, "scale": spec.scale(name)}
        if name in adapter.kinds:
            sites[name]["kind"] = adapter.kinds[name]
    receipt: dict[str, Any] = {
        "version": 1,
        "manylora": _own_version(),
        "base": {"name": adapter.base_name, "fingerprint": adapter.base_fingerprint},
        "tensors": {"sha256": file_digest(tensors)},
        "sites": sites,
        "tied": dict(adapter.tied),
        "copied": copied,
    }
    if adapter.record:
        receipt["task"] = dict(adapter.record)
    if base is None:
        return receipt | {
            key: adapter.receipt[key] for key in ("tokenizer", "chat_template", "frozen") if key in adapter.receipt
        }
    receipt["base"] = {
        "name": base.name or adapter.base_name,
        "fingerprint": base.fingerprint,
        "storage": base.storage,
    }
    tokenizer = getattr(base, "tokenizer_digest", None)
    if tokenizer is not None:
        receipt["tokenizer"] = tokenizer
        receipt["chat_template"] = getattr(base, "template_digest", None)
    return receipt


def read_receipt(folder: Path, tensors: Path) -> dict[str, Any]:
    """The folder's receipt, {} where it has none (PEFT writes none).

    Raises:
        AdapterBroken: no JSON, or the tensors are not those that it was written for.
    """
    path = folder / RECEIPT_FILE
    if not path.is_file():
        return {}
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        promised = receipt["tensors"]["sha256"]
        complete = isinstance(receipt["base"], dict) and isinstance(receipt["sites"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterBroken(f"{path} is no receipt: {type(error).__name__}: {error}") from error
    if not complete:
        raise AdapterBroken(f"{path} is no receipt: base and sites must be objects")
    found = file_digest(tensors)
    if found != promised:
        raise AdapterBroken(
            f"{tensors} has SHA-256 {found[:12]}..., and {RECEIPT_FILE} was written for {promised[:12]}...",
            next_step=f"fetch the folder again; if the tensors were changed on purpose, delete {RECEIPT_FILE}",
        )
    return receipt


def check_scales(receipt: Mapping[str, Any], adapter: Adapter, where: str) -> None:
    """Pass an adapter whose ranks and scales are those that were trained.

    Raises:
        AdapterBroken: the config was edited after the receipt was written.
    """
    for name, said in receipt.get("sites", {}).items():
        if "scale" not in said:
            continue
        scale = adapter.spec.scale(name)
        if abs(scale - said["scale"]) > 1e-9 * abs(said["scale"]):
            raise AdapterBroken(
                f"{where} gives {name!r} the scale {scale:.6g}, and {RECEIPT_FILE} says {said['scale']:.6g}",
                next_step=f"put r, lora_alpha and their patterns back, or, if that was meant, delete {RECEIPT_FILE}",
            )


def check_base(adapter: Adapter, base: FrozenModel) -> None:
    """Pass an adapter whose base is this one, as far as the adapter says which it was.

    Raises:
        BaseMismatch: another fingerprint, or another embedding than the copy that PEFT put beside the factors.
        AdapterBroken: its folder says that more sites of this base have factors than it holds.
    """
    if adapter.base_fingerprint is not None and adapter.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on {adapter.base_name or 'another base'} ({adapter.base_fingerprint[:15]}...), "
            f"and this base is {base.name or 'unnamed'} ({base.fingerprint[:15]}...)",
            next_step="load the base that the adapter's receipt.json names",
        )
    _check_targets(adapter, base)
    for name, said in adapter.receipt.get("frozen", {}).items():
        site, parameter = name.rsplit(".", 1)
        own = getattr(base.sites[site].module, parameter, None) if site in base.sites else None
        if own is None or not _same_samples(samples(own), said):
            raise BaseMismatch(
                f"the adapter brings a copy of its base's {name!r}, and this base has another",
                next_step="load the base that the adapter was trained on, with the same vocabulary",
            )


def _check_targets(adapter: Adapter, base: FrozenModel) -> None:
    from manylora.adapters.peft.config import is_targeted, under_any

    targets = adapter.targets
    if targets is None:
        return
    wanted = [name for name, site in base.sites.items() if site.kind.maps and is_targeted(name, targets)]
    lost = [name for name in wanted if name not in adapter.factors and not under_any(name, adapter.spec.full_sites)]
    if lost:
        raise AdapterBroken(
            f"the adapter's target_modules mean {len(wanted)} sites of this base, and it holds no factors for "
            f"{len(lost)} of them, the first is {lost[0]!r}",
            next_step="fetch the adapter again; if they are left out on purpose, name the others in full there",
        )


def check_receipt(adapter: Adapter, base: FrozenModel) -> None:
    """Pass an adapter that was trained on this base with this tokenizer and this chat template.

    What the adapter does not say, or the base does not have, is not compared.

    Raises:
        BaseMismatch: what differs, of base, tokenizer and chat template.
    """
    check_base(adapter, base)
    tokenizer = getattr(base, "tokenizer_digest", None)
    if tokenizer is None or "tokenizer" not in adapter.receipt:
        return
    pairs = {
        "tokenizer": (adapter.receipt["tokenizer"], tokenizer),
        "chat template": (adapter.receipt.get("chat_template"), getattr(base, "template_digest", None)),
    }
    for what, (said, found) in pairs.items():
        if said != found:
            raise BaseMismatch(
                f"the adapter was trained with another {what} ({_short(said)}), and the base has {_short(found)}",
                next_step="the adapter's folder holds the tokenizer and chat template that it was trained with",
            )


def samples(value: Tensor) -> dict[str, Any]:
    """A tensor's shape and some of its numbers, spread evenly: enough to tell bases apart in any floating dtype."""
    flat = value.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
    return {"shape": list(value.shape), "values": flat[index.to(flat.device)].double().cpu().tolist()}


def _same_samples(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if list(one["shape"]) != list(other["shape"]):
        return False
    # bfloat16 keeps 8 bits of a number.
    first, second = (torch.tensor(s["values"], dtype=torch.float64) for s in (one, other))
    return torch.allclose(first, second, rtol=2**-7, atol=1e-6)


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:15] + "..."


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("manylora")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0"
