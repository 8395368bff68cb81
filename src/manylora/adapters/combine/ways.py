"""Ways to make one change out of several: on deltas, never on A and B apart. One file a way, one line in this table."""

from manylora.adapters.combine.change import Combining
from manylora.table import Table

COMBININGS: Table[Combining] = Table(
    "way to combine",
    {
        "linear": "manylora.adapters.combine.linear:LINEAR",
        "svd": "manylora.adapters.combine.svd:SVD",
        "ties": "manylora.adapters.combine.ties:TIES",
        "dare": "manylora.adapters.combine.dare:DARE",
        "magnitude": "manylora.adapters.combine.magnitude:MAGNITUDE",
    },
)
