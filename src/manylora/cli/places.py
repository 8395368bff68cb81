"""What a path or name on the command line is: a base, an adapter, or a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import AdapterBroken, UserError


@dataclass(frozen=True, slots=True)
class Place:
    """`name` as it was typed; `folder` of an adapter or a run, None for a base (which may be builtin or on the hub)."""

    kind: Literal["base", "adapter", "run"]
    name: str
    folder: Path | None = None


def recognise(name: str) -> Place:
    """What stands at a path; a name that is no path is a base's.

    Raises:
        UserError: a file that is none of these.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.name == "config.yaml" and is_run(path.parent):
            return Place("run", name, path.parent)
        raise UserError(
            f"{name!r} is a file",
            allowed="a run folder, an adapter folder, or a base",
            next_step="give the folder it lies in",
        )
    if (path / "adapter_config.json").is_file():
        return Place("adapter", name, path)
    return Place("run", name, path) if is_run(path) else Place("base", name)


def is_run(path: Path) -> bool:
    """Whether a folder was written by `manylora train`."""
    return (path / "events.jsonl").is_file() or ((path / "config.yaml").is_file() and (path / "checkpoints").is_dir())


def adapters_of(run: Path) -> dict[str, Path]:
    """The adapters that a run has saved, by member."""
    folders = sorted((run / "adapters").glob("*/adapter_config.json"))
    return {file.parent.name: file.parent for file in folders}


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, given itself or as the run that trained it.

    Raises:
        AdapterBroken: neither, or a run with no adapter or with several.
    """
    place = recognise(name) if Path(name).expanduser().exists() else Place("base", name)
    if place.kind == "adapter" and place.folder is not None:
        return place.folder
    if place.kind == "run" and place.folder is not None:
        found = adapters_of(place.folder)
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise AdapterBroken(
                f"the run {name!r} has {len(found)} adapters", allowed=", ".join(map(str, found.values()))
            )
        raise AdapterBroken(
            f"the run {name!r} has saved no adapter yet", next_step=f"manylora train {name}/config.yaml --resume"
        )
    raise AdapterBroken(
        f"no adapter at {name!r}", allowed="a folder with adapter_config.json, or the run that trained it"
    )
