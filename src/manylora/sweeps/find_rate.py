"""A learning rate by trial: a fleet of rates on a short budget, and the one with the lowest loss on held-out rows."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.config import Config, load_config
from manylora.errors import ConfigError, OutputExists
from manylora.runs.folder import RunFolder
from manylora.sweeps.board import Board
from manylora.sweeps.leaderboard import Entry, finite
from manylora.sweeps.ledger import SWEEP_FILE
from manylora.sweeps.run import sweep
from manylora.tasks.data import held_out_places
from manylora.training.prepare import Stock
from manylora.training.rates import auto_rate

RATE = "train.learning_rate"
BELOW, ABOVE, AROUND = 30.0, 10.0, 9
"""From a thirtieth of the rule's rate to ten times it, at nine rates: each is about twice the one before."""
LOWEST, HIGHEST, UNGUIDED = 1e-5, 1e-2, 7
"""Where no rule holds: three decades, two rates in each."""
OF_OPTIMIZER = {"sgd": (1e-2, 1e1)}
"""Optimisers whose rates lie elsewhere. A plain gradient, clipped to norm 1, is spread over all factors."""
SHARE, LEAST_STEPS, MOST_STEPS = 0.1, 20, 60
"""Steps of a trial: a tenth of the run's, within these bounds and never more than the run has."""
CLOSE = 0.01
"""Losses this near, as a share, do not tell two rates apart; the smaller one is the safer."""
HELD_OUT = 0.05
"""Share of the training rows that is held out for the search where the run holds out none."""
MOST_ROWS = 256
"""Held-out rows that rates are compared on: more would cost more than the training."""


@dataclass(frozen=True, slots=True)
class Found:
    """The chosen rate, why, the loss of each rate that was tried, lowest rate first, and the folder of the search."""

    rate: float
    reason: str
    losses: dict[float, float | None]
    run: Path

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        tried = [{"learning_rate": rate, "eval_loss": loss} for rate, loss in self.losses.items()]
        return {"learning_rate": self.rate, "reason": self.reason, "tried": tried, "run": str(self.run)}


def find_rate(
    config: Config,
    *,
    resume: bool = False,
    board: Board | None = None,
    objects: Mapping[str, Any] | None = None,
    use_cache: bool = True,
) -> tuple[Config, Found]:
    """The configuration with the best of several learning rates, each tried for a few steps, and what was tried.

    The search is a sweep in `<output>-find-lr`. With `resume` an unfinished one goes on, and a finished one is read.

    Raises:
        OutputExists: that folder, or the run's own, holds something. UserError: see `sweep.run.sweep`.
    """
    if config.sweep is not None:
        raise ConfigError(
            "--find-lr is given, and this configuration is a sweep",
            next_step=f"add {RATE} to sweep.space, or leave the section out with --set sweep=null",
        )
    if not resume:
        RunFolder(config.output).check_free()
    folder = config.output.with_name(f"{config.output.name}-find-lr")
    if not resume and folder.exists():
        raise OutputExists(
            f"{folder} already holds a search for a learning rate",
            next_step="go on with --resume, remove the folder, or name another run with --set output=DIR",
        )
    board = board or Board(quiet=True)
    rates, steps, warmup, why = _laid_out(config, objects, use_cache)
    search = short(config, folder, rates, steps, warmup)
    board.note(f"finding a learning rate in {folder}: {len(rates)} rates for {steps} steps, {why}")
    sweep(search, resume=resume, board=board, objects=objects, use_cache=use_cache)
    told = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
    entries = [Entry.from_dict(entry) for entry in told["entries"]]
    losses = {entry.values[RATE]: finite(entry.loss) for entry in sorted(entries, key=lambda one: one.values[RATE])}
    rate, reason = choose(losses)
    train = config.train.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"train": train}), Found(rate, reason, losses, folder)


def grid(center: float | None, optimizer: str = "adamw") -> list[float]:
    """The rates that are tried, rising, around the rule's answer or, without one (None), where rates usually lie."""
    usual = (*OF_OPTIMIZER.get(optimizer, (LOWEST, HIGHEST)), UNGUIDED)
    low, high, num = (center / BELOW, center * ABOVE, AROUND) if center else usual
    return [float(f"{low * (high / low) ** (index / (num - 1)):.2g}") for index in range(num)]


def short_steps(total_steps: int) -> int:
    """How many steps of a run of `total_steps` each rate is tried for."""
    return min(total_steps, max(LEAST_STEPS, min(MOST_STEPS, math.ceil(SHARE * total_steps))))


def short(config: Config, folder: Path, rates: Sequence[float], steps: int, warmup: int) -> Config:
    """The sweep that tries some rates: the run's own settings, `steps` steps at a constant rate after `warmup`."""
    held_out = {} if held_out_places(config) or config.data.held_out else {"data.eval_fraction": HELD_OUT}
    rows = config.evaluate.max_examples
    given = {
        **held_out,
        RATE: rates[0],  # in every trial replaced by its own
        "train.steps": steps,
        "train.tokens": None,
        "train.stop_after": None,
        "train.schedule": "constant",
        "train.warmup_steps": warmup,
        "evaluate.every_steps": steps,
        "evaluate.at_tokens": [],
        "evaluate.max_examples": MOST_ROWS if rows is None else min(rows, MOST_ROWS),
        "evaluate.max_new_tokens": 1,
        "checkpoint.early_stop_patience": None,
        "output": str(folder),
        "sweep": {"space": {RATE: list(rates)}, "search": "grid"},
    }
    return load_config(config.to_dict(), given)


def choose(losses: Mapping[float, float | None]) -> tuple[float, str]:
    """The smallest rate whose loss is as good as the lowest, and one line that says so.

    Raises:
        ConfigError: no rate has a loss.
    """
    known = {rate: loss for rate, loss in sorted(losses.items()) if loss is not None}
    if not known:
        raise ConfigError(
            f"no learning rate from {min(losses):g} to {max(losses):g} gave a finite loss",
            next_step="look at the rows, or set train.learning_rate",
        )
    lowest = min(known.values())
    best = next(rate for rate, loss in known.items() if loss == lowest)
    chosen = next(rate for rate, loss in known.items() if loss <= lowest * (1 + CLOSE))
    reason = f"learning rate {chosen:g}: eval loss {known[chosen]:.4f}"
    if chosen == best:
        reason += f", the lowest of {len(losses)} rates"
    else:
        reason += f", within {CLOSE:.0%} of the lowest, {lowest:.4f} at {best:g}, and smaller"
    if chosen in (min(losses), max(losses)):
        side = "smallest" if chosen == min(losses) else "largest"
        reason += f"; it is the {side} that was tried, so a better one may lie beyond"
    return chosen, reason


def _laid_out(config: Config, objects: Mapping[str, Any] | None, use_cache: bool) -> tuple[list[float], int, int, str]:
    """(rates, steps of a trial, those of its warmup, why these rates), from the run as it would be trained."""
    plain = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": LOWEST})})
    stock = Stock(plain, objects=objects, use_cache=use_cache)
    recipe = stock.member(plain, "rate")[0].recipe
    try:
        center, why = auto_rate(
            stock.base,
            method=config.adapter.method,
            rows_per_step=recipe.rows_per_step,
            total_steps=recipe.total_steps,
            optimizer=recipe.optimizer.name,
        )
        why = f"around {why.removeprefix('learning ')}"
    except ConfigError as error:
        center, why = None, f"without a rule: {error.what}"
    # The search opens the base itself, and memory may not hold it twice.
    del stock
    gc.collect()
    steps = short_steps(recipe.total_steps)
    return grid(center, recipe.optimizer.name), steps, math.ceil(recipe.warmup * steps / recipe.total_steps), why
