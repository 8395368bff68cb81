"""What short forwards found of a model, as a value: found once, and taken by every base of the same architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from manylora.base.fast.elementwise import Form
from manylora.base.probes import RowRules


@dataclass(frozen=True, slots=True)
class Findings:
    """How a model may be used; of its weights it holds nothing.

    `rules`: how it takes its rows. `post_head`: the name of the map after its head, None where its own logits are
    taken. `enters_model`: hidden states are had by a call of the whole model, else by one of its backbone.
    `attention`: whether it attends through `manylora.ops.attention`. `elementwise`: by module, the form that computes
    it. `reads_along`: by site, the sites that read the same input after it. `notes`: what was chosen and why.
    """

    rules: RowRules = field(default_factory=RowRules)
    post_head: str | None = None
    enters_model: bool = True
    attention: bool = False
    elementwise: Mapping[str, Form] = field(default_factory=dict)
    reads_along: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


Run = Callable[[], Tensor]
"""A short forward and its states."""
