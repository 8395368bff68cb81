"""Where a method's factors start; one file an init, one line in this table."""

from manylora.table import Table

INITS: Table = Table(
    "init",
    {
        "default": "manylora.methods.inits.default:default",
        "gaussian": "manylora.methods.inits.gaussian:gaussian",
    },
)
