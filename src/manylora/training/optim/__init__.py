"""Optimisers over stacks: one state per stack, vectors of settings by slot; one file each, one line in this table."""

from manylora.table import Table

OPTIMIZERS: Table = Table(
    "optimizer",
    {
        "adamw": "manylora.training.optim.adamw:AdamW",
        "sgd": "manylora.training.optim.sgd:Sgd",
    },
)
