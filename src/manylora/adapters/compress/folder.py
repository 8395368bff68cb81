"""The folder of a compressed adapter: an ordinary one whose factors are codes, with a report beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from manylora.adapters.adapter import Adapter
from manylora.adapters.compress.file import COMPRESSED_FILE, write_coded
from manylora.adapters.compress.reduce import Reduced
from manylora.adapters.compress.schemes import SCHEMES
from manylora.adapters.peft.config import CONFIG_FILE, PREFIX, TENSORS_FILE
from manylora.adapters.receipt import RECEIPT_FILE
from manylora.base.kinds import KINDS
from manylora.errors import AdapterBroken
from manylora.files import file_digest, refuse_occupied, write_folder_atomic
from manylora.methods import METHODS

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel

REPORT_FILE = "compress_report.json"
_OWN = (REPORT_FILE, CONFIG_FILE, RECEIPT_FILE, "README.md")
_BESIDE = (".json", ".jinja", ".txt", ".model", ".yaml")
"""Endings of what an adapter's folder holds beside tensors: tokenizer, chat template, configuration."""


def write_folder(
    made: Reduced, folder: Path, report: Mapping[str, Any], *, base: FrozenModel | None, source: Path | None
) -> None:
    """Write the folder, whole or not at all, after it has been read back and found to be `made`.

    The tokenizer and whatever else lay beside the tensors is taken from `source`.

    Raises:
        OutputExists: the folder already holds something.
    """
    refuse_occupied(folder)
    with write_folder_atomic(folder) as new:
        made.adapter.save(new, base)
        if made.recipe.scheme is not None:
            _code(made, new)
        _keep_origin(made.adapter, new)
        for path in sorted(source.iterdir()) if source is not None else ():
            if path.is_file() and path.suffix in _BESIDE and path.name not in _OWN and not (new / path.name).exists():
                shutil.copyfile(path, new / path.name)
        _write_json(new / REPORT_FILE, report)
        _prove(made.adapter, new)


def _code(made: Reduced, folder: Path) -> None:
    """Put codes in place of a folder's factors."""
    recipe = made.recipe
    assert recipe.scheme is not None
    settings = SCHEMES.get(recipe.scheme).settings(recipe.options)
    tensors = load_file(folder / TENSORS_FILE)
    coded = {}
    for site, parts in made.coded.items():
        ends = METHODS.get(made.adapter.factors[site].method).stored(KINDS.get(made.adapter.kind_at(site)))
        for name, part in zip("ab", parts, strict=True):
            key = f"{PREFIX}{site}.{ends[name]}"
            coded[key] = (tuple(tensors.pop(key).shape), part)
    write_coded(folder / COMPRESSED_FILE, recipe.scheme, settings, coded, tensors)
    (folder / TENSORS_FILE).unlink()
    receipt = json.loads((folder / RECEIPT_FILE).read_text(encoding="utf-8"))
    receipt["tensors"] = {"sha256": file_digest(folder / COMPRESSED_FILE)}
    receipt["compression"] = {"scheme": recipe.scheme, "bits": made.bits, **settings}
    _write_json(folder / RECEIPT_FILE, receipt)
    (folder / "README.md").write_text(_card(made), encoding="utf-8")


def _keep_origin(adapter: Adapter, folder: Path) -> None:
    """What the receipt says of the base stays what it was in training, however the base was loaded to measure on."""
    if "base" in adapter.receipt:
        receipt = json.loads((folder / RECEIPT_FILE).read_text(encoding="utf-8"))
        _write_json(folder / RECEIPT_FILE, receipt | {"base": adapter.receipt["base"]})


def _prove(adapter: Adapter, folder: Path) -> None:
    """Pass a folder that reads as the adapter, to the bit."""
    read = Adapter.load(folder)
    for name, own in adapter.factors.items():
        same = name in read.factors and all(
            torch.equal(value, read.factors[name].tensors[key]) for key, value in own.tensors.items()
        )
        scale, found = adapter.spec.scale(name), read.spec.scale(name)
        if not same or abs(scale - found) > 1e-9 * abs(scale):
            raise AdapterBroken(
                f"{name!r} was not read back as it was written, so nothing is kept",
                next_step="this is a fault of manylora: please report it",
            )


def _card(made: Reduced) -> str:
    """The model card of a folder that PEFT does not open."""
    adapter, scheme = made.adapter, made.recipe.scheme
    base_line = f"base_model: {json.dumps(adapter.base_name)}\n" if adapter.base_name else ""
    return (
        f"---\n{base_line}library_name: manylora\ntags:\n- lora\n- manylora\n---\n\n"
        f"# A compressed adapter for {adapter.base_name or 'an unknown base'}\n\n"
        f"- stored as {scheme}: {made.bits:.2f} bits for each of {made.num_parameters:,} numbers, scales counted\n"
        f"- `{REPORT_FILE}` says what that cost\n"
        f"- fingerprint of the base: `{adapter.base_fingerprint or 'unknown'}`\n\n"
        "```python\nimport manylora\n\nadapter = manylora.Adapter.load(this_folder)\n```\n\n"
        f"PEFT does not read `{COMPRESSED_FILE}`. For an ordinary adapter: "
        "`manylora.Adapter.load(this_folder).save(other_folder)`.\n"
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
