"""Optimisers over stacks: rules without memory, one line each in this table. No torch until one of them updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.table import Table

if TYPE_CHECKING:
    from manylora.training.optim.rule import Rule

OPTIMIZERS: Table[Rule] = Table(
    "optimizer",
    {
        "adamw": "manylora.training.optim.elementwise:ADAMW",
        "sgd": "manylora.training.optim.elementwise:SGD",
        "rmsprop": "manylora.training.optim.elementwise:RMSPROP",
        "adagrad": "manylora.training.optim.elementwise:ADAGRAD",
    },
)
