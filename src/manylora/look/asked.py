"""What `manylora inspect DATA` looks at: which rows, read how; by a configuration, options and training's defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from manylora.errors import UserError

if TYPE_CHECKING:
    from manylora.config import DataPlace
    from manylora.data.examples import Reading
    from manylora.runs.places import Place

BASE = "builtin:tiny-en"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The options as they were typed; None and empty: not given."""

    base: str | None = None
    eval: str | None = None
    format: str | None = None
    columns: str | None = None
    row_tokens: int | None = None
    overflow: str | None = None
    turns: Literal["all", "last"] | None = None
    chat_template: Path | None = None
    split: str | None = None
    subset: str | None = None
    rows: int | None = None
    lines: Sequence[int] = ()
    html: Path | None = None
    strict: bool = False
    trust_remote_code: bool = False
    use_cache: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is looked at and how it is read: by a configuration, the options, and the defaults of training."""

    base: str
    places: tuple[DataPlace, ...]
    held_out: tuple[DataPlace, ...]
    reading: Reading
    columns: Mapping[str, str]
    chat_template: Path | None = None
    eval_fraction: float | None = None
    seed: int = 0
    rows_per_step: int = 4
    skips: bool = False
    base_is_default: bool = False


def look_of(place: Place, asked: Asked) -> Look:
    """What is to be looked at; options stand above a configuration.

    Raises:
        UserError: an option that says nothing here, or in a form that cannot be read.
    """
    from manylora.config import DataPlace
    from manylora.data.examples import Reading
    from manylora.tasks.data import own_held_out

    if place.kind in ("config", "run"):
        look = _look_of_config(place, asked)
    else:
        at = DataPlace(path=place.name, split=asked.split, subset=asked.subset)
        look = Look(
            base=asked.base or BASE,
            base_is_default=asked.base is None,
            places=(at,),
            held_out=() if asked.eval else own_held_out(at),
            reading=Reading(max_length=512),
            columns={},
        )
    given = {"max_length": asked.row_tokens, "format": asked.format, "overflow": asked.overflow, "turns": asked.turns}
    reading = replace(look.reading, **{name: value for name, value in given.items() if value is not None})
    look = replace(look, reading=replace(reading, on_bad_row="skip"))
    if asked.columns is not None:
        look = replace(look, columns=parse_columns(asked.columns))
    if asked.eval is not None:
        look = replace(look, held_out=(DataPlace(path=asked.eval),), eval_fraction=None)
    return replace(look, chat_template=asked.chat_template or look.chat_template)


def _look_of_config(place: Place, asked: Asked) -> Look:
    from manylora.config import load_config
    from manylora.tasks.data import held_out_places, reading_of
    from manylora.tasks.text import text_task

    if asked.split is not None or asked.subset is not None:
        raise UserError(
            "--split and --subset are about a folder or the hub, and a configuration names its own",
            next_step="set them in the configuration: data: {train: {path: ..., split: ...}}",
        )
    config = load_config(place.folder or place.name)
    if config.base.startswith("python:") and asked.base is None:
        raise UserError(
            "the base of the configuration was an object in Python, which no file can name",
            next_step=f"name a base with the same tokenizer: manylora inspect {place.name} --base ...",
        )
    return Look(
        base=asked.base or config.base,
        places=config.data.train,
        held_out=held_out_places(config),
        reading=reading_of(config, config.train.row_tokens, text_task(config.task).kinds),
        columns=config.data.columns,
        chat_template=config.data.chat_template,
        eval_fraction=config.data.eval_fraction,
        seed=config.train.seed,
        rows_per_step=config.train.rows_per_step,
        skips=config.data.on_bad_row == "skip",
    )


def parse_columns(text: str) -> dict[str, str]:
    """{"prompt": "question"} of `prompt=question`; several stand between commas.

    Raises:
        UserError: a part without a name on either side of its equals sign.
    """
    pairs = [[side.strip() for side in part.partition("=")[::2]] for part in text.split(",") if part.strip()]
    if not pairs or not all(name and theirs for name, theirs in pairs):
        raise UserError(f"--columns is {text!r}", allowed="OURS=YOURS, as in prompt=question,completion=answer")
    return dict(pairs)
