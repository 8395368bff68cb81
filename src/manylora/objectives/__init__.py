"""What is minimised: pure functions of (outputs, batch); one file each, one line in this table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.table import Table

if TYPE_CHECKING:
    from manylora.types import Objective

OBJECTIVES: Table[Objective] = Table(
    "objective",
    {
        "causal-lm": "manylora.objectives.causal_lm:CAUSAL_LM",
        "classification": "manylora.objectives.classification:CLASSIFICATION",
        "distill": "manylora.objectives.distill:DISTILL",
    },
)

SETTINGS: Table[type] = Table("objective with settings", {"distill": "manylora.objectives.settings:DistillSettings"})
"""The settings of those that have any, apart from them so that a configuration is checked without torch."""
