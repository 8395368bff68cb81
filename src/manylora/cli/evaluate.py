"""`manylora evaluate`: the task's metrics of a base and of the adapter on it, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manylora.cli.opened import BaseName, Device, Opened, Quantize, TrustRemoteCode, UseCache, open_base
from manylora.cli.output import AsJson, Output, note
from manylora.cli.train import show_scores
from manylora.errors import UserError
from manylora.runs.places import Place, recognise, results_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from manylora.config import DataPlace
    from manylora.data.store import Examples


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the rows are shown and scored; a run's own configuration where it is known."""

    base: str | None = None
    task: str = "sft"
    dtype: str = "bfloat16"
    quantize: str | None = None
    format: str = "auto"
    columns: dict[str, str]
    overflow: str | None = None
    turns: Literal["all", "last"] = "all"
    on_bad_row: Literal["error", "skip"] = "error"
    chat_template: Path | None = None
    row_tokens: int = 512
    rows_per_batch: int = 8
    data: tuple[DataPlace, ...] = ()


def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a base.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Rows to evaluate on; may be repeated. Default: the run's own.")
    ] = None,
    base: BaseName = None,
    task: Annotated[
        str | None, typer.Option("--task", help="How answers are scored. Default: the run's, or sft.")
    ] = None,
    text: Annotated[bool, typer.Option("--text/--no-text", help="Whether answers are generated and scored.")] = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")] = 128,
    max_inputs: Annotated[
        int | None, typer.Option("--max-inputs", min=1, help="Answer the first so many inputs.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the frozen base. Default: the run's, or bfloat16.")
    ] = None,
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    use_cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Score a base and the adapters on it."""
    from manylora.config import DataPlace

    place = recognise(target)
    settings, folders = _what(place)
    files = tuple(DataPlace(path=path) for path in data or ()) or settings.data
    if not files:
        raise UserError("no data to evaluate on", next_step=f"manylora evaluate {target} --data FILE")
    settings = replace(
        settings,
        data=files,
        base=base or settings.base,
        task=task or settings.task,
        dtype=dtype or settings.dtype,
        quantize=quantize or settings.quantize,
    )
    from manylora.tasks import TASKS

    opened = open_base(
        settings.base, folders, dtype=settings.dtype, device=device, quantize=settings.quantize,
        trust_remote_code=trust_remote_code, chat_template=settings.chat_template, auto=TASKS.get(settings.task).auto,
    )  # fmt: skip
    examples = read_examples(opened, settings, use_cache=use_cache)
    scores: dict[str, dict[str, Any]] = {}
    footnotes: Mapping[str, str] = {}
    for name, slot in opened.slots.items():
        scores[name], footnotes = _score(opened, slot, examples, settings, max_new_tokens if text else 0, max_inputs)
    output = Output(as_json)
    show_scores(output, scores, footnotes)
    paths = [place.path for place in files]
    output.finish({"target": target, "data": paths, "eval": scores, "footnotes": dict(footnotes)})


def _what(place: Place) -> tuple[Settings, list[Path]]:
    """The settings that come with a target, and the adapters that it brings."""
    if place.kind == "base" or place.folder is None:
        return Settings(base=place.name, columns={}), []
    config = place.folder / "config.yaml"
    settings = _settings_of(config) if config.is_file() else Settings(columns={})
    if place.kind == "adapter":
        return settings, [place.folder]
    folders = list(results_of(place.folder).values())
    if not folders:
        raise UserError(
            f"the run {place.name!r} has saved no adapter yet",
            next_step=f"manylora train {place.folder / 'config.yaml'} --resume",
        )
    return settings, folders


def _settings_of(path: Path) -> Settings:
    from manylora.config import load_config
    from manylora.tasks.data import held_out_places

    config = load_config(path)
    data = config.data
    return Settings(
        base=config.base, task=config.task, dtype=config.dtype, quantize=config.quantize or "none", format=data.format,
        columns=data.columns, overflow=data.overflow, turns=data.turns, on_bad_row=data.on_bad_row,
        chat_template=data.chat_template, row_tokens=config.train.row_tokens, data=held_out_places(config),
    )  # fmt: skip


def read_examples(opened: Opened, settings: Settings, *, quiet: bool = False, use_cache: bool = True) -> Examples:
    """The rows of the settings' places as the base is shown them."""
    from manylora.data.examples import Reading
    from manylora.data.load import load_examples
    from manylora.tasks.data import open_places
    from manylora.tasks.text import text_task

    reading = Reading(
        max_length=settings.row_tokens, format=settings.format, kinds=text_task(settings.task).kinds,
        overflow=settings.overflow, turns=settings.turns, on_bad_row=settings.on_bad_row,
    )  # fmt: skip
    base = opened.base
    loaded = load_examples(
        open_places(settings.data, settings.columns), base.tokenizer, reading, eos_ids=base.eos_ids, use_cache=use_cache
    )
    for line in () if quiet else loaded.notes():
        note(line)
    return loaded.examples


def _score(
    opened: Opened, slot: int, examples: Examples, settings: Settings, max_new_tokens: int, max_inputs: int | None
) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Metrics by name, and what each of those of texts is exactly."""
    from manylora.evaluation.evaluate import evaluate_loss, evaluate_text
    from manylora.objectives import OBJECTIVES
    from manylora.tasks.text import text_task

    task = text_task(settings.task)
    scores: dict[str, Any] = evaluate_loss(
        opened.base, examples, slot=slot, row_tokens=settings.row_tokens, rows_per_batch=settings.rows_per_batch,
        objective=OBJECTIVES.get(task.objective),
    )  # fmt: skip
    if not max_new_tokens:
        return scores, {}
    metrics, answers = evaluate_text(
        opened.base, examples, slot=slot, max_new_tokens=max_new_tokens, task=task, max_inputs=max_inputs
    )
    return scores | metrics, task.footnotes(answers)
