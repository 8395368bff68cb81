"""Places that rows come from: files, folders with splits, the Hugging Face hub, objects of Python.

source = open_source("data/", split="train")
for row in source.rows():          # streams: memory does not grow with the file
    ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manylora.data.sources.files import Files
from manylora.data.sources.folder import open_folder, splits_of
from manylora.data.sources.hub import HUB, open_hub
from manylora.data.sources.objects import open_object
from manylora.data.sources.source import Source
from manylora.errors import DataError, DataNotFound

__all__ = ["Source", "open_source", "splits_of"]

HUB_NAME = re.compile(r"[\w-]+/[\w-]+")


def open_source(
    place: Any,
    *,
    split: str | None = None,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Source:
    """The rows of a place: a path of a file or folder, `hub:owner/name`, or any object whose items are mappings.

    `split` names which part of a folder, of a data set on the hub or of a dictionary of data sets ("train" where none
    is named); `subset` the configuration of a data set on the hub. `columns` gives our name for a column:
    {"prompt": "question"}.

    Raises:
        DataNotFound: nothing is there, or no such split. DataError: it cannot say which files are meant, has no splits
            but one is named, or is not of a form that can be read.
    """
    renamings = dict(columns or {})
    named = place if isinstance(place, str) else ""
    if subset is not None and not named.startswith(HUB):
        raise DataError(
            f"the subset {subset!r} is named, but only data sets on the hub have subsets", next_step=f"give {HUB}NAME"
        )
    if named.startswith(HUB):
        return open_hub(named.removeprefix(HUB), split, subset, renamings)
    if not isinstance(place, (str, Path)):
        return open_object(place, split, renamings)
    path = Path(place)
    if path.is_dir():
        return open_folder(path, split, renamings)
    if split is not None and path.is_file():
        raise DataError(
            f"{path} is a file, which has no splits; {split!r} is asked of it", next_step="name no split, or the folder"
        )
    if HUB_NAME.fullmatch(named) and not path.exists():
        raise DataNotFound(
            f"there is no file or folder {named}", next_step=f"a data set of the hub is named {HUB}{named}"
        )
    return Files.of([path], renamings, name=str(place))
