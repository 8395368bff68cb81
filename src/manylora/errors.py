"""Every error that manylora raises on purpose: one tree, four parts (what, value, what is allowed, next step)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ManyloraError(Exception):
    """The root of the tree. `str(error)` is the message in full: the first line, then what may help."""

    def __init__(
        self, what: str, *, nearest: Iterable[str] = (), allowed: str | None = None, next_step: str | None = None
    ):
        self.what = what
        self.nearest = tuple(nearest)
        self.allowed = allowed
        self.next_step = next_step
        lines = [what]
        if self.nearest:
            lines.append(f"  nearest: {', '.join(self.nearest)}")
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if next_step:
            lines.append(f"  next: {next_step}")
        super().__init__("\n".join(lines))


class UserError(ManyloraError):
    """A mistake that the user can mend; the command line prints it without a traceback and exits 2."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run: an unknown key, a value out of range, two keys that contradict each other."""


class UnknownName(ConfigError, LookupError):
    """A name that its table does not hold."""


class BaseNotFound(UserError, FileNotFoundError):
    """No model where the configuration points."""


class BaseBroken(UserError, ValueError):
    """A model folder that cannot be read: no weights, a truncated file, tensors missing."""


class SiteNotFound(UserError, LookupError):
    """A pattern that matches no site of the base."""


class SpecError(ConfigError):
    """An adapter that cannot stand on this base: a rank of zero, a rank that no site allows."""


class AdapterBroken(UserError, ValueError):
    """An adapter folder that cannot be read: a file missing, a tensor missing, unexpected or misshapen."""


class BaseMismatch(UserError, ValueError):
    """An adapter that was made for another base, tokenizer or chat template."""


class PackError(UserError, ValueError):
    """A weight that cannot be stored in the format: its shape, its dtype, or a value that is not finite."""


class _Measured(UserError, ValueError):
    """A loss that was measured and is more than is allowed; `report` holds the numbers."""

    def __init__(
        self,
        what: str,
        *,
        nearest: Iterable[str] = (),
        allowed: str | None = None,
        next_step: str | None = None,
        report: Any = None,
    ):
        super().__init__(what, nearest=nearest, allowed=allowed, next_step=next_step)
        self.report = report


class MergeRefused(_Measured):
    """A merge that would lose more of what was learned than is allowed; `report` holds the numbers."""


class CompressRefused(_Measured):
    """A compressed adapter that loses more than is allowed; `report` holds the numbers."""


class RouteError(ManyloraError, RuntimeError):
    """A bank used in a way that cannot name the slot of every row."""


class DataError(UserError, ValueError):
    """A data file or a row of it that cannot be used; names file, row and column."""


class DataNotFound(DataError, FileNotFoundError):
    """No data where the configuration points."""


class OutputExists(UserError, FileExistsError):
    """An output folder that already holds something."""


class CheckpointBroken(UserError, ValueError):
    """A checkpoint that cannot be read or does not belong to this run."""


class NonFiniteLoss(ManyloraError, ArithmeticError):
    """A loss or gradient that is not a finite number; the member is retired."""


class OutOfMemory(UserError, MemoryError):
    """The machine's memory does not hold the step; says what to change."""


class DiskFull(ManyloraError, OSError):
    """A file could not be written; what was complete before is still there."""


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` known names that look most like `name`, best first."""
    return difflib.get_close_matches(str(name), [str(one) for one in known], n=count, cutoff=0.5)
