"""`manylora quantize`: a base with its linear weights packed, in a folder that loads without the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.opened import TrustRemoteCode
from manylora.cli.output import AsJson, Output, note

if TYPE_CHECKING:
    from manylora.base.packing.folder import Loss
    from manylora.methods.inits.loftq import LoftqPacking


def quantize(
    base: Annotated[str, typer.Argument(help="builtin:NAME, a Hugging Face folder, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The new folder.")],
    format_name: Annotated[str, typer.Option("--format", help="nf4, fp4, int8 or int4.")] = "nf4",
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="nf4, fp4: scales of 8 bits. Default: yes."),
    ] = None,
    block: Annotated[
        int | None, typer.Option("--block", min=1, help="Weights that share a scale. Default: the format's own.")
    ] = None,
    loftq_rank: Annotated[
        int | None,
        typer.Option("--loftq-rank", min=1, help="Also write OUTPUT-start, an adapter that the weights are fitted to."),
    ] = None,
    loftq_iterations: Annotated[int, typer.Option("--loftq-iterations", min=1, help="Turns; the best is kept.")] = 5,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Pack a base's linear weights into few bits."""
    from manylora.base.packing.folder import quantise_folder

    out = Output(as_json)
    options: dict[str, Any] = {"double_quant": double_quant, "block": block}
    options = {key: value for key, value in options.items() if value is not None}
    start = output.with_name(f"{output.name}-start")
    fit = None if loftq_rank is None else _fitting(start, format_name, loftq_rank, loftq_iterations, options)
    written = quantise_folder(base, output, format_name, options, fit=fit, trust_remote_code=trust_remote_code)
    if fit is not None:
        _save_start(start, written.folder, fit, trust_remote_code)
    for text in written.notes:
        note(text)
    rows = {**written.losses, "all": written.total}
    out.table(
        ("sites ending in", "count", "weights", "relative error", "bits a weight", "bytes before", "bytes after"),
        [(name, *_row(loss).values()) for name, loss in rows.items()],
    )
    out.line(
        f"\n{written.folder}: {written.bytes_after:,} bytes of tensors, from {written.bytes_before:,}; what is not in "
        f"the table stays dense\nuse it: base: {written.folder}"
    )
    if fit is not None:
        out.line(f"its adapter: adapter.from: {start}; neither is of use without the other")
    out.finish({
        "folder": written.folder,
        "start": None if fit is None else start,
        "format": written.format,
        "options": options,
        "fingerprint": written.fingerprint,
        "bytes_before": written.bytes_before,
        "bytes_after": written.bytes_after,
        "sites": {name: _row(loss) for name, loss in rows.items()},
        "notes": written.notes,
    })  # fmt: skip


def _fitting(start: Path, format_name: str, rank: int, iterations: int, options: dict[str, Any]) -> LoftqPacking:
    """Packs each weight so that an adapter of this rank makes up for what packing loses."""
    from manylora.errors import OutputExists
    from manylora.methods.inits.loftq import LoftqPacking
    from manylora.spec import AdapterSpec

    if start.exists():
        raise OutputExists(f"{start} exists, where the starting adapter is to lie", next_step="choose another --output")
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank)
    return LoftqPacking(format_name, spec, iterations=iterations, options=options)


def _save_start(start: Path, folder: Path, fit: LoftqPacking, trust_remote_code: bool) -> None:
    from manylora.adapters.adapter import Adapter
    from manylora.base.load import load_base

    packed = load_base(str(folder), device="cpu", trust_remote_code=trust_remote_code)
    Adapter.of(packed, fit.spec, fit.factors).save(start, packed)


def _row(loss: Loss) -> dict[str, Any]:
    return {
        "count": loss.num_sites,
        "weights": loss.num_weights,
        "relative_error": loss.relative_error,
        "bits": loss.bits,
        "bytes_before": loss.bytes_before,
        "bytes_after": loss.bytes_after,
    }
