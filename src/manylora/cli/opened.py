"""A base with the adapters that a command names, each in a slot of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.output import note
from manylora.errors import UserError

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.base.language import LanguageBase

BaseName = Annotated[
    str | None,
    typer.Option("--base", help="builtin:NAME, a Hugging Face folder, or a hub id. Default: the adapter's own."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the frozen base: bfloat16, float16, float32 or float64.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize", help="Pack the base: nf4, fp4, int8, int4 or none. Default: as the adapter was trained."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace one key; may be repeated. Paths: from here."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the output folder.")]
UseCache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Whether rows that were encoded before are taken from the cache.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the base.")]


@dataclass(frozen=True, slots=True)
class Opened:
    """`slots` holds the slot of every adapter by its name, after `base` itself at -1."""

    base: LanguageBase
    slots: Mapping[str, int]


def open_base(
    name: str | None,
    adapters: Sequence[Path],
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    chat_template: Path | None = None,
    auto: str = "AutoModelForCausalLM",
    quiet: bool = False,
) -> Opened:
    """The base with the adapters in slots 0, 1, ...; without a name, the base that the first adapter was trained on.

    An adapter that brings a chat template is shown prompts by that one, as it was trained. `quantize` packs the base's
    linear weights; None: as the adapters were trained, "none": not at all.

    Raises:
        UserError: no base is named. BaseMismatch: an adapter was trained on another base, tokenizer or chat template.
    """
    from manylora.adapters.adapter import Adapter
    from manylora.adapters.bank import Bank
    from manylora.adapters.receipt import check_receipt
    from manylora.base.load import load_base

    loaded = {label: Adapter.load(folder) for label, folder in _labels(adapters).items()}
    template = chat_template or _template_of(adapters)
    named = name or _base_of(loaded)
    storage, why = _storage(named, quantize, loaded)
    base = load_base(
        named, dtype=dtype, device=device, quantize=storage, auto=auto, trust_remote_code=trust_remote_code,
        chat_template=template,
    )  # fmt: skip
    for text in () if quiet else why:
        note(text)
    for text in () if quiet else base.notes:
        note(text)
    slots = {"base": -1}
    if loaded:
        bank = Bank(base, num_slots=len(loaded))
        for slot, (label, adapter) in enumerate(loaded.items()):
            check_receipt(adapter, base)
            bank.put(adapter, slot=slot)
            slots[label] = slot
        bank.prove()
    return Opened(base, slots)


def _storage(name: str, asked: str | None, loaded: Mapping[str, Adapter]) -> tuple[str | None, list[str]]:
    """How the base's weights are packed, and why: as asked, else as the first adapter that says so was trained."""
    from manylora.base.load import find_base
    from manylora.base.packing.stored import stored_format

    if asked is not None:
        return (None if asked == "none" else asked), []
    said = {label: (adapter.receipt.get("base") or {}).get("storage") for label, adapter in loaded.items()}
    chosen = next((storage for storage in said.values() if storage), None)
    if chosen is None or "+" in chosen or stored_format(find_base(name)) is not None:
        return None, []
    others = [label for label, storage in said.items() if storage != chosen]
    why = [f"the base is packed as {chosen}, as the adapter was trained; --quantize none: leave it dense"]
    return chosen, why + [f"{label} was trained on another form of the base" for label in others]


def _labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Short names for folders: their last part, the whole path where that is not enough."""
    names = [folder.resolve().name for folder in folders]
    return {
        str(folder) if names.count(name) > 1 or name == "base" else name: folder
        for folder, name in zip(folders, names, strict=True)
    }


def _base_of(adapters: Mapping[str, Adapter]) -> str:
    names = [adapter.base_name for adapter in adapters.values() if adapter.base_name]
    if not names:
        why = "the adapter does not say which base it was trained on" if adapters else "no base is named"
        raise UserError(why, next_step="give it: --base builtin:tiny-en, a folder, or a hub id")
    return names[0]


def _template_of(folders: Sequence[Path]) -> Path | None:
    """The chat template that an adapter was trained with, where its folder holds one."""
    return next((path for folder in folders if (path := folder / "chat_template.jinja").is_file()), None)
