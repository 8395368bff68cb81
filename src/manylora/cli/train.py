"""`manylora train`: one adapter on one frozen base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manylora.cli.opened import Overrides, Resume, UseCache
from manylora.cli.output import AsJson, Output
from manylora.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manylora.sweeps.find_rate import Found


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file; also the config.yaml of a run.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    resume: Resume = False,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="First try several learning rates for a few steps, and take the best.")
    ] = False,
    use_cache: UseCache = True,
    keys: Annotated[bool, typer.Option("--keys", help="List every key, its default and its meaning.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter.

    CONFIG says on what and how (--keys lists all keys); the run folder holds adapter, report and checkpoints.
    """
    output = Output(as_json)
    if keys:
        list_keys(output)
        return
    if config is None:
        raise ConfigError(
            "no configuration is given",
            next_step="manylora train CONFIG.yaml; `manylora demo` writes one to start from",
        )
    from manylora.config import load_config
    from manylora.runs.console import Progress
    from manylora.training.run import train as run_training

    made, found = load_config(config, overrides or ()), {}
    if find_lr:
        from manylora.sweeps.board import Board
        from manylora.sweeps.find_rate import find_rate

        made, rates = find_rate(made, resume=resume, board=Board(), use_cache=use_cache)
        show_rates(output, rates)
        found = {"find_lr": rates.to_dict()}
    result = run_training(made, resume=resume, console=Progress(), use_cache=use_cache)
    show_summary(output, result.run, result.summary)
    output.finish(result.summary | found)


def show_rates(output: Output, found: Found) -> None:
    """Print the learning rates that were tried, and the chosen one with its reason."""
    marks = {found.rate: "chosen"}
    rows = [(f"{rate:g}", loss, marks.get(rate, "")) for rate, loss in found.losses.items()]
    output.table(("learning rate", "eval loss", ""), rows)
    output.line(f"{found.reason}\n")


def list_keys(output: Output) -> None:
    """Print every key of a configuration."""
    from manylora.config import describe_keys

    keys = describe_keys()
    output.table(("key", "default", "meaning"), keys)
    output.finish({key: {"default": default, "meaning": meaning} for key, default, meaning in keys})


def show_summary(output: Output, run: Path, summary: Mapping) -> None:
    """Print what a run reached, and where things are."""
    scores = {"base": summary.get("base_eval") or {}, "adapter": summary.get("eval") or {}}
    show_scores(output, scores, summary.get("footnotes"))
    output.line(
        f"trained {summary['trainable_parameters']:,} parameters on {summary['tokens']:,} tokens"
        f" in {summary['wall_s']:.1f} s"
    )
    for name, folder in summary["adapters"].items():
        output.line(f"adapter {name}: {folder}")
    output.line(f"report: {run / 'report.html'}")


def show_scores(
    output: Output, scores: Mapping[str, Mapping[str, float]], footnotes: Mapping[str, str] | None = None
) -> None:
    """Print metrics, one line each, side by side, and what they are exactly; nothing where there are none."""
    names = list(dict.fromkeys(metric for column in scores.values() for metric in column))
    if names:
        output.table(("", *scores), [(name, *(column.get(name) for column in scores.values())) for name in names])
    for name, text in (footnotes or {}).items():
        output.line(f"{name}: {text}")
