"""`manylora export`: the same adapter for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.output import AsJson, Output


def export(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    to: Annotated[str, typer.Option("--to", help="peft, mlx or gguf (llama.cpp).")],
    output: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base, whose configuration mlx and gguf read. Default: the adapter's own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another engine's format."""
    from manylora.adapters.adapter import Adapter
    from manylora.adapters.export.exported import export as export_adapter

    lines = export_adapter(Adapter.load(adapter), to, output, base=base)
    out = Output(as_json)
    for line in lines:
        out.line(line)
    out.line(f"written to {output}")
    out.finish({
        "adapter": str(adapter), "to": to, "output": str(output),
        "files": sorted(path.name for path in output.iterdir()), "notes": list(lines),
    })  # fmt: skip
