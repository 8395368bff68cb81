"""What a site is as a map; one file a kind, one line in this table. The first kind that recognises a module has it."""

from manylora.table import Table
from manylora.types import SiteKind

KINDS: Table[SiteKind] = Table(
    "kind of site",
    {
        "linear": "manylora.base.kinds.linear:LINEAR",
        "conv1d": "manylora.base.kinds.linear:CONV1D",
        "embedding": "manylora.base.kinds.embedding:EMBEDDING",
        "convolution1d": "manylora.base.kinds.convolution:CONVOLUTION1D",
        "convolution2d": "manylora.base.kinds.convolution:CONVOLUTION2D",
        "module": "manylora.base.kinds.module:MODULE",
    },
)
