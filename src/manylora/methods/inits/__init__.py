"""Where a method's factors start; one file an init, one line in this table."""

from manylora.methods.inits.init import Init
from manylora.table import Table

INITS: Table[Init] = Table(
    "init",
    {
        "default": "manylora.methods.inits.drawn:DEFAULT",
        "gaussian": "manylora.methods.inits.drawn:GAUSSIAN",
        "pissa": "manylora.methods.inits.pissa:PISSA",
        "olora": "manylora.methods.inits.olora:OLORA",
        "loftq": "manylora.methods.inits.loftq:LOFTQ",
        "eva": "manylora.methods.inits.eva:EVA",
    },
)
