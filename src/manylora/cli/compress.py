"""`manylora compress`: a smaller adapter, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.opened import BaseName, Device, Opened, Quantize, TrustRemoteCode, open_base
from manylora.cli.output import AsJson, Output
from manylora.errors import ConfigError
from manylora.runs.places import adapter_folder

if TYPE_CHECKING:
    from manylora.adapters.compress.report import CompressReport

SHOWN_SITES = 8


def compress(
    adapter: Annotated[str, typer.Argument(help="An adapter folder, or the run that trained it.")],
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="8: int8, 4: int4, 2: two and one. Default: 8; float32 with --rank or --energy."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Keep at most so many components of a site.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Keep the components that make up this share: 0.99.")
    ] = None,
    rho: Annotated[
        float, typer.Option("--rho", help="With --bits 2: the share that is stored in two bits, the rest in one.")
    ] = 0.8,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Mean KL (nats) above which nothing is written: 1e-3. Default: any."),
    ] = None,
    base: BaseName = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to measure on, beside the probes; may be repeated.")
    ] = None,
    logits: Annotated[
        bool, typer.Option("--logits/--no-logits", help="Whether the base is loaded and logits are compared.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder to write. Default: measure, and write nothing.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="What the logits are computed in: float32 shows the loss alone.")
    ] = "float32",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter smaller, and measure what is lost."""
    from manylora.adapters.compress.compressed import compress as compress_adapter
    from manylora.errors import CompressRefused
    from manylora.files import refuse_occupied

    if not logits and (max_kl is not None or data):
        raise ConfigError(
            "--no-logits leaves nothing to measure", next_step="leave out --no-logits, or --max-kl and --data"
        )
    if output is not None:
        refuse_occupied(output)
    folder = adapter_folder(adapter)
    opened = None
    if logits:
        opened = open_base(
            base, [folder], dtype=dtype, device=device, quantize=quantize, trust_remote_code=trust_remote_code
        )
        opened.base.bank.close()  # each adapter that is measured gets a bank of its own
    out = Output(as_json)
    try:
        report = compress_adapter(
            folder, bits=bits, rank=rank, energy=energy, rho=rho, base=None if opened is None else opened.base,
            max_kl=max_kl, probes=_rows(data, opened), output=output,
        )  # fmt: skip
    except CompressRefused as error:
        show_report(out, error.report)
        out.finish({"adapter": str(folder)} | error.report.to_dict())
        raise
    show_report(out, report)
    out.line(f"\nwritten to {output}" if output is not None else "\nnothing was written: give --output DIR")
    out.finish({"adapter": str(folder)} | report.to_dict())


def _rows(data: list[str] | None, opened: Opened | None) -> list[list[int]]:
    """The tokens of the rows of data, as training shows them; what cannot be shown is left out and noted."""
    if not data or opened is None:
        return []
    from manylora.cli.evaluate import Settings, read_examples
    from manylora.config import DataPlace

    places = tuple(DataPlace(path=path) for path in data)
    settings = Settings(columns={}, data=places, on_bad_row="skip", row_tokens=opened.base.max_positions or 4096)
    return [example.tokens.tolist() for example in read_examples(opened, settings)]


def show_report(output: Output, report: CompressReport) -> None:
    """Print what a smaller adapter costs: bytes, logits, then the sites, worst first."""
    from manylora.adapters.compress.report import facts, in_words

    lines = facts(report)
    width = max(map(len, lines))
    for name, value in lines.items():
        output.line(f"{name:<{width}}  {value}")
    output.line()
    shown = report.sites[:SHOWN_SITES]
    rows = [(site.site, site.rank_before, site.rank, site.bits, site.error) for site in shown]
    output.table(("site, worst first", "rank", "now", "bits", "error / delta"), rows)
    if len(report.sites) > len(shown):
        output.line(f"and {len(report.sites) - len(shown)} more, all with a smaller error")
    if report.others:
        output.line()
        trials = [(in_words(one.recipe), one.num_bytes, one.kl) for one in report.others]
        output.table(("other ways", "bytes", "mean KL"), trials)
