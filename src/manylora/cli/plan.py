"""`manylora plan`: what a run will hold in memory and how long its steps take, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.opened import Overrides
from manylora.cli.output import AsJson, Output

if TYPE_CHECKING:
    from manylora.planning.advice import Change
    from manylora.planning.planner import Plan


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file; also the config.yaml of a run.", show_default=False)],
    overrides: Overrides = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="KIND:SIZE", help="Plan for cuda:80GB, h100, cpu:16GB, ... Default: here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will hold, and how long a step takes.

    Memory comes by category, and where it does not fit, with settings that do. CONFIG is that of `train` or `sweep`. No
    weight is read, and nothing is trained or written.
    """
    from manylora.config import load_config
    from manylora.planning.advice import changes
    from manylora.planning.devices import parse_device
    from manylora.planning.planner import Planner
    from manylora.sweeps.room import planned_fleet

    output = Output(as_json)
    where = None if device is None else parse_device(device)
    made = load_config(config, overrides or ())
    if made.sweep is None:
        planner = Planner(made, where)
        found, reason = planner.plan(made), ""
    else:
        planner, made, found, reason = planned_fleet(made, where)
    ways, smallest = ([], found) if found.fits else changes(planner, made, found, members=found.members)
    show_plan(output, found, reason)
    if not found.fits:
        show_changes(output, found, ways, smallest)
    output.finish(found.to_dict() | {"reason": reason, "changes": [_change(way) for way in ways]})


def show_plan(output: Output, found: Plan, reason: str) -> None:
    """Print the categories, the peaks of the run's phases, the time of a step, and whether it fits."""
    share = max(1, found.total_bytes)
    rows = [(name, size(count), f"{count / share:.0%}") for name, count in found.categories.items() if count]
    output.table((f"at the peak ({found.phase})", "memory", ""), [*rows, ("in all", size(found.total_bytes), "")])
    output.line("peaks of the run: " + ", ".join(f"{name} {size(count)}" for name, count in found.phases.items()))
    output.line(f"layers keep for the backward: train.checkpointing {found.checkpointing}")
    if reason:
        output.line(reason)
    tera = found.flops_per_step / 1e12
    if found.seconds_per_step is None:
        output.line(
            f"a step: {found.tokens_per_step:,} tokens, {tera:.3g} TFLOP of products; how fast {found.device.name} "
            "computes is not known: name it for an estimate, as in --device h100"
        )
    else:
        output.line(
            f"a step: about {found.seconds_per_step:.2g} s for {found.tokens_per_step:,} tokens, {tera:.3g} TFLOP "
            f"of products ({found.device.source})"
        )
    for text in found.notes:
        output.line(text)
    free = size(found.device.free_bytes)
    verdict = f"it fits: {free} are free" if found.fits else f"it does not fit: {free} are free"
    output.line(f"{verdict} on {found.device.name}")


def show_changes(output: Output, found: Plan, ways: list[Change], smallest: Plan) -> None:
    """Print the settings with which it fits."""
    for way in ways:
        settings = " ".join(f"--set {key}={value}" for key, value in way.settings.items())
        output.line(f"  fits with {settings}: {size(way.plan.total_bytes)} ({way.cost})")
    if not ways:
        output.line(
            f"  nothing that was tried fits; the least was {size(smallest.total_bytes)}: "
            "choose a smaller base or a device with more memory"
        )


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _change(way: Change) -> dict[str, Any]:
    return {"set": dict(way.settings), "peak_bytes": way.plan.total_bytes, "cost": way.cost}
