"""Optimisers over stacks: one state per stack, vectors of settings by slot; one line each in this table."""

from manylora.table import Table

OPTIMIZERS: Table = Table(
    "optimizer",
    {
        "adamw": "manylora.training.optim.elementwise:AdamW",
        "sgd": "manylora.training.optim.elementwise:Sgd",
    },
)
