"""Ways to make one change out of several: on deltas, never on A and B apart. One file a way, one line in this table."""

from manylora.adapters.combining.change import Combining
from manylora.table import Table

COMBININGS: Table[Combining] = Table(
    "way to combine",
    {
        "linear": "manylora.adapters.combining.linear:LINEAR",
        "svd": "manylora.adapters.combining.svd:SVD",
        "ties": "manylora.adapters.combining.ties:TIES",
        "dare": "manylora.adapters.combining.dare:DARE",
        "magnitude": "manylora.adapters.combining.magnitude:MAGNITUDE",
    },
)
