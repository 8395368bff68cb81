"""`manylora evaluate`: the task's metrics of a base and of the adapter on it, side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manylora.cli.opened import BaseName, Device, Opened, TrustRemoteCode, open_base
from manylora.cli.output import AsJson, Output, note
from manylora.cli.places import Place, adapters_of, recognise
from manylora.cli.train import show_scores
from manylora.errors import UserError

if TYPE_CHECKING:
    from manylora.data.examples import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the rows are shown and scored; a run's own configuration where it is known."""

    base: str | None = None
    task: str = "sft"
    dtype: str = "bfloat16"
    format: str = "auto"
    columns: dict[str, str]
    overflow: str | None = None
    chat_template: Path | None = None
    row_tokens: int = 512
    rows_per_batch: int = 8
    data: tuple[Path, ...] = ()


def evaluate(
    target: Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a base.")],
    data: Annotated[
        list[Path] | None, typer.Option("--data", help="Rows to evaluate on; may be repeated. Default: the run's own.")
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
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Score a base and the adapters on it."""
    place = recognise(target)
    settings, folders = _what(place)
    files = tuple(data or settings.data)
    if not files:
        raise UserError("no data to evaluate on", next_step=f"manylora evaluate {target} --data FILE")
    settings = replace(
        settings, data=files, base=base or settings.base, task=task or settings.task, dtype=dtype or settings.dtype
    )
    from manylora.tasks import TASKS

    opened = open_base(
        settings.base, folders, dtype=settings.dtype, device=device, trust_remote_code=trust_remote_code,
        chat_template=settings.chat_template, auto=TASKS.get(settings.task).auto,
    )  # fmt: skip
    examples = read_examples(opened, settings)
    scores = {
        name: _score(opened, slot, examples, settings, max_new_tokens if text else 0, max_inputs)
        for name, slot in opened.slots.items()
    }
    output = Output(as_json)
    show_scores(output, scores)
    output.finish({"target": target, "data": [str(path) for path in files], "eval": scores})


def _what(place: Place) -> tuple[Settings, list[Path]]:
    """The settings that come with a target, and the adapters that it brings."""
    if place.kind == "base" or place.folder is None:
        return Settings(base=place.name, columns={}), []
    config = place.folder / "config.yaml"
    settings = _settings_of(config) if config.is_file() else Settings(columns={})
    if place.kind == "adapter":
        return settings, [place.folder]
    folders = list(adapters_of(place.folder).values())
    if not folders:
        raise UserError(
            f"the run {place.name!r} has saved no adapter yet",
            next_step=f"manylora train {place.folder / 'config.yaml'} --resume",
        )
    return settings, folders


def _settings_of(path: Path) -> Settings:
    from manylora.config import load_config

    config = load_config(path)
    data = config.data
    return Settings(
        base=config.base, task=config.task, dtype=config.dtype, format=data.format, columns=data.columns,
        overflow=data.overflow, chat_template=data.chat_template, row_tokens=config.train.row_tokens, data=data.eval,
    )  # fmt: skip


def read_examples(opened: Opened, settings: Settings, *, quiet: bool = False) -> list[Example]:
    """The rows of the settings' files as the base is shown them."""
    from manylora.data.examples import encode
    from manylora.data.readers import read_rows

    rows = read_rows(settings.data, columns=settings.columns)
    encoded = encode(
        rows, opened.base.tokenizer, format=settings.format, max_length=settings.row_tokens, overflow=settings.overflow,
        eos_id=opened.base.eos_ids,
    )  # fmt: skip
    for line in () if quiet else encoded.notes:
        note(line)
    return encoded.examples


def _score(
    opened: Opened, slot: int, examples: list[Example], settings: Settings, max_new_tokens: int, max_inputs: int | None
) -> dict[str, Any]:
    from manylora.evaluation.evaluate import evaluate_loss, evaluate_text
    from manylora.objectives import OBJECTIVES
    from manylora.tasks import TASKS

    task = TASKS.get(settings.task)
    scores: dict[str, Any] = evaluate_loss(
        opened.base, examples, slot=slot, row_tokens=settings.row_tokens, rows_per_batch=settings.rows_per_batch,
        objective=OBJECTIVES.get(task.objective),
    )  # fmt: skip
    if max_new_tokens:
        scores |= evaluate_text(
            opened.base, examples, slot=slot, max_new_tokens=max_new_tokens, task=task, max_inputs=max_inputs
        )[0]
    return scores
