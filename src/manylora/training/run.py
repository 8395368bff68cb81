"""A run from its configuration to its summary: `train` is what the command, the demo and Python code call."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.errors import ConfigError
from manylora.evaluation.evaluate import evaluate_losses
from manylora.files import write_json_atomic, write_text_atomic
from manylora.memory.allocator import freed_memory_kept
from manylora.memory.device import peak_bytes
from manylora.objectives.forward import Aim
from manylora.pages.run import write_report
from manylora.runs.console import Progress
from manylora.runs.events import EventLog
from manylora.runs.folder import RunFolder
from manylora.runs.trackers import Trackers
from manylora.tasks.task import Answer
from manylora.training.checkpoint import Checkpoints
from manylora.training.checkpointing import checkpointed
from manylora.training.compiling import choose_compiling, compiled
from manylora.training.expected import expected
from manylora.training.fitting import Fit, asked, fit, keep_fit, kept_fit, modes_with
from manylora.training.loop import Hand, Loop, LoopSettings, Make, Recorder
from manylora.training.member import Member, follower_start, kept_spec
from manylora.training.orders import Given, Source
from manylora.training.prepare import Stock

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel
    from manylora.config import Config

MEMBER = "main"
"""The name of the only member of a run that is no sweep."""


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run lies and what its `summary.json` holds."""

    run: Path
    summary: dict[str, Any]


class RunRecorder:
    """Sends what the loop says to `events.jsonl`, the trackers and the console."""

    def __init__(self, log: EventLog, trackers: Trackers, console: Progress, total_steps: int):
        self._log, self._trackers, self._console = log, trackers, console
        self._total_steps = total_steps
        self._counting = False

    def event(self, name: str, **fields: Any) -> None:
        self._log.write(name, **fields)
        if name == "step":
            if not self._counting:  # from where a resumed run goes on
                self._counting = True
                self._console.start(self._total_steps, done=fields["step"] - 1)
            self._console.step(
                fields["step"],
                loss=fields["loss"],
                learning_rate=fields["learning_rate"],
                tokens_per_s=fields["tokens_per_s"],
            )
        if name == "eval":
            numbers = {key: value for key, value in fields.items() if isinstance(value, float) and key != "loss"}
            others = "".join(f"  {key} {value:.4g}" for key, value in numbers.items())
            self._console.note(f"step {fields['step']}  eval loss {fields['loss']:.4f}{others}")
        self._trackers.event(name, fields)

    def note(self, text: str) -> None:
        self._console.note(text)

    def stage(self, text: str) -> None:
        self._console.stage(text)


def train(
    config: Config,
    *,
    resume: bool = False,
    console: Progress | None = None,
    objects: Mapping[str, Any] | None = None,
    use_cache: bool = True,
) -> Result:
    """Train one member and leave a complete run folder.

    `objects` are the base and data sets that the configuration names `python:NAME`; `use_cache` takes examples that
    were encoded before. With `resume`, an unfinished run of the same configuration goes on from its last checkpoint
    (from the start where there is none), and a finished one is returned as it is.

    Raises:
        UserError: the configuration, the base or the data cannot be used; nothing has been written then.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
    """
    if config.sweep is not None:
        raise ConfigError(
            "this configuration is a sweep: it has the section sweep",
            next_step="manylora sweep CONFIG.yaml, or leave the section out with --set sweep=null",
        )
    console = console or Progress(quiet=True)
    folder = RunFolder(config.output)
    finished = folder.open(config, resume)
    if finished is not None:
        console.note(f"{folder.path} is finished")
        return Result(folder.path, finished)
    stock = Stock(config, objects=objects, use_cache=use_cache)
    folder.check_ground(stock.base, stock.facts)
    kept = Checkpoints(folder.checkpoints, config.checkpoint.keep).read() if resume else None
    progress = None if kept is None else (kept.running | kept.ended).get(MEMBER)
    made = stock.member(config, MEMBER, shape=None if progress is None else kept_spec(progress))
    chosen = kept_fit(folder.checkpoints) if resume else None
    if chosen is None:
        asks = config.train
        chosen = fit(stock.base, *made, asks.checkpointing, modes=modes_with(asks.compile == "layers"))
        compiles, why = choose_compiling(stock.base, *made, asks.compile, chosen.mode, chosen.budget_tokens)
        chosen = replace(chosen, compiled=compiles)
    else:
        why = f"compile: {'layers' if chosen.compiled else 'off'}, as this run began"
    foreseen = expected(stock.base, chosen.coming_bytes, num_steps=made[0].recipe.last_step)
    for note in (*stock.new_notes(), chosen.reason, why, foreseen.line()):
        console.note(note)
    folder.begin(config)
    folder.write_manifest(stock.base, stock.facts)
    keep_fit(chosen, folder.checkpoints)
    began = time.perf_counter()

    member = made[0]
    with Bank(stock.base, num_slots=member.num_slots) as bank:
        slots = range(bank.num_slots)
        try:
            loop = run_loop(
                stock,
                folder,
                Given([MEMBER]),
                lambda name, shape: made,
                lambda log, trackers: RunRecorder(log, trackers, console, member.recipe.last_step),
                bank=bank,
                slots=slots,
                resume=resume,
                hand=lambda member, adapter: save_member(config, adapter, folder.adapter(member.name), stock.base),
                budget_tokens=chosen.budget_tokens,
                chosen=chosen,
            )
        finally:
            console.close()
        measured = _measured(member, loop, config, time.perf_counter() - began, foreseen.peak_bytes, console)
        summary = _finish(config, folder, stock, member, measured, console, bank, slots)
    return Result(folder.path, summary)


def _measured(
    member: Member, loop: Loop, config: Config, wall: float, expected_peak_bytes: int | None, console: Progress
) -> dict[str, Any]:
    """What this process took to train a member to its end; the member is brought to that end where it lies behind."""
    if member.name in loop.ended:
        member.restore(loop.ended[member.name])
    kept = config.checkpoint.select == "eval_loss" and member.best_step
    if kept and member.best_step != member.step:
        console.note(
            f"the state of step {member.best_step} is kept: it has the lowest eval loss, {member.best_loss:.4f}"
        )
    trained = member.tokens - loop.tokens_before
    return {
        "tokens_per_s": trained / wall if wall > 0 else 0.0,
        "wall_s": wall,
        "expected_peak_bytes": expected_peak_bytes,
    }


def run_loop(
    stock: Stock,
    folder: RunFolder,
    source: Source,
    make: Make,
    recorder: Callable[[EventLog, Trackers], Recorder],
    *,
    bank: Bank,
    slots: Sequence[int],
    hand: Hand,
    resume: bool = False,
    budget_tokens: int | None = None,
    resident_bytes: int | None = None,
    chosen: Fit | None = None,
) -> Loop:
    """Train the members of a source in a run's folder until all have ended, and give the loop back.

    They are put into `slots` of the bank; whatever its other slots hold is left alone. `chosen` is what was found to
    fit, None: what the configuration asks for, or as little as it must be.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written. UserError: see `Loop`.
    """
    config = stock.config
    chosen = chosen or asked(config.train)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    kept = config.checkpoint
    settings = LoopSettings(
        checkpoint_every=kept.every_steps, select=kept.select, budget_tokens=budget_tokens,
        resident_bytes=resident_bytes, strengthens=chosen.may_change, probes=chosen.probes,
    )  # fmt: skip
    done = checkpoints.last() if resume else None
    told: Recorder | None = None
    early: list[str] = []  # said before there is anyone to tell

    def note(text: str) -> None:
        early.append(text) if told is None else told.note(text)

    with (
        EventLog(folder.path) as log,
        compiled(stock.base, chosen.compiled) as compiling,
        checkpointed(stock.base, chosen.mode, chosen.modes) as checkpointing,
        freed_memory_kept(),
    ):
        if resume:
            log.truncate_after(done or 0)
            note("no checkpoint yet: begins at step 0" if done is None else f"resumes at step {done}")
        resume_step = (done or 0) if resume else None
        trackers = Trackers(config.track, folder.path, config.to_dict(), note=note, resume_step=resume_step)
        told = recorder(log, trackers)
        for line in early:
            told.note(line)
        loop = Loop(
            bank,
            slots,
            source,
            make,
            told,
            checkpoints=checkpoints,
            settings=settings,
            hand=hand,
            checkpointing=checkpointing,
        )
        try:
            if done is not None:
                loop.resume()
            else:
                how = {"mode": chosen.mode, "budget_tokens": budget_tokens, "compiled": chosen.compiled}
                told.event("checkpointing", **how, tick=0)
            with interruptible() as interrupted:
                loop.run(interrupted)
            if compiling is not None and compiling.seconds >= 1:
                told.note(f"compiling layers took {compiling.seconds:.0f} s of the steps")
        except KeyboardInterrupt:
            told.note(f"interrupted at step {loop.tick}; --resume goes on from step {loop.saved_at or 0}")
            raise
        finally:
            trackers.close()
    return loop


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C (or SIGTERM) only makes the yielded function say true; the second stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finish(
    config: Config,
    folder: RunFolder,
    stock: Stock,
    member: Member,
    measured: Mapping[str, Any],
    console: Progress,
    bank: Bank,
    slots: Sequence[int],
) -> dict[str, Any]:
    """Measure base and adapter on the held-out rows, and write summary and report; `measured` is of this process."""
    base, path = stock.base, folder.adapter(member.name)
    adapter = Adapter.load(path)
    scores: dict[str, dict[str, Any]] = {}
    if member.eval_examples:
        console.note("evaluating base and adapter on the held-out rows")
        scores = compare(config, stock, adapter, folder, member.name, bank, slots)
    else:
        write_text_atomic(folder.path / "samples.jsonl", "")
    summary = {
        "run": str(folder.path),
        "adapters": {member.name: str(path)},
        "eval": scores.get("adapter", {}),
        "base_eval": scores.get("base", {}),
        "footnotes": scores.get("footnotes", {}),
        "state": member.state,
        "steps": member.step,
        "best_step": member.best_step or member.step,
        "tokens": member.tokens,
        **measured,
        "peak_bytes": peak_bytes(base.device),
        "trainable_parameters": adapter.num_parameters(),
        "base_parameters": base.num_parameters(),
    }
    write_json_atomic(folder.path / "summary.json", summary)
    write_report(folder.path)
    return summary


def save_member(config: Config, adapter: Adapter, path: Path, base: FrozenModel) -> None:
    """Write the adapter's folder with the configuration that trains it alone; one that lies there already is the same.

    A resumed run ends a member a second time when it was stopped between that end and its next checkpoint.
    """
    if (path / "config.yaml").exists():
        return
    if path.exists():
        shutil.rmtree(path)  # of this very run, which was killed while it wrote
    adapter.save(path, base)
    alone = config.model_copy(update={"output": config.output.with_name(config.output.name + "-again")})
    write_text_atomic(path / "config.yaml", alone.to_yaml())


def compare(
    config: Config, stock: Stock, adapter: Adapter, folder: RunFolder, member: str, bank: Bank, slots: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Scores of a configuration's held-out rows for `base` and `adapter`; what each writes goes to samples.jsonl.

    `footnotes` say by metric what it is exactly. A score that is no finite number is left out.
    The adapter is put into the first of `slots`, its objective's followers into the next ones, as they were at the
    start: what a folder of an adapter does not hold has no part in its scores. The slots are empty afterwards.
    """
    base, objective = stock.base, stock.objective(config)
    held_out, row_tokens = stock.data(config).held_out, stock.row_tokens(config)
    for slot in slots:
        bank.clear(slot)
    bank.put(adapter, slot=slots[0])
    started = dict(zip(objective.followers, slots[1:], strict=False))
    for name, slot in started.items():
        bank.put(follower_start(objective.followers[name], stock.start(config)), slot=slot)
    scores: dict[str, dict[str, Any]] = {}
    footnotes: Mapping[str, str] = {}
    written: dict[str, Sequence[Answer]] = {}
    asked = {"adapter": slots[0]} if base.lacking else {"base": -1, "adapter": slots[0]}
    for who, slot in asked.items():
        (scores[who],) = evaluate_losses(
            base,
            held_out,
            {slot: Aim(objective, started, objective.begin())},
            row_tokens=row_tokens,
            rows_per_batch=config.train.rows_per_step,
        )
        scored = stock.task(config).score(base, held_out, config, slot=slot)
        scores[who] |= {name: value for name, value in scored.metrics.items() if math.isfinite(value)}
        footnotes = scored.footnotes or footnotes
        written[who] = scored.answers[: config.evaluate.samples]
    told = scores["adapter"].keys()
    scores["footnotes"] = {name: text for name, text in footnotes.items() if name in told}
    for slot in slots:
        bank.clear(slot)
    samples = [
        {**own.asked, **({} if base.lacking else {"base": bare.given}), "adapter": own.given, "member": member}
        for bare, own in zip(written.get("base", written["adapter"]), written["adapter"], strict=True)
    ]
    write_text_atomic(folder.path / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    return scores
