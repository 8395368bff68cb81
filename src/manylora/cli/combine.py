"""`manylora combine`: one adapter out of several."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from manylora.cli.opened import Device, TrustRemoteCode
from manylora.cli.output import AsJson, Output
from manylora.errors import UserError

SHOWN_SITES = 8


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="The adapters' folders, two or more.")],
    output: Annotated[Path, typer.Option("--output", help="The folder to write.")],
    method: Annotated[
        str, typer.Option("--method", help="linear (exact, ranks add up), svd, ties, dare or magnitude.")
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W,...", help="One for each adapter. Default: equal, sum 1.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of the result. Default: the largest among the adapters.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries kept by ties, dare, magnitude. Default: 0.2.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of what dare drops. Default: 0.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base of all adapters; needed where one holds whole copies of sites."),
    ] = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Combine several adapters into one."""
    from manylora.adapters.adapter import Adapter
    from manylora.adapters.combine.combined import combine as combine_adapters
    from manylora.adapters.combine.combined import needs_base
    from manylora.base.load import load_base
    from manylora.files import refuse_occupied

    refuse_occupied(output)
    loaded = [Adapter.load(folder) for folder in adapters]
    name = base
    if name is None and needs_base(loaded):
        name = loaded[0].base_name or None
    template = adapters[0] / "chat_template.jinja"
    opened = None
    if name is not None:
        opened = load_base(
            name, dtype="float32", device=device, trust_remote_code=trust_remote_code,
            chat_template=template if template.is_file() else None,
        )  # fmt: skip
    made = combine_adapters(
        loaded, method, weights=_numbers(weights), rank=rank, density=density, seed=seed, base=opened
    )
    made.adapter.save(output, opened)
    out = Output(as_json)
    worst = sorted(made.sites, key=lambda site: site.lost, reverse=True)
    shown = worst[:SHOWN_SITES]
    out.line(f"{len(adapters)} adapters combined by {method}: {len(made.sites)} sites, written to {output}")
    out.table(("site, worst first", "rank", "lost / combined delta"), [(s.site, s.rank, s.lost) for s in shown])
    if len(worst) > len(shown):
        out.line(f"and {len(worst) - len(shown)} more, none loses more")
    out.finish({
        "adapter": str(output), "method": method, "parameters": made.adapter.num_parameters(),
        "sites": [asdict(site) for site in made.sites],
    })  # fmt: skip


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--weights is {text!r}", allowed="numbers with commas between them: 0.7,0.3") from error
