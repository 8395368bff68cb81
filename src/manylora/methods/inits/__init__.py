"""Where a method's factors start; one file an init, one line in this table."""

from manylora.methods.inits.init import Init
from manylora.table import Table

INITS: Table[Init] = Table(
    "init",
    {
        "default": "manylora.methods.inits.default:DEFAULT",
        "gaussian": "manylora.methods.inits.gaussian:GAUSSIAN",
        "pissa": "manylora.methods.inits.pissa:PISSA",
        "olora": "manylora.methods.inits.olora:OLORA",
        "loftq": "manylora.methods.inits.loftq:LOFTQ",
    },
)
