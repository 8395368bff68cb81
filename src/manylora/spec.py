"""What an adapter is, before it has any factors: method, rank, scale, and the sites it stands on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from manylora.errors import SpecError

Value = TypeVar("Value")


def match_pattern(patterns: Mapping[str, Value], site: str) -> Value | None:
    """The value of the first pattern that the end of a site's name matches, or None.

    Semantics: `re.match(rf"(.*\\.)?({pattern})$", site)`, PEFT's rule for `rank_pattern` and `alpha_pattern`.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", site):
            return value
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """A low-rank adapter as a value; it names sites by pattern and says nothing of a particular base.

    `sites` and `exclude` hold module-name endings (`q_proj`, `self_attn.q_proj`), globs (`*.layers.[0-3].*`), regular
    expressions (`re:...`) and the groups `all-linear` and `everything`. `full_sites` are trained as whole copies.
    `dropout` is a probability, applied to the input of the low-rank branch only. `quantize` (`int8`, `int4`) trains the
    factors on the grid on which they are to be stored. `outputs` is how many numbers the heads give that the base
    lacks, where it lacks any.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    scale_rule: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    init: str = "default"
    dropout: float = 0.0
    quantize: Literal["int8", "int4"] | None = None
    sites: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    full_sites: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    outputs: int | None = None

    def __post_init__(self) -> None:
        ranks = {"rank": self.rank, **{f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}}
        for where, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise SpecError(f"{where} is {rank!r}", allowed="a whole number of at least 1", next_step="try 8 or 16")
        alphas = {
            "alpha": self.alpha,
            **{f"alpha_pattern[{key!r}]": value for key, value in self.alpha_pattern.items()},
        }
        for where, alpha in alphas.items():
            if not math.isfinite(alpha) or alpha <= 0:
                raise SpecError(f"{where} is {alpha!r}", allowed="a finite number above 0", next_step="try 2 * rank")
        if not 0.0 <= self.dropout < 1.0:
            raise SpecError(f"dropout is {self.dropout!r}", allowed="at least 0 and below 1", next_step="try 0.05")
        if self.quantize not in (None, "int8", "int4"):
            raise SpecError(f"quantize is {self.quantize!r}", allowed="int8, int4, null")
        if self.scale_rule not in ("alpha/rank", "alpha/sqrt(rank)"):
            raise SpecError(f"scale_rule is {self.scale_rule!r}", allowed="alpha/rank, alpha/sqrt(rank)")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise SpecError(f"the pattern {pattern!r} is no regular expression: {error}") from error

    def rank_at(self, site: str) -> int:
        """The rank at a site, before any cap that the site's own size sets."""
        return match_pattern(self.rank_pattern, site) or self.rank

    def scale(self, site: str) -> float:
        """The factor s of W + s B A at a site. This is the only place where it is computed.

        Source: LoRA (2106.09685) section 4.1 for alpha/rank; rsLoRA (2312.03732) for alpha/sqrt(rank).
        """
        rank = self.rank_at(site)
        alpha = match_pattern(self.alpha_pattern, site)
        alpha = self.alpha if alpha is None else alpha
        return alpha / rank if self.scale_rule == "alpha/rank" else alpha / math.sqrt(rank)

    def with_rank_at(self, site: str, rank: int) -> AdapterSpec:
        """The same spec with another rank at one site and the scale there unchanged."""
        scale, key = self.scale(site), re.escape(site)
        alpha = scale * rank if self.scale_rule == "alpha/rank" else scale * math.sqrt(rank)
        # The new entries come first: the first pattern that matches wins.
        return replace(
            self,
            rank_pattern={key: rank} | {k: v for k, v in self.rank_pattern.items() if k != key},
            alpha_pattern={key: alpha} | {k: v for k, v in self.alpha_pattern.items() if k != key},
        )

    def with_ranks_times(self, factor: int) -> AdapterSpec:
        """The same spec with every rank a whole number of times as large and the scale at every site unchanged."""
        share = factor if self.scale_rule == "alpha/rank" else math.sqrt(factor)
        return replace(
            self,
            rank=factor * self.rank,
            alpha=share * self.alpha,
            rank_pattern={key: factor * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: share * alpha for key, alpha in self.alpha_pattern.items()},
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterSpec:
        """The spec that `to_dict` wrote."""
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain lists, dicts and numbers."""
        return {
            name: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for name in self.__slots__
            for value in (getattr(self, name),)
        }
