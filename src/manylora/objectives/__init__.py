"""What is minimised: pure functions of (outputs, batch); one file each, one line in this table."""

from manylora.table import Table
from manylora.types import Objective

OBJECTIVES: Table[Objective] = Table(
    "objective",
    {
        "causal-lm": "manylora.objectives.causal_lm:CAUSAL_LM",
        "classification": "manylora.objectives.classification:CLASSIFICATION",
    },
)
