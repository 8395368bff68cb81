"""Other engines' adapter files; one file an engine, one line in this table."""

from manylora.adapters.exporting.exporter import Exporter
from manylora.table import Table

EXPORTS: Table[Exporter] = Table(
    "engine to export to",
    {
        "peft": "manylora.adapters.exporting.peft:PEFT",
        "mlx": "manylora.adapters.exporting.mlx:MLX",
        "gguf": "manylora.adapters.exporting.gguf:GGUF",
    },
)
