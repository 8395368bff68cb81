"""How a few small tensors change one frozen map; one file a method, one line in this table."""

from manylora.table import Table
from manylora.types import Method

WHOLE_COPY = "full"
"""The method of `spec.full_sites`."""

METHODS: Table[Method] = Table(
    "method",
    {
        "lora": "manylora.methods.lora:LORA",
        "dora": "manylora.methods.dora:DORA",
        "lora-bias": "manylora.methods.biased:LORA_BIAS",
        "lora-own-bias": "manylora.methods.biased:OWN_BIAS",
        "full": "manylora.methods.full:FULL",
    },
)
