"""Libraries that only some sources need, imported when one is opened."""

from __future__ import annotations

import importlib
from typing import Any

from manylora.errors import DataError


def needed(library: str, place: str) -> Any:
    """The library, which the data at `place` cannot be read without.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise DataError(f"{place} needs the package {library} ({error})", next_step=f"pip install {library}") from error
