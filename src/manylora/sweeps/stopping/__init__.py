"""Rules that stop weak trials early; one file each, one line in this table. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from manylora.errors import ConfigError, nearest_names
from manylora.sweeps.stopping.rule import Rule, StopSettings, Verdict
from manylora.table import Table

__all__ = ["RULES", "Rule", "StopSettings", "Verdict", "settings_of"]

RULES: Table[type[Rule]] = Table(
    "stopping rule",
    {
        "none": "manylora.sweeps.stopping.none:RunAll",
        "median": "manylora.sweeps.stopping.median:Median",
        "successive-halving": "manylora.sweeps.stopping.halving:SuccessiveHalving",
        "asha": "manylora.sweeps.stopping.asha:Asha",
    },
)


def settings_of(rule: str, given: Mapping[str, Any]) -> StopSettings:
    """The settings of a rule from the keys written beside it in `sweep.stop`; those not written have their defaults.

    Raises:
        UnknownName: no such rule. ConfigError: a key that no rule has, or that this one does not read, or a value out
            of range.
    """
    reads = RULES.get(rule).reads
    known = [field.name for field in fields(StopSettings)]
    for key, value in given.items():
        if key not in known:
            raise ConfigError(
                f"unknown key 'sweep.stop.{key}' (its value is {value!r})",
                nearest=nearest_names(str(key), known),
                allowed=", ".join(("rule", *known)),
            )
        if key not in reads:
            raise ConfigError(
                f"sweep.stop.{key} is {value!r}, and the rule {rule!r} does not read it",
                allowed=f"{', '.join(sorted(reads))} beside rule: {rule}" if reads else f"nothing beside rule: {rule}",
                next_step=f"leave sweep.stop.{key} out, or choose another rule",
            )
    return StopSettings(**given)
