"""`manylora sweep`: many members over one base, and the best of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.opened import Overrides, Resume, UseCache
from manylora.cli.output import AsJson, Output
from manylora.cli.train import show_scores

if TYPE_CHECKING:
    from collections.abc import Mapping


def sweep(
    config: Annotated[Path, typer.Argument(help="A YAML file with a section sweep.", show_default=False)],
    overrides: Overrides = None,
    resume: Resume = False,
    concurrent: Annotated[
        str | None,
        typer.Option("--concurrent", metavar="N|auto", help="Members that train at once; as --set sweep.concurrent=N."),
    ] = None,
    use_cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Train many adapters at once and keep the best.

    The section sweep of CONFIG says what varies; `manylora train --keys` lists its keys. The run folder holds every
    member's adapter, the leaderboard, a report, and the winner in adapters/best.
    """
    from manylora.config import load_config
    from manylora.sweeps.board import Board
    from manylora.sweeps.run import sweep as run_sweep

    output = Output(as_json)
    asked = [*(overrides or ()), *([] if concurrent is None else [f"sweep.concurrent={concurrent}"])]
    result = run_sweep(load_config(config, asked), resume=resume, board=Board(), use_cache=use_cache)
    show_sweep(output, result.run, result.summary)
    output.finish(result.summary)


def show_sweep(output: Output, run: Path, summary: Mapping) -> None:
    """Print the leaderboard, what the winner reached, and where things are."""
    from manylora.sweeps.leaderboard import Entry, table_lines, values_text
    from manylora.sweeps.ledger import SWEEP_FILE, tokens_saved

    told = json.loads((run / SWEEP_FILE).read_text(encoding="utf-8"))
    for line in table_lines([Entry.from_dict(entry) for entry in told["entries"]]):
        output.line(line)
    winner = Entry.from_dict(summary["winner"])
    output.line(f"\nbest: trial {winner.trial} ({values_text(winner)})")
    scores = {"base": summary.get("base_eval") or {}, "adapter": summary.get("eval") or {}}
    show_scores(output, scores, summary.get("footnotes"))
    saved = f"; stopping early saved {tokens_saved(told):.0%}" if told["stop"] != "none" else ""
    output.line(f"trained {summary['tokens']:,} tokens in {summary['wall_s']:.1f} s{saved}")
    output.line(f"adapter best: {summary['adapters']['best']}")
    output.line(f"leaderboard: {run / 'leaderboard.csv'}")
    output.line(f"report: {run / 'report.html'}")
