"""Where the members of a sweep train: here, or in processes over Ray; one file each, one line in this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.table import Table

if TYPE_CHECKING:
    from manylora.config import Config


@dataclass(frozen=True, slots=True)
class Engine:
    """`run` trains a sweep to its end; `check` raises what this engine cannot do, before anything is written."""

    run: Callable[..., None]
    check: Callable[[Config], None]


ENGINES: Table[Engine] = Table(
    "engine",
    {
        "local": "manylora.sweeps.engines.local:LOCAL",
        "ray": "manylora.sweeps.engines.ray:RAY",
    },
)
