"""What is scored: an input, its references, and an answer."""

from __future__ import annotations

from dataclasses import dataclass

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """One input, every reference that the data has for it, and the text that a slot answered with."""

    prompt: str
    references: tuple[str, ...]
    text: str
