"""Schemes that store the two factors of a site in few bits."""

from manylora.adapters.compress.scheme import Scheme
from manylora.table import Table

SCHEMES: Table[Scheme] = Table(
    "scheme",
    {
        "int8": "manylora.adapters.compress.int8:INT8",
        "int4": "manylora.adapters.compress.int4:INT4",
        "split": "manylora.adapters.compress.split:SPLIT",
    },
)

SCHEME_OF_BITS = {8: "int8", 4: "int4", 2: "split"}

__all__ = ["SCHEMES", "SCHEME_OF_BITS", "Scheme"]
