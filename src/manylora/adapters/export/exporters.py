"""Other engines' adapter files; one file an engine, one line in this table."""

from manylora.adapters.export.exporter import Exporter
from manylora.table import Table

EXPORTS: Table[Exporter] = Table(
    "engine to export to",
    {
        "peft": "manylora.adapters.export.peft:PEFT",
        "mlx": "manylora.adapters.export.mlx:MLX",
        "gguf": "manylora.adapters.export.gguf:GGUF",
    },
)
