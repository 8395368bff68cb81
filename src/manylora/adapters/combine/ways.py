"""Ways to make one change out of several: on deltas, never on A and B apart. One line a way."""

from manylora.adapters.combine.change import Combining
from manylora.table import Table

COMBININGS: Table[Combining] = Table(
    "way to combine",
    {
        "linear": "manylora.adapters.combine.methods:LINEAR",
        "svd": "manylora.adapters.combine.methods:SVD",
        "ties": "manylora.adapters.combine.methods:TIES",
        "dare": "manylora.adapters.combine.methods:DARE",
        "magnitude": "manylora.adapters.combine.methods:MAGNITUDE",
    },
)
