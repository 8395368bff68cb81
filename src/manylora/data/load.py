"""From the places that a user names to examples: opened, found in the cache or encoded, and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from manylora.base.tokenizer import template_digest, tokenizer_digest
from manylora.data.cache import cached, key_of
from manylora.data.examples import Encoded, Reading, encode
from manylora.data.store import Examples, column_of
from manylora.errors import DataError

if TYPE_CHECKING:
    from manylora.data.batches import Weights
    from manylora.data.example import Example
    from manylora.data.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The examples of one source: what it is called, the digest of its content, how often an epoch shows it."""

    name: str
    digest: str | None
    weight: float
    encoded: Encoded
    from_cache: bool

    def describe(self) -> dict[str, Any]:
        """What a run's manifest says of the source."""
        encoded = self.encoded
        return {
            "name": self.name,
            "content": self.digest,
            "format": encoded.format,
            "rows": encoded.num_rows,
            "examples": len(encoded.examples),
            "weight": self.weight,
            "skipped": [reason.to_dict() for reason in encoded.skipped],
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of several sources, one source after the other."""

    parts: list[Part]

    @property
    def examples(self) -> Examples:
        """All examples, in order."""
        first, *rest = (part.encoded.examples for part in self.parts)
        for more in rest:
            first = first + more
        return first

    @property
    def weights(self) -> Weights:
        """How often an epoch shows each run of examples."""
        return [(len(part.encoded.examples), part.weight) for part in self.parts]

    def notes(self) -> list[str]:
        """What the log says of each source."""
        lines = []
        for part in self.parts:
            held = " (from the cache)" if part.from_cache else ""
            first, *rest = part.encoded.notes
            lines += [f"{part.name}: {first}{held}", *rest]
            if part.weight != 1.0:
                lines.append(f"{part.name}: each epoch shows it {part.weight:g} times")
        return lines


def load_examples(
    sources: Sequence[tuple[Source, float]],
    tokenizer: Any,
    reading: Reading,
    *,
    eos_ids: Sequence[int],
    use_cache: bool = True,
) -> Loaded:
    """The examples of sources, each with its weight; those encoded before are found again, whatever run made them.

    Raises:
        DataError: no source, a row at fault (see `encode`), a source that cannot be read.
    """
    if not sources:
        raise DataError("no data are given", next_step="set data.train to a file or a list of files")
    shared = {
        "reading": asdict(reading),
        "tokenizer": tokenizer_digest(tokenizer),
        "special": {key: str(value) for key, value in getattr(tokenizer, "special_tokens_map", {}).items()},
        "template": template_digest(tokenizer),
        "eos": list(eos_ids),
    }
    parts = []
    for source, weight in sources:
        digest = source.digest()
        # The name is part of the key: messages about an example say where it stands.
        held = {"content": digest, "name": source.name, "columns": dict(source.columns)}
        key = key_of(shared | held) if use_cache and digest else None
        encoded, found = cached(
            key, lambda path, source=source: encode(source.rows(), tokenizer, reading, eos_id=eos_ids, path=path)
        )
        parts.append(Part(name=source.name, digest=digest, weight=weight, encoded=encoded, from_cache=found))
    return Loaded(parts)


def overlap(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """A line for the log where held-out examples share their prompt with an example that is trained on."""
    known = set(map(hash, column_of(train, "group")))
    shared = [place for place, group in enumerate(column_of(held_out, "group")) if hash(group) in known]
    if not shared:
        return []
    line = f"{len(shared)} of {len(held_out)} held-out examples have a prompt that is trained on too, the first is "
    return [f"{line}{held_out[shared[0]].where}: their loss says little about new prompts"]
