"""`manylora merge`: base and adapter as one model folder, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.opened import BaseName, Device, TrustRemoteCode
from manylora.cli.output import AsJson, Output, note
from manylora.errors import MergeRefused, UserError

if TYPE_CHECKING:
    from manylora.adapters.merge import MergeReport

SHOWN_SITES = 8


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    into: Annotated[
        str, typer.Option("--into", help="How the merged weights are stored: fp32, bf16, fp16, nf4, int8, ...")
    ],
    onto: Annotated[
        str | None,
        typer.Option(
            "--onto", help="original, or dequantised[:nf4]. Default: the weights that the adapter was trained on."
        ),
    ] = None,
    base: BaseName = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="The folder to write. Default: measure, and write nothing.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option("--max-error", help="The share of what was learned that may be lost. Default: 0.5."),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to measure on, beside the probes; may be repeated.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="What the logits are computed in: float32 shows the merge's error alone.")
    ] = "float32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and measure the error."""
    from manylora.adapters.adapter import Adapter
    from manylora.adapters.merge import merge as merge_into
    from manylora.adapters.merge.storage import storage_of
    from manylora.base.load import load_base
    from manylora.files import refuse_occupied

    storage_of(into)
    if output is not None:
        refuse_occupied(output)
    loaded = Adapter.load(adapter)
    name = base or loaded.base_name
    if not name:
        raise UserError(
            "the adapter does not say which base it was trained on",
            next_step="give it: --base builtin:tiny-en, a folder, or a hub id",
        )
    template = adapter / "chat_template.jinja"
    quantize = _quantize(adapter, onto)
    opened = load_base(
        name, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        chat_template=template if template.is_file() else None, **({"quantize": quantize} if quantize else {}),
    )  # fmt: skip
    for text in opened.notes:
        note(text)
    out = Output(as_json)
    try:
        report = merge_into(
            opened, loaded, into, onto=onto, output=output, max_error=max_error, probes=_rows(data, opened)
        )
    except MergeRefused as error:
        if error.report is not None:
            show_report(out, error.report)
            out.finish({"adapter": str(adapter)} | error.report.to_dict())
        raise
    show_report(out, report)
    out.line(f"\nwritten to {output}" if output is not None else "\nnothing was written: give --output DIR")
    out.finish({"adapter": str(adapter)} | report.to_dict())


def _quantize(adapter: Path, onto: str | None) -> str | None:
    """The packing of the base that is merged onto: as asked, else as the adapter's own configuration says."""
    asked, _, wanted = (onto or "").partition(":")
    if asked == "original":
        return None
    if wanted:
        from manylora.quant import PACKINGS

        return PACKINGS.check(wanted)
    config = adapter / "config.yaml"
    if not config.is_file():
        return None
    import yaml

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    trained_on = settings.get("quantize") if isinstance(settings, dict) else None
    if trained_on:
        note(f"onto dequantised {trained_on} weights: {config} says that the adapter was trained on them")
    return trained_on


def _rows(data: list[str] | None, base: Any) -> list[list[int]]:
    """The tokens of the rows of data, as training shows them."""
    if not data:
        return []
    from manylora.config import DataPlace
    from manylora.data.examples import Reading
    from manylora.data.load import load_examples
    from manylora.tasks.data import open_places

    places = tuple(DataPlace(path=path) for path in data)
    reading = Reading(max_length=base.max_positions or 1 << 20)
    loaded = load_examples(open_places(places, {}), base.tokenizer, reading, eos_ids=base.eos_ids)
    return [example.tokens.tolist() for example in loaded.examples]


def show_report(output: Output, report: MergeReport) -> None:
    """Print what a merge costs: the logits, then the sites, worst first."""
    from manylora.adapters.merge.report import facts

    lines = facts(report)
    width = max(map(len, lines))
    for name, value in lines.items():
        output.line(f"{name:<{width}}  {value}")
    for text in (*report.notes, *(f"untied: {name}" for name in report.untied)):
        output.line(f"{'note':<{width}}  {text}")
    output.line()
    shown = report.sites[:SHOWN_SITES]
    rows = [(site.site, site.error, site.survives, site.size) for site in shown]
    output.table(("site, worst first", "error / delta", "delta kept", "delta / weight"), rows)
    if len(report.sites) > len(shown):
        output.line(f"and {len(report.sites) - len(shown)} more, all with a smaller error")
