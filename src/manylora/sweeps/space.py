"""The search space: for every searched key, the choices or the range that its value is taken from.

`sweep.space` maps keys of the configuration to a list of choices (any YAML values) or to a range:

    adapter.rank: [4, 8, 16, 64]
    train.learning_rate: {low: 1e-5, high: 1e-2, log: true}
    train.steps: {low: 100, high: 500, step: 100}

Both ends of a range belong to it. A range whose numbers are all written as whole ones gives whole numbers; 1.0 or 1e2
in place of 1 or 100 gives fractions. No torch, and optuna only where distributions are asked for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import yaml

from manylora.config_text import dump_inline
from manylora.errors import ConfigError, nearest_names

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGE_KEYS = ("low", "high", "log", "step", "num")
"""The words of a range: its ends; even in the logarithm; the distance of its values; the points that a grid visits."""
_ALLOWED = "a list of choices, or a range such as {low: 1e-5, high: 1e-2, log: true}"


@dataclass(frozen=True, slots=True)
class Choices:
    """Values from a list. optuna and its dashboard know each by its label, its YAML on one line."""

    listed: tuple[Any, ...]
    labels: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.listed)

    def values(self) -> Sequence[Any]:
        return self.labels

    def grid(self) -> Sequence[Any]:
        return self.labels

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.labels)

    def decode(self, stored: Any) -> Any:
        # A copy: a list or mapping that a caller changes must not change the space.
        return copy.deepcopy(self.listed[self.labels.index(stored)])

    def described(self) -> str:
        return f"[{', '.join(self.labels)}]"


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`: whole ones if `whole`, spread evenly in the logarithm if `log`."""

    low: float
    high: float
    log: bool
    step: float | None
    num: int | None
    whole: bool

    @property
    def size(self) -> int | None:
        """How many values there are; None: as many as floating point has."""
        if self.step is None and not self.whole:
            return None
        return 1 + int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(self.step or 1)))

    def values(self) -> Sequence[Any] | None:
        """Every value, lowest first; None where there is no end of them."""
        if self.whole:
            return range(int(self.low), int(self.high) + 1, int(self.step or 1))
        return None if self.size is None else tuple(self._stepped(index) for index in range(self.size))

    def grid(self) -> Sequence[Any] | None:
        """What a grid visits: `num` points with both ends, or each step; None where neither is given."""
        if self.num is None:
            return None if self.step is None else self.values()
        shares = [index / (self.num - 1) for index in range(1, self.num - 1)]
        if self.log:
            inner = [self.low * (self.high / self.low) ** share for share in shares]
        else:
            inner = [self.low + (self.high - self.low) * share for share in shares]
        # The ends as they were written: a power may miss them in the last place.
        points = (self.low, *inner, self.high)
        return tuple(dict.fromkeys(round(point) if self.whole else float(point) for point in points))

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        # optuna warns about a range that is no multiple of its step; what lies beyond the last step is cut off here.
        if self.whole:
            step = int(self.step or 1)
            return IntDistribution(int(self.low), int(self.high) - int(self.high - self.low) % step, self.log, step)
        last = self.high if self.size is None else self._stepped(self.size - 1)
        return FloatDistribution(float(self.low), float(last), self.log, self.step)

    def decode(self, stored: Any) -> Any:
        if self.whole:
            return int(stored)
        return float(stored) if self.step is None else self._stepped(round((stored - self.low) / self.step))

    def described(self) -> str:
        given = {name: getattr(self, name) for name in RANGE_KEYS}
        # By identity: 0 is a number, not an absent word.
        shown = [f"{k}: {dump_inline(v)}" for k, v in given.items() if v is not None and v is not False]
        return f"{{{', '.join(shown)}}}"

    def _stepped(self, index: int) -> float:
        # Decimals, so that steps of 0.1 give 0.3 and not 0.30000000000000004.
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))


@dataclass(frozen=True, slots=True)
class Space:
    """Every searched key and where its values come from, in the order written."""

    dimensions: Mapping[str, Choices | Range]

    @property
    def size(self) -> int | None:
        """How many different trials there are; None: no end of them."""
        sizes = [dimension.size for dimension in self.dimensions.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def distributions(self) -> dict[str, BaseDistribution]:
        """What optuna draws from, by key."""
        return {key: dimension.distribution() for key, dimension in self.dimensions.items()}

    def decode(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a trial from what optuna stores of it: the very values that were written in the space."""
        return {key: dimension.decode(stored[key]) for key, dimension in self.dimensions.items()}

    def settled(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """What optuna drew, as it is stored: a step of 0.1 gives 0.3 and never 0.30000000000000004."""
        kinds = self.dimensions
        return {
            key: kinds[key].decode(value) if isinstance(kinds[key], Range) else value for key, value in drawn.items()
        }

    def described(self) -> dict[str, str]:
        """One line of text by key; two spaces with the same lines are the same."""
        return {key: dimension.described() for key, dimension in self.dimensions.items()}


def parse_space(space: Mapping[str, Any]) -> Space:
    """The search space from `sweep.space` as it is written; whether its keys exist is not looked at here.

    Raises:
        ConfigError: no key; neither choices nor a range; no or equal choices; a range with an unknown or a missing
            word, with values out of range, or with words that contradict each other.
    """
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(
            f"sweep.space is {space!r}",
            allowed="at least one key with its choices or its range",
            next_step="for example sweep.space: {adapter.rank: [4, 8, 16, 64]}",
        )
    for key in space:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"sweep.space has the key {key!r}", allowed="dotted keys, such as adapter.rank")
    return Space({key: _dimension(f"sweep.space.{key}", written) for key, written in space.items()})


def _dimension(name: str, written: Any) -> Choices | Range:
    if isinstance(written, list | tuple):
        return _choices(name, written)
    if isinstance(written, Mapping):
        return _range(name, written)
    raise ConfigError(
        f"{name} is {written!r}",
        allowed=_ALLOWED,
        next_step=f"a value that is not searched stands outside of sweep.space: {name.removeprefix('sweep.space.')}",
    )


def _choices(name: str, written: Sequence[Any]) -> Choices:
    if not written:
        raise ConfigError(f"{name} is []", allowed="at least one choice", next_step="add choices or leave the key out")
    try:
        labels = tuple(dump_inline(value) for value in written)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{name} has a choice that YAML cannot write: {error}", allowed="numbers, text, null, lists, mappings"
        ) from error
    seen: dict[Any, Any] = {}
    for value in written:
        alike = _alike(value)
        if alike in seen:
            raise ConfigError(
                f"{name} has a choice twice: {seen[alike]!r} and {value!r}",
                allowed="different choices",
                next_step="to train each trial several times, set sweep.repeats",
            )
        seen[alike] = value
    return Choices(tuple(copy.deepcopy(value) for value in written), labels)


def _alike(value: Any) -> Any:
    """Equal for values that configure the same: 8 and 8.0 do, 1 and true do not."""
    match value:
        case Mapping():
            return ("mapping", frozenset((_alike(key), _alike(inner)) for key, inner in value.items()))
        case list() | tuple():
            return ("list", *(_alike(inner) for inner in value))
        case bool() | int() | float():
            # A NaN equals nothing, itself included.
            return (isinstance(value, bool), "nan" if value != value else value)
        case _:
            return ("other", dump_inline(value))


def _range(name: str, written: Mapping[str, Any]) -> Range:
    for word, value in written.items():
        if word not in RANGE_KEYS:
            raise ConfigError(
                f"unknown key '{name}.{word}' (its value is {value!r})",
                nearest=nearest_names(str(word), RANGE_KEYS),
                allowed=", ".join(RANGE_KEYS),
                next_step="searched keys are written in one piece, such as adapter.rank",
            )
    for word in ("low", "high"):
        if word not in written:
            raise ConfigError(f"{name} has no {word}", allowed=_ALLOWED)
    numbers = {word: _number(f"{name}.{word}", written[word]) for word in ("low", "high")}
    low, high = numbers["low"], numbers["high"]
    if low >= high:
        raise ConfigError(f"{name}.low is {low!r} and {name}.high is {high!r}", allowed="low below high")
    log = written.get("log", False)
    if not isinstance(log, bool):
        raise ConfigError(f"{name}.log is {log!r}", allowed="true or false")
    if log and low <= 0:
        raise ConfigError(f"{name}.low is {low!r} with log: true", allowed="above 0")
    if written.get("step") is not None:
        numbers["step"] = _number(f"{name}.step", written["step"])
    step, num = numbers.get("step"), written.get("num")
    if step is not None and not 0 < step <= high - low:
        raise ConfigError(f"{name}.step is {step!r}", allowed=f"above 0 and at most high - low, {high - low!r}")
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 2):
        raise ConfigError(f"{name}.num is {num!r}", allowed="a whole number of at least 2")
    for word, given in (("log: true", log), ("num", num is not None)):
        if step is not None and given:
            raise ConfigError(f"{name} has both step and {word}", allowed="one of them")
    whole = all(isinstance(value, int) for value in numbers.values())
    return Range(low, high, log, step, num, whole)


def _number(name: str, value: Any) -> int | float:
    """A finite number, also one that a YAML 1.1 reader left as text (1e-5)."""
    if isinstance(value, str):
        try:
            value = float(value) if set(value) & set(".eE") else int(value)
        except ValueError:
            raise ConfigError(f"{name} is {value!r}", allowed="a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}", allowed="a finite number")
    return value
