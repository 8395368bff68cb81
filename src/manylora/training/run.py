"""A run from its configuration to its summary: `train` is what the command, the demo and Python code call."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.adapter import Adapter
from manylora.evaluation.evaluate import evaluate_loss, evaluate_text
from manylora.files import write_json_atomic, write_text_atomic
from manylora.objectives import OBJECTIVES
from manylora.tasks.task import Sample
from manylora.training.checkpoint import Checkpoints
from manylora.training.console import Progress
from manylora.training.events import EventLog
from manylora.training.folder import RunFolder
from manylora.training.loop import Loop, LoopSettings
from manylora.training.memory import peak_bytes
from manylora.training.prepare import Prepared, prepare
from manylora.training.report import write_report
from manylora.training.trackers import Trackers

if TYPE_CHECKING:
    from manylora.config import Config


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run lies and what its `summary.json` holds."""

    run: Path
    summary: dict[str, Any]


class RunRecorder:
    """Sends what the loop says to `events.jsonl`, the trackers and the console."""

    def __init__(self, log: EventLog, trackers: Trackers, console: Progress):
        self._log, self._trackers, self._console = log, trackers, console

    def event(self, name: str, **fields: Any) -> None:
        self._log.write(name, **fields)
        if name == "step":
            self._console.step(
                fields["step"],
                loss=fields["loss"],
                learning_rate=fields["learning_rate"],
                tokens_per_s=fields["tokens_per_s"],
            )
        if name == "eval":
            loss, perplexity = fields["loss"], fields["perplexity"]
            self._console.note(f"step {fields['step']}  eval loss {loss:.4f}  perplexity {perplexity:.2f}")
        if name in ("step", "eval"):
            prefix = "" if name == "step" else "eval_"
            numbers = {
                prefix + key: value
                for key, value in fields.items()
                if key not in ("member", "step") and isinstance(value, int | float)
            }
            self._trackers.log(fields["member"], fields["step"], numbers)

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
    console = console or Progress(quiet=True)
    folder = RunFolder(config.output)
    if resume:
        folder.check_resumable(config)
        summary = folder.finished()
        if summary is not None:
            console.note(f"{folder.path} is finished")
            return Result(folder.path, summary)
    else:
        folder.check_free()
    prepared = prepare(config, objects=objects, use_cache=use_cache)
    try:
        for note in prepared.notes:
            console.note(note)
        folder.begin(config)
        return _run(config, folder, prepared, resume, console)
    finally:
        prepared.bank.close()


def _run(config: Config, folder: RunFolder, prepared: Prepared, resume: bool, console: Progress) -> Result:
    base, member = prepared.base, prepared.member
    folder.write_manifest(base, prepared.data)
    objective = OBJECTIVES.get(prepared.task.objective)
    settings = LoopSettings(checkpoint_every=config.checkpoint.every_steps, select=config.checkpoint.select)
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint.keep)
    done = checkpoints.last() if resume else None
    with EventLog(folder.path) as log:
        if resume:
            log.truncate_after(done or 0)
            console.note(f"resumes at step {done}" if done else "no checkpoint yet: begins at step 0")
        resume_step = (done or 0) if resume else None
        trackers = Trackers(config.track, folder.path, config.to_dict(), note=console.note, resume_step=resume_step)
        loop = Loop(base, objective, [member], RunRecorder(log, trackers, console), checkpoints, settings)
        if done:
            loop.resume()
        started = time.perf_counter()
        console.start(member.recipe.total_steps, done=member.step)
        try:
            with interruptible() as interrupted:
                loop.run(interrupted)
        except KeyboardInterrupt:
            console.note(f"interrupted at step {loop.tick}; --resume goes on from step {loop.saved_at or 0}")
            raise
        finally:
            console.close()
            trackers.close()
        wall = time.perf_counter() - started
        summary = _finish(config, folder, prepared, loop, wall, console)
    return Result(folder.path, summary)


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
    config: Config, folder: RunFolder, prepared: Prepared, loop: Loop, wall: float, console: Progress
) -> dict[str, Any]:
    """Choose the state, measure base and adapter on the held-out rows, and write adapter, summary and report."""
    base, bank, member = prepared.base, prepared.bank, prepared.member
    adapter = bank.get(member.slot)
    if member.name in loop.best:
        adapter = replace(adapter, factors=loop.best[member.name])
        bank.put(adapter, slot=member.slot)
        if member.best_step != member.step:
            console.note(
                f"the state of step {member.best_step} is kept: it has the lowest eval loss, {member.best_loss:.4f}"
            )
    path = folder.adapter(member.name)
    if not path.exists():
        save_member(config, adapter, path, prepared)
    scores: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    if member.eval_examples:
        console.note("evaluating base and adapter on the held-out rows")
        scores, samples = compare(config, prepared)
    write_text_atomic(folder.path / "samples.jsonl", "".join(json.dumps(sample) + "\n" for sample in samples))
    summary = {
        "run": str(folder.path),
        "adapters": {member.name: str(path)},
        "eval": scores.get("adapter", {}),
        "base_eval": scores.get("base", {}),
        "state": member.state,
        "steps": member.step,
        "best_step": member.best_step or member.step,
        "tokens": member.tokens,
        "tokens_per_s": member.tokens / wall if wall > 0 else 0.0,
        "wall_s": wall,
        "peak_bytes": peak_bytes(base.device),
        "trainable_parameters": adapter.num_parameters(),
        "base_parameters": base.num_parameters(),
    }
    write_json_atomic(folder.path / "summary.json", summary)
    write_report(folder.path)
    return summary


def save_member(config: Config, adapter: Adapter, path: Path, prepared: Prepared) -> None:
    """Write the adapter's folder with the configuration that retrains it alone."""
    adapter.save(path, prepared.base)
    alone = config.model_copy(update={"output": config.output.with_name(config.output.name + "-again")})
    write_text_atomic(path / "config.yaml", alone.to_yaml())


def compare(config: Config, prepared: Prepared) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Scores of the held-out rows for `base` and `adapter`, and samples of what each writes."""
    base, member = prepared.base, prepared.member
    scores: dict[str, dict[str, Any]] = {}
    written: dict[str, list[Sample]] = {}
    for who, slot in (("base", -1), ("adapter", member.slot)):
        scores[who] = evaluate_loss(
            base,
            member.eval_examples,
            slot=slot,
            row_tokens=member.epochs.row_tokens,
            rows_per_batch=config.train.rows_per_step,
            objective=OBJECTIVES.get(prepared.task.objective),
        )
        if any(example.prompt_length for example in member.eval_examples):
            metrics, found = evaluate_text(
                base,
                member.eval_examples,
                slot=slot,
                max_new_tokens=config.evaluate.max_new_tokens,
                temperature=config.evaluate.temperature,
                task=prepared.task,
            )
            scores[who] |= metrics
            written[who] = found[: config.evaluate.samples]
    samples = [
        {
            "prompt": own.prompt,
            "reference": own.references[0],
            "base": bare.text,
            "adapter": own.text,
            "member": member.name,
        }
        for bare, own in zip(written.get("base", []), written.get("adapter", []), strict=True)
    ]
    return scores, samples
