"""Adapters on disk: PEFT's folder with a receipt beside it, written whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from manylora.adapters.peft.config import CONFIG_FILE, PREFIX, TENSORS_FILE, config_of, low_rank_sites, master
from manylora.adapters.peft.reader import load_adapter
from manylora.adapters.receipt import RECEIPT_FILE, check_base, make_receipt
from manylora.base.kinds import KINDS
from manylora.errors import AdapterBroken, BaseMismatch, nearest_names
from manylora.files import refuse_occupied, write_folder_atomic
from manylora.methods import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from manylora.adapters.adapter import Adapter
    from manylora.base.frozen import FrozenModel

__all__ = ["fold_scale", "load_adapter", "save_adapter"]


def save_adapter(adapter: Adapter, folder: Path, base: FrozenModel | None = None) -> Path:
    """The folder, now an adapter that PEFT opens; with `base` its tokenizer and chat template lie beside it.

    Anchored factors are written as plain ones of twice the rank, since no other tool has anchors. The same adapter
    gives the same bytes. Tied copies are written under each of their names, as PEFT expects.

    Raises:
        OutputExists: the folder already holds something.
        BaseMismatch: `base` is not the adapter's. AdapterBroken: factors that the folder has no place for.
        DiskFull: nothing is left behind.
    """
    folder = Path(folder)
    adapter = adapter.plain()
    if base is not None:
        check_base(adapter, base)
        strange = [name for name in adapter.factors if name not in base.sites]
        if strange:
            raise BaseMismatch(
                f"the adapter's site {strange[0]!r} is not in this base", nearest=nearest_names(strange[0], base.sites)
            )
    tensors = _tensors_of(adapter)
    copied = _complete(tensors, adapter, base) if base is not None else {}
    config = config_of(adapter)
    refuse_occupied(folder)
    with write_folder_atomic(folder) as new:
        save_file(tensors | copied, new / TENSORS_FILE, metadata={"format": "pt"})
        _write_json(new / CONFIG_FILE, config)
        _write_json(new / RECEIPT_FILE, make_receipt(adapter, base, new / TENSORS_FILE, sorted(copied)))
        if base is not None and base.tokenizer is not None:
            base.tokenizer.save_pretrained(new)
        (new / "README.md").write_text(_card(adapter), encoding="utf-8")
    return folder


def fold_scale(adapter: Adapter) -> Adapter:
    """The same map with the scale inside B and alpha equal to the rank, so that no reader can get it wrong."""
    adapter = adapter.plain()
    spec = adapter.spec
    factors = dict(adapter.factors)
    for name in low_rank_sites(adapter):
        method = METHODS.get(factors[name].method)
        a, b = method.product(factors[name])
        factors[name] = method.of_product(a, spec.scale(name) * b, like=factors[name])
    alphas = {pattern: float(rank) for pattern, rank in spec.rank_pattern.items()}
    folded = replace(spec, alpha=float(spec.rank), scale_rule="alpha/rank", alpha_pattern=alphas)
    return replace(adapter, spec=folded, factors=factors)


def _tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The factors under PEFT's keys, each in memory of its own."""
    if not adapter.factors:
        raise AdapterBroken("the adapter has no factors, so there is nothing to save")
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.factors.items():
        method = METHODS.get(factors.method)
        if not method.factored:
            names = [name, *(other for other, owner in adapter.tied.items() if owner == name)]
            tensors |= {_key(path, key): value for path in names for key, value in factors.tensors.items()}
            continue
        (a, b), rank = method.product(factors), adapter.spec.rank_at(name)
        if not a.shape[0] == b.shape[1] == rank:
            raise AdapterBroken(f"{name!r} has factors of rank {a.shape[0]} and {b.shape[1]}, and its spec says {rank}")
        ends = method.stored(KINDS.get(adapter.kind_at(name)))
        tensors |= {f"{PREFIX}{name}.{ends[key]}": value for key, value in factors.tensors.items()}
    return {key: master(value) for key, value in tensors.items()}


def _complete(tensors: Mapping[str, Tensor], adapter: Adapter, base: FrozenModel) -> dict[str, Tensor]:
    """The base's own tensors that PEFT asks for in each module of `modules_to_save`: buffers, children, a tied bias."""
    return {
        key: master(value)
        for name in adapter.spec.full_sites
        for part, value in base.sites[name].module.state_dict().items()
        if (key := _key(name, part)) not in tensors and not _of_packed_weight(base, name, part)
    }


def _of_packed_weight(base: FrozenModel, site: str, part: str) -> bool:
    """Whether it is a tensor of a packed weight: other tools know none, and the trained copy stands in its place."""
    return base.sites[site].packed is not None and part.startswith("weight.")


def _key(site: str, parameter: str) -> str:
    return f"{PREFIX}{site}.{parameter}" if site else f"{PREFIX}{parameter}"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    # Not sorted: the order of rank_pattern and alpha_pattern decides which entry wins.
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _card(adapter: Adapter) -> str:
    """The model card: what hubs read at the top, and how to open the folder."""
    spec, base_name = adapter.spec, adapter.base_name or "unknown"
    low_rank = low_rank_sites(adapter)
    base_line = f"base_model: {json.dumps(adapter.base_name)}\n" if adapter.base_name else ""
    about = (
        f"- {len(low_rank)} low-rank sites, rank {spec.rank}, alpha {spec.alpha:g}, scale {spec.scale_rule}\n"
        if low_rank
        else ""
    )
    return (
        f"---\n{base_line}library_name: peft\ntags:\n- lora\n- manylora\n---\n\n"
        f"# An adapter for {base_name}\n\n"
        f"{about}- {len(spec.full_sites)} sites with a trained copy of their own\n"
        f"- {adapter.num_parameters():,} parameters\n"
        f"- fingerprint of the base: `{adapter.base_fingerprint or 'unknown'}`\n\n"
        "```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, this_folder)\n```\n\n"
        "`receipt.json` says on which base, tokenizer and chat template the adapter was trained.\n"
    )
