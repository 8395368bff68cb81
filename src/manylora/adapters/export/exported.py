"""An adapter in another engine's own format; the same map, to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.export.exporters import EXPORTS
from manylora.errors import BaseNotFound
from manylora.files import refuse_occupied, write_folder_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manylora.adapters.adapter import Adapter


def export(adapter: Adapter, to: str, output: str | Path, *, base: str | None = None) -> tuple[str, ...]:
    """Lines that say what was written to the folder `output`, for the engine `to` (peft, mlx, gguf).

    `base` names the base whose configuration the engine's names come from; None: the adapter's own.

    Raises:
        UnknownName: no such engine. OutputExists: the folder holds something. AdapterBroken: a site that the engine
        cannot hold. BaseMismatch: the base's configuration is needed and not known.
    """
    engine, output = EXPORTS.get(to), Path(output)
    refuse_occupied(output)
    config = _config(base, adapter.base_name) if engine.needs_config else None
    with write_folder_atomic(output) as new:
        return engine.write(adapter, new, config)


def _config(base: str | None, own_base: str) -> Mapping[str, Any] | None:
    """The base's config.json; None where the adapter's own base is not to be found."""
    from manylora.base.load import find_base

    if base is None and not own_base:
        return None
    try:
        folder = find_base(base or own_base, weights=False)
    except BaseNotFound:
        if base is not None:
            raise
        return None
    found: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found
