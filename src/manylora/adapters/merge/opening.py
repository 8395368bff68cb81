"""The proof that a merged folder is what was measured: it is opened as anyone would, and computes the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.merge.measure import probe_logits
from manylora.adapters.merge.probes import Probes
from manylora.base.auto import auto_class_named
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.errors import MergeRefused
from manylora.memory.device import available_bytes

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Of the largest logit: other kernels than those of the measurement, and no more."""


def prove_opens(folder: Path, base: Any, probes: Probes | None, measured: Tensor | None) -> str:
    """A line that says what was proven of a written folder.

    Raises:
        MergeRefused: the folder computes something else than the merge that was measured.
    """
    auto = auto_class(base)
    if auto is None or probes is None or measured is None or base.tokenizer is None:
        return "the folder was not opened: its class of model is not one that is opened here"
    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors")) * 2
    free = available_bytes(base.device)
    if needed > free:
        return f"the folder was not opened: that takes up to {needed:,} bytes, and {free:,} are free"
    opened = load_base(str(folder), dtype=str(base.dtype).removeprefix("torch."), device=str(base.device), auto=auto)
    if opened.dtype != base.dtype:
        return f"the folder opens; its logits were not compared, as it computes in {opened.dtype}"
    apart = float((probe_logits(opened, probes) - measured).abs().max())
    if not apart <= _TOLERANCE[base.dtype] * float(measured.abs().max()):
        raise MergeRefused(
            f"the merged folder, once opened, is {apart:.3g} from the logits that were measured, so nothing is kept",
            next_step="this model's class reads its weights in a way that merging does not know: please report it",
        )
    return f"the folder was opened: its logits are within {apart:.2g} of those measured"


def auto_class(base: Any) -> str | None:
    """The transformers class through which a base is opened again; None: it is not one of transformers' own."""
    if not isinstance(base, LanguageBase):
        return None
    return auto_class_named(type(base.model).__name__)
