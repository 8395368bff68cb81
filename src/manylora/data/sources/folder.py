"""Folders: files named after their splits, data files of one kind, or what `datasets` saved to disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.data.readers.file import ENDINGS, named_ending
from manylora.data.readers.needed import needed
from manylora.data.readers.opened import PACKED
from manylora.data.sources.files import Files, digest_of
from manylora.data.sources.saved import Saved
from manylora.data.sources.source import Source
from manylora.errors import DataError, DataNotFound, nearest_names

SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
"""Our name of each split, and the names that files, folders and data sets give it."""

SHARD = re.compile(r"(?P<split>.+?)-(?P<place>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?")
STATE = "state.json"
SPLITS_SAVED = "dataset_dict.json"


def canonical(split: str) -> str:
    """Our name of a split: "valid" for "validation", "dev" and so on; any other name is its own."""
    return next((ours for ours, theirs in SPLITS.items() if split in theirs), split)


def splits_of(folder: str | Path) -> tuple[str, ...]:
    """The splits of a folder under our names ("train", "valid", "test"), in that order; none where it has no splits.

    Raises:
        DataNotFound: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataNotFound(f"there is no folder {folder}", next_step="give a folder with data files")
    found = _splits(folder)
    return tuple(sorted(found, key=lambda split: ([*SPLITS, split].index(split), split)))


def open_folder(folder: Path, split: str | None, columns: Mapping[str, str]) -> Source:
    """The rows of one split of a folder ("train" where none is named), or of all files of a folder without splits.

    Raises:
        DataNotFound: no such split, or no data files. DataError: it is not clear which files are meant.
    """
    if (folder / STATE).is_file():
        _check_no_split(folder, split)
        return _saved(folder, str(folder), columns)
    wanted = canonical(split or "train")
    splits = _splits(folder)
    if not splits:
        if wanted != "train":
            raise DataNotFound(
                f"{folder} has no split {split!r}: no file or folder in it is named after a split",
                allowed=", ".join(name for names in SPLITS.values() for name in names),
            )
        return Files.of(_of_one_kind(folder), columns, name=str(folder))
    if wanted not in splits:
        raise DataNotFound(
            f"{folder} has no split {split or wanted!r}",
            nearest=nearest_names(wanted, splits),
            allowed=", ".join(splits_of(folder)),
        )
    name = f"{folder} [{wanted}]"
    named_so = [place for place in splits[wanted] if _split_name(place) == split]
    places = _checked(folder, wanted, named_so or splits[wanted])
    if len(places) == 1 and places[0].is_dir():
        if (places[0] / STATE).is_file():
            return _saved(places[0], name, columns)
        return Files.of(_of_one_kind(places[0]), columns, name=name)
    return Files.of(places, columns, name=name)


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The files and folders of each split that a folder has."""
    if (folder / STATE).is_file():
        return {}
    if (folder / SPLITS_SAVED).is_file():
        entries = [folder / name for name in _saved_splits(folder)]
    else:
        known = {theirs for names in SPLITS.values() for theirs in names}
        entries = [
            entry
            for entry in sorted(folder.iterdir())
            if _split_name(entry) in known and (_is_data(entry) or _holds_data(entry))
        ]
    found: dict[str, list[Path]] = {}
    for entry in entries:
        found.setdefault(canonical(_split_name(entry)), []).append(entry)
    # repositories of the hub keep their files in a folder of this name
    if not found and (folder / "data").is_dir() and not _data_files(folder):
        return _splits(folder / "data")
    return found


def _checked(folder: Path, split: str, places: Sequence[Path]) -> list[Path]:
    """The one file, the one folder or all the shards of a split."""
    if len(places) == 1 and not SHARD.fullmatch(_stem(places[0])):
        return list(places)
    shards = [SHARD.fullmatch(_stem(place)) for place in places]
    kinds = {
        (shard["split"], shard["count"], named_ending(place.name))
        for place, shard in zip(places, shards, strict=True)
        if shard
    }
    if None in shards or len(kinds) != 1 or any(place.is_dir() for place in places):
        raise DataError(
            f"{folder} holds the split {split!r} more than once: {', '.join(place.name for place in places)}",
            next_step="name the file itself",
        )
    count = int(next(iter(kinds))[1])
    there = [int(shard["place"]) for shard in shards if shard]
    if there != list(range(count)):
        lacking = ", ".join(str(place) for place in sorted(set(range(count)) - set(there))[:5])
        raise DataError(
            f"{folder} holds {len(there)} of the {count} shards of {split!r}"
            + (f"; the first that lack: {lacking}" if lacking else " and some of them twice"),
            next_step="fetch the folder again",
        )
    return list(places)


def _of_one_kind(folder: Path) -> list[Path]:
    """All data files of a folder, by name.

    Raises:
        DataNotFound: there is none. DataError: they are of several kinds.
    """
    files = _data_files(folder)
    if not files and (folder / "data").is_dir():
        return _of_one_kind(folder / "data")
    if not files:
        held = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
        raise DataNotFound(
            f"{folder} holds no data file" + (f" (it holds {held})" if held else ""),
            allowed=f"files that end in {', '.join(ENDINGS)}",
        )
    if len({ENDINGS.get(named_ending(path.name)) for path in files}) > 1:
        listed = ", ".join(path.name for path in files[:8]) + (", ..." if len(files) > 8 else "")
        raise DataError(
            f"{folder} holds data files of several kinds and none is named after a split: {listed}",
            next_step="name the file itself, or call it train",
        )
    return files


def _data_files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if _is_data(entry))


def _is_data(entry: Path) -> bool:
    return not entry.name.startswith(".") and entry.is_file() and named_ending(entry.name) in ENDINGS


def _holds_data(entry: Path) -> bool:
    return entry.is_dir() and ((entry / STATE).is_file() or bool(_data_files(entry)))


def _stem(path: Path) -> str:
    if path.is_dir():
        return path.name
    unpacked = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return unpacked.stem


def _split_name(path: Path) -> str:
    shard = SHARD.fullmatch(_stem(path))
    return shard["split"] if shard else _stem(path)


def _saved_splits(folder: Path) -> list[str]:
    try:
        return list(json.loads((folder / SPLITS_SAVED).read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / SPLITS_SAVED} cannot be read ({error!r})", next_step="save it again") from error


def _check_no_split(folder: Path, split: str | None) -> None:
    if split is not None and canonical(split) != "train":
        raise DataNotFound(f"{folder} is one data set without splits; {split!r} is asked of it")


def _saved(folder: Path, name: str, columns: Mapping[str, str]) -> Saved:
    datasets = needed("datasets", str(folder))
    import pyarrow

    try:
        dataset: Any = datasets.load_from_disk(str(folder))
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder} is not a whole saved data set ({error})", next_step="save it again") from error
    # the names of the labels stand beside the rows
    held = [folder / part["filename"] for part in state["_data_files"]] + [folder / "dataset_info.json"]
    return Saved(name, dataset, columns, lambda: "sha256:" + digest_of(held))
