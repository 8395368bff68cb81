"""Where the members of a sweep train: here, or in processes over Ray; one file each, one line in this table."""

from manylora.table import Table

ENGINES: Table = Table(
    "engine",
    {
        "local": "manylora.sweep.engines.local:run",
        "ray": "manylora.sweep.engines.ray:run",
    },
)
