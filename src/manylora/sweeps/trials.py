"""The configurations of a sweep: what each trial's members are, alone and complete. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from manylora.config import Config, load_config
from manylora.errors import ConfigError, UserError
from manylora.sweeps.space import Choices, Space

SHARED = "all members of a sweep stand on one base: run one sweep for each"
COMPARED = "trials are compared on the same held-out rows"
SAME_RUN = "a sweep is one run"
LAYERS = "the layers of the one base are computed alike for all members"
FIXED = {
    **dict.fromkeys(("base", "dtype", "device", "quantize", "trust_remote_code", "data.chat_template", "task"), SHARED),
    **dict.fromkeys(("data.eval", "data.eval_fraction", "data.fold", "data.split_seed"), COMPARED),
    **dict.fromkeys(("data.format", "data.columns", "data.overflow", "data.turns", "data.on_bad_row"), COMPARED),
    "evaluate.max_examples": COMPARED,
    **dict.fromkeys(("output", "track", "checkpoint.every_steps", "checkpoint.keep", "checkpoint.select"), SAME_RUN),
    **dict.fromkeys(("train.checkpointing", "train.compile"), LAYERS),
    "evaluate.at_tokens": "levels are laid by sweep.stop",
    "train.stop_after": "sweep.stop says how long a trial is trained",
}
"""Keys that cannot vary within a sweep, and why."""
OWN = {"evaluate.at_tokens": (), "train.stop_after": None}
"""Keys that a sweep sets itself, and what they are where nobody has set them."""


class Trials:
    """Makes the configuration of any member of a sweep from the values of its trial.

    Raises:
        ConfigError: a searched key or one of its values that no run could have.
    """

    def __init__(self, config: Config, space: Space):
        assert config.sweep is not None
        self._sweep = config.sweep
        self._config = config
        self._plain = {name: value for name, value in config.to_dict().items() if name != "sweep"}
        # Without defaults: a trial may continue an adapter (adapter.from), beside which they may not stand.
        given = {"from" if name == "from_" else name for name in config.adapter.model_fields_set}
        self._plain["adapter"] = {name: self._plain["adapter"][name] for name in given}
        self.levels: tuple[int, ...] = ()
        if self._sweep.folds is not None and config.data.held_out:
            raise ConfigError(
                "sweep.folds holds out each part of the training rows in turn, and data.eval, data.eval_fraction or "
                "data.fold is given too",
                allowed="one of them",
            )
        for key, unset in OWN.items():
            section, name = key.split(".")
            if getattr(getattr(config, section), name) != unset:
                raise ConfigError(
                    f"{key} is given beside sweep, and {FIXED[key]}", next_step=f"leave it out: --set {key}=null"
                )
        for key in space.dimensions:
            if key in FIXED or key.startswith("sweep."):
                raise ConfigError(
                    f"sweep.space varies {key}, and {FIXED.get(key, 'a sweep cannot vary itself')}",
                    next_step="leave it out of sweep.space",
                )
        if "data.train" in space.dimensions and not config.data.eval:
            raise ConfigError(
                f"sweep.space varies data.train, and {COMPARED}",
                next_step="give them apart from the training rows, as data.eval",
            )
        self._tried = {
            key: dimension.listed if isinstance(dimension, Choices) else (dimension.low, dimension.high)
            for key, dimension in space.dimensions.items()
        }
        self.check(lambda config: None)

    def members(self, trial: int) -> list[str]:
        """The names of a trial's members: one for each seed and fold."""
        seeds = [f".seed-{seed + 1}" for seed in range(self._sweep.repeats)] if self._sweep.repeats > 1 else [""]
        folds = [f".fold-{fold + 1}" for fold in range(self._sweep.folds)] if self._sweep.folds else [""]
        return [f"trial-{trial:03d}{seed}{fold}" for seed in seeds for fold in folds]

    def config(self, member: str, values: Mapping[str, Any]) -> Config:
        """The configuration that trains a member alone, as it is trained in the sweep.

        Raises:
            ConfigError: values that do not go together.
        """
        _, *marks = member.split(".")
        place = dict(mark.rsplit("-", 1) for mark in marks)
        given = dict(values)
        seed = given.get("train.seed", self._config.train.seed)
        given["train.seed"] = seed + int(place.get("seed", 1)) - 1
        given["data.split_seed"] = self._split_seed
        given["evaluate.at_tokens"] = list(self.levels)
        if "fold" in place:
            given["data.fold"] = f"{place['fold']}/{self._sweep.folds}"
        # A key that others lie within comes before them, or it would replace what they are laid over.
        return load_config(self._plain, dict(sorted(given.items(), key=lambda pair: pair[0].count("."))))

    def check(self, try_out: Callable[[Config], object]) -> None:
        """Pass each searched value that `try_out` takes, by itself or beside a value of another searched key.

        Raises:
            UserError: what a value is refused for, with the key and the value.
        """
        for key, values in self._tried.items():
            for value in values:
                first = self._fault({key: value}, try_out)
                if first is None:
                    continue
                others = ((other, beside) for other, own in self._tried.items() if other != key for beside in own)
                if all(self._fault({key: value, other: beside}, try_out) is not None for other, beside in others):
                    raise type(first)(
                        f"sweep.space.{key}, value {value!r}: {first.what}",
                        nearest=first.nearest,
                        allowed=first.allowed,
                        next_step=first.next_step,
                    ) from first

    def possible(self, values: Iterable[Mapping[str, Any]], try_out: Callable[[Config], object]) -> list[Config]:
        """The configurations of some trials, without those whose values do not go together or that `try_out` refuses.

        Raises:
            UserError: none of them is one.
        """
        found, first = [], None
        for one in values:
            try:
                config = self.config(self.members(0)[0], one)
                try_out(config)
                found.append(config)
            except UserError as error:
                first = first or error
        if not found and first is not None:
            raise first
        return found

    @property
    def base(self) -> Config:
        """The configuration without the sweep: of its first fold, where there are folds."""
        return self.config(self.members(0)[0], {})

    @property
    def _split_seed(self) -> int:
        # The same rows are held out whatever a member's own seed is.
        own = self._config.data.split_seed
        return self._config.train.seed if own is None else own

    def _fault(self, values: Mapping[str, Any], try_out: Callable[[Config], object]) -> UserError | None:
        try:
            try_out(self.config(self.members(0)[0], values))
        except UserError as error:
            return error
        return None


def levels_of(shares: tuple[float, ...], full_tokens: int, full_steps: int) -> tuple[int, ...]:
    """Counts of trained tokens at which trials are judged, each in a step of its own.

    Raises:
        ConfigError: a budget too small for the rule's levels to differ.
    """
    levels = tuple(max(1, math.ceil(share * full_tokens)) for share in shares)
    steps = [math.ceil(share * full_steps) for share in shares]
    if len(set(steps)) < len(steps) or (steps and steps[-1] >= full_steps):
        raise ConfigError(
            f"a trial makes {full_steps} steps of {full_tokens:,} tokens, too few to be judged at {len(levels)} levels",
            next_step="train longer (train.epochs, train.tokens), or set sweep.stop: none",
        )
    return levels
