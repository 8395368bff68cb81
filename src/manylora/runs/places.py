"""What a path or name on the command line is: a base, an adapter, a run, data, or a configuration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from manylora.errors import AdapterBroken, UserError, nearest_names

Kind = Literal["base", "adapter", "run", "data", "config"]

DESCRIBED: dict[Kind, str] = {
    "base": "a base",
    "adapter": "an adapter folder",
    "run": "a run folder",
    "data": "data (a file, a folder that holds data, hub:owner/name)",
    "config": "a configuration (.yaml)",
}
MODELS: tuple[Kind, ...] = ("base", "adapter", "run")
CONFIGURATIONS = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Place:
    """`name` as it was typed; `folder` of an adapter or a run, None for what is no folder, and for a base and data
    (which may be on the hub)."""

    kind: Kind
    name: str
    folder: Path | None = None


def recognise(name: str, kinds: Collection[Kind] = MODELS) -> Place:
    """What stands at a path; a name that is no path is a base's, or `hub:owner/name` of data.

    The config.yaml of a run is a configuration where `kinds` has those, else the run.

    Raises:
        UserError: none of the kinds that are asked for.
    """
    path = Path(name).expanduser()
    if path.exists():
        place = _folder(name, path) if path.is_dir() else _file(name, path, kinds)
    else:
        place = _named(name, path) if "data" in kinds else Place("base", name)
    if place is None or place.kind not in kinds:
        raise _unwanted(name, path, place, kinds)
    return place


def _folder(name: str, path: Path) -> Place | None:
    if (path / "adapter_config.json").is_file():
        return Place("adapter", name, path)
    if is_run(path):
        return Place("run", name, path)
    if (path / "config.json").is_file() or not holds_data(path):
        return Place("base", name)  # a folder without anything is told what a base must hold
    return Place("data", name)


def _file(name: str, path: Path, kinds: Collection[Kind]) -> Place | None:
    from manylora.data.readers.file import ENDINGS, named_ending

    if path.suffix.lower() in CONFIGURATIONS:
        is_of_run = path.name == "config.yaml" and is_run(path.parent)
        return Place("run", name, path.parent) if is_of_run and "config" not in kinds else Place("config", name)
    return Place("data", name) if named_ending(path.name) in ENDINGS else None


def _named(name: str, path: Path) -> Place | None:
    from manylora.data.readers.file import ENDINGS, named_ending

    if name.startswith("hub:") or named_ending(path.name) in ENDINGS:
        return Place("data", name)
    if path.suffix.lower() in CONFIGURATIONS:
        return Place("config", name)
    could_be_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return Place("base", name) if could_be_hub or name.startswith("builtin:") else None


def _unwanted(name: str, path: Path, place: Place | None, kinds: Collection[Kind]) -> UserError:
    from manylora.base.load import builtin_names

    beside = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    typed = str(path) if path.parent != Path() else path.name
    allowed = ", ".join(DESCRIBED[kind] for kind in DESCRIBED if kind in kinds)
    if place is not None and path.exists():
        return UserError(f"{name!r} is {DESCRIBED[place.kind].partition(' (')[0]}", allowed=allowed)
    if path.is_file():
        from manylora.data.readers.file import ENDINGS

        endings = ", ".join(ENDINGS)
        return UserError(
            f"{name!r} is a file, and its ending does not say what it holds",
            allowed=allowed,
            next_step=f"give data an ending: {endings}" if "data" in kinds else "give the folder it lies in",
        )
    return UserError(
        f"nothing is at {name!r}", nearest=nearest_names(typed, [*beside, *builtin_names()]), allowed=allowed
    )


def holds_data(path: Path) -> bool:
    """Whether a folder holds data files, splits, or what `datasets` saved there."""
    from manylora.data.readers.file import ENDINGS, named_ending
    from manylora.data.sources.folder import SPLITS_SAVED, STATE, splits_of

    if any((path / name).is_file() for name in (SPLITS_SAVED, STATE)) or splits_of(path):
        return True
    inner = path / "data"  # repositories of the hub keep their files in a folder of this name
    folders = [path, inner] if inner.is_dir() else [path]
    entries = [entry for folder in folders for entry in folder.iterdir() if not entry.name.startswith(".")]
    return any(entry.is_file() and named_ending(entry.name) in ENDINGS for entry in entries)


def is_run(path: Path) -> bool:
    """Whether a folder was written by `manylora train` or `manylora sweep`."""
    return (path / "events.jsonl").is_file() or ((path / "config.yaml").is_file() and (path / "checkpoints").is_dir())


def adapters_of(run: Path) -> dict[str, Path]:
    """The adapters that a run has saved, by member."""
    # What begins with a dot was half written when a process died.
    folders = sorted((run / "adapters").glob("[!.]*/adapter_config.json"))
    return {file.parent.name: file.parent for file in folders}


def results_of(run: Path) -> dict[str, Path]:
    """The adapters that a run ended with: of a sweep the best alone, once there is one."""
    found = adapters_of(run)
    return {"best": found["best"]} if "best" in found else found


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, given itself or as the run that trained it.

    Raises:
        AdapterBroken: neither, or a run with no adapter or with several.
    """
    place = recognise(name, (*MODELS, "data")) if Path(name).expanduser().exists() else Place("base", name)
    if place.kind == "adapter" and place.folder is not None:
        return place.folder
    if place.kind == "run" and place.folder is not None:
        found = results_of(place.folder)
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
