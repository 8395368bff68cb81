"""A sweep from its configuration to its winner: what `manylora sweep` and Python code call."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from typing import Any

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.config import Config, StopConfig
from manylora.errors import ConfigError, NonFiniteLoss
from manylora.files import write_folder_atomic, write_json_atomic
from manylora.memory.device import peak_bytes
from manylora.runs.folder import RunFolder
from manylora.sweeps.board import Board
from manylora.sweeps.director import Director
from manylora.sweeps.engines import ENGINES
from manylora.sweeps.ledger import Ledger
from manylora.sweeps.pages.report import write_report
from manylora.sweeps.search import Search
from manylora.sweeps.space import parse_space
from manylora.sweeps.stopping import RULES, settings_of
from manylora.sweeps.trials import Trials, levels_of
from manylora.training.checkpointing import Checkpointing
from manylora.training.compiling import check_compiles
from manylora.training.fitting import asked
from manylora.training.prepare import Stock
from manylora.training.run import Result, compare

BEST = "best"
"""The folder of the winner beside those of all members."""
DEFAULT_TRIALS = 16
LIKELY = 16
"""Trials whose configurations are looked at before the first begins: how large a member gets."""
LONG_DECAYS = ("cosine", "linear", "polynomial")
"""Schedules whose rate falls from the start, so that a trial judged early is judged far above its last rate."""


def sweep(
    config: Config,
    *,
    resume: bool = False,
    board: Board | None = None,
    objects: Mapping[str, Any] | None = None,
    use_cache: bool = True,
) -> Result:
    """Train the members of a search over one base, and leave a complete run folder with the winner in `adapters/best`.

    `objects` are the base and data sets that the configuration names `python:NAME`. With `resume`, an unfinished sweep
    of the same configuration goes on from its last checkpoint, and a finished one is returned as it is.

    Raises:
        UserError: the configuration, the base or the data cannot be used; nothing has been written then.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    if config.sweep is None:
        raise ConfigError(
            "this configuration has no section sweep",
            next_step="add sweep: {space: {train.learning_rate: {low: 1e-5, high: 1e-2, log: true}}}",
        )
    board = board or Board(quiet=True)
    config, notes = settled(config)
    assert config.sweep is not None
    space = parse_space(config.sweep.space)
    trials = Trials(config, space)
    folder = RunFolder(config.output)
    finished = folder.open(config, resume)
    if finished is not None:
        board.note(f"{folder.path} is finished")
        return Result(folder.path, finished)
    stock = Stock(trials.base, objects=objects, use_cache=use_cache)
    folder.check_ground(stock.base, stock.facts)
    if not stock.data(trials.base).held_out:
        raise ConfigError(
            "a sweep compares its trials on held-out rows, and there are none",
            next_step="give data.eval, data.eval_fraction or sweep.folds",
        )
    trials.check(stock.check)
    full_tokens, full_steps = stock.length(trials.base)
    began = time.perf_counter()
    num_trials = config.sweep.trials or (None if config.sweep.search == "grid" else DEFAULT_TRIALS)
    told = {"seed": config.sweep.seed, "num_trials": num_trials, "study_name": folder.path.name}
    stop = config.sweep.stop
    defaults = StopConfig()
    given = {name: getattr(stop, name) for name in type(stop).model_fields if name != "rule"}
    settings = settings_of(stop.rule, {name: own for name, own in given.items() if own != getattr(defaults, name)})
    # Judged before anything is written: a space or a budget that cannot be searched.
    rehearsed = Search(config.sweep.search, space, storage=None, **told)
    rule = RULES.get(stop.rule)(rehearsed.num_trials, settings)
    trials.levels = levels_of(rule.shares, full_tokens, full_steps)
    proposed = (rehearsed.propose(number) for number in range(min(LIKELY, rehearsed.num_trials)))
    likely = trials.possible(proposed, stock.check)
    engine = ENGINES.get(config.sweep.engine)
    engine.check(config)
    layers = asked(config.train)  # refused where the base has none
    Checkpointing(stock.base, layers.mode)
    if layers.compiled:
        check_compiles(stock.base)
    for note in (*stock.new_notes(), *notes):
        board.note(note)
    folder.begin(config)
    folder.write_manifest(stock.base, stock.facts)
    search = Search(config.sweep.search, space, storage=folder.path / "optuna.log", **told)
    director = Director(trials, search, rule)
    ledger = Ledger(config.sweep, folder.path, director, search, board, levels=trials.levels, full_tokens=full_tokens)
    for note in ledger.headlines():
        board.note(note)
    try:
        engine.run(config, stock, folder, director, ledger, likely=likely, resume=resume)
        board.show(director.entries())  # those that ended last
    finally:
        board.close()
    return Result(folder.path, _finish(stock, folder, director, ledger, time.perf_counter() - began, board))


def settled(config: Config) -> tuple[Config, list[str]]:
    """The configuration with what a sweep decides by itself written out, and why, for the log."""
    if config.sweep is None or config.sweep.stop.rule == "none":
        return config, []
    if "train.schedule" in config.sweep.space:
        return config, []
    schedule = config.train.schedule
    if "schedule" not in config.train.model_fields_set:
        train = config.train.model_copy(update={"schedule": "wsd"})
        why = (
            f"train.schedule is wsd: trials that {config.sweep.stop.rule} judges early have then trained at their full "
            "rate, and those that go on still decay at their end"
        )
        return config.model_copy(update={"train": train}), [why]
    if schedule in LONG_DECAYS:
        why = (
            f"train.schedule is {schedule}: each trial keeps its full-length schedule, and those judged early are "
            "judged far above their last rate; wsd compares them more fairly"
        )
        return config, [why]
    return config, []


def _finish(
    stock: Stock, folder: RunFolder, director: Director, ledger: Ledger, wall: float, board: Board
) -> dict[str, Any]:
    """Copy the winner, measure it and the base on the held-out rows, and write leaderboard, summary and report."""
    best = director.best()
    if best is None:
        reason = next((entry.reason for entry in director.entries() if entry.reason), "no held-out loss was finite")
        raise NonFiniteLoss(
            f"none of {len(director.entries())} trials has an eval loss; the first: {reason}",
            next_step="lower the learning rates of sweep.space, or look at events.jsonl",
        )
    path, config = folder.adapter(BEST), director.config(best.member)
    with write_folder_atomic(path) as partial:
        shutil.copytree(folder.adapter(best.member), partial, dirs_exist_ok=True)
    board.note(f"evaluating the base and {best.member} on the held-out rows")
    adapter = Adapter.load(path)
    with Bank(stock.base, num_slots=stock.slots_per_member) as bank:
        scores = compare(config, stock, adapter, folder, best.member, bank, range(bank.num_slots))
    told = ledger.write(winner=best)
    summary = {
        "run": str(folder.path),
        "adapters": {BEST: str(path)}
        | {name: str(folder.adapter(name)) for name in director.members if folder.adapter(name).is_dir()},
        "winner": best.to_dict(),
        "eval": scores["adapter"],
        "base_eval": scores["base"],
        "footnotes": scores["footnotes"],
        "trials": len(director.trials),
        "tokens": told["tokens"],
        "full_tokens": told["full_tokens"],
        "tokens_per_s": ledger.trained_tokens / wall if wall > 0 else 0.0,
        "wall_s": wall,
        "peak_bytes": peak_bytes(stock.base.device),
        "trainable_parameters": adapter.num_parameters(),
        "base_parameters": stock.base.num_parameters(),
    }
    write_json_atomic(folder.path / "summary.json", summary)
    write_report(folder.path)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return summary
