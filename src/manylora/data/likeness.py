"""Which examples repeat others, and which held-out prompts are trained on; memory holds a few 8-byte hashes of each.

Two examples are the same where their tokens and classes are; they are alike where their text is the same but for case,
the form of characters, white space, and punctuation at the ends.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.data.store import column_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from manylora.data.example import Example

    Hashes = NDArray[np.uint64]

LARGEST, PLACES = 5, 4
"""Groups that are named, and examples named of each."""
DECODED_AT_ONCE = 1024

Decode = Callable[[list[list[int]]], list[str]]


class Alike:
    """What two texts must have in common to be alike.

    `marks` are the special tokens of a tokenizer: they part a rendered conversation into texts with ends of their own.
    """

    def __init__(self, marks: Iterable[str] = ()):
        found = sorted(filter(None, marks), key=len, reverse=True)
        self._marks = re.compile("|".join(map(re.escape, found))) if found else None

    def __call__(self, text: str) -> str:
        """The text as it is compared: in one case and form, one space between words, no punctuation at the ends."""
        parts = [text] if self._marks is None else self._marks.split(text)
        return "\n".join(part for part in map(_plain, parts) if part)


def _plain(text: str) -> str:
    # Case is folded between two normalisations: each may undo what the other made.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    words = " ".join(text.split())
    start, stop = 0, len(words)
    while start < stop and _is_punctuation(words[start]):
        start += 1
    while stop > start and _is_punctuation(words[stop - 1]):
        stop -= 1
    return words[start:stop] or words  # a text of nothing but punctuation is compared by it


def _is_punctuation(sign: str) -> bool:
    return sign == " " or unicodedata.category(sign)[0] == "P"


@dataclass(frozen=True, slots=True)
class Keys:
    """Hashes (n,) uint64 of each example's tokens, of these with their classes, of its plain text, and of its prompt.

    The two sequences of a preference count as one example; `places` (n,) says where the (first) sequence of each is.
    """

    places: NDArray[np.int64]
    tokens: Hashes
    exact: Hashes
    plain: Hashes
    prompt: Hashes
    plain_prompt: Hashes


def keys_of(examples: Sequence[Example], decode: Decode, alike: Alike) -> Keys:
    """The keys of examples; `decode` gives the texts of several lists of tokens."""
    tokens, exact, plain, prompts, plain_prompts = [], [], [], [], []
    targets = zip(*(column_of(examples, name) for name in ("label", "tags", "variant")), strict=True)
    stream = zip(_token_lists(examples), targets, _prompts(examples), strict=True)
    while chunk := list(islice(stream, DECODED_AT_ONCE)):
        texts = decode([ids for ids, _, _ in chunk])
        for (ids, target, prompt), text in zip(chunk, texts, strict=True):
            bare = np.asarray(ids, np.int32).tobytes()
            plain_prompt = alike(prompt)
            tokens.append(_hash(bare))
            exact.append(_hash(bare, repr(target)))
            # The prompt is compared by itself, for its last sign is none of the whole text's.
            before, found, after = text.partition(prompt) if prompt else (text, "", "")
            plain.append(_hash(alike(before), plain_prompt if found else "", alike(after), repr(target)))
            prompts.append(_hash(prompt))
            plain_prompts.append(_hash(plain_prompt))
    places, seconds = _places(examples)
    hashes = [np.asarray(one, np.uint64) for one in (tokens, exact, plain, prompts, plain_prompts)]
    for one in hashes[:3]:
        one[seconds - 1] = one[seconds - 1] * np.uint64(3) + one[seconds]
    return Keys(places, *(one[places] for one in hashes))


def _prompts(examples: Sequence[Example]) -> Iterator[str]:
    """The prompts; plain text has none, and its own text is what would leak."""
    columns = zip(column_of(examples, "prompt"), column_of(examples, "reference"), strict=True)
    return (prompt or reference for prompt, reference in columns)


def _token_lists(examples: Sequence[Example]) -> Iterator[list[int]]:
    return (ids if isinstance(ids, list) else ids.tolist() for ids in column_of(examples, "tokens"))


def _places(examples: Sequence[Example]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of what counts as an example, and those of the second sequences of preferences."""
    second = np.fromiter((variant == "rejected" for variant in column_of(examples, "variant")), np.bool_)
    return np.flatnonzero(~second), np.flatnonzero(second)


def _hash(*parts: str | bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True, slots=True)
class Group:
    """Examples that share something: how many, the first of them by file and line, and the text of the first."""

    count: int
    places: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Shared:
    """`num_examples` stand in `num_groups` groups; `num_repeats` is how many would go if one of each group stayed."""

    num_examples: int = 0
    num_groups: int = 0
    groups: tuple[Group, ...] = ()

    @property
    def num_repeats(self) -> int:
        return self.num_examples - self.num_groups

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"num_repeats": self.num_repeats}


@dataclass(frozen=True, slots=True)
class Repeats:
    """`exact`: the same tokens and targets. `alike`: the same but for case, white space and punctuation at the ends
    (groups that are not exact alone are named). `answers`: one prompt with several answers. `conflicts`: one sequence
    with several classes."""

    exact: Shared
    alike: Shared
    answers: Shared
    conflicts: Shared

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_dict() for name in ("exact", "alike", "answers", "conflicts")}


def repeats_of(examples: Sequence[Example], keys: Keys, *, has_prompts: bool) -> Repeats:
    """What repeats among examples; `has_prompts`: what comes before an answer is a prompt, and may have several."""
    answers = _shared(examples, keys, keys.prompt, differ=keys.tokens) if has_prompts else Shared()
    return Repeats(
        exact=_shared(examples, keys, keys.exact),
        alike=_shared(examples, keys, keys.plain, name_differing=keys.exact),
        answers=answers,
        conflicts=_shared(examples, keys, keys.tokens, differ=keys.exact),
    )


def _shared(
    examples: Sequence[Example],
    keys: Keys,
    by: Hashes,
    *,
    differ: Hashes | None = None,
    name_differing: Hashes | None = None,
) -> Shared:
    """Groups of examples with one hash; with `differ` only those that hold several of its values.

    `name_differing` chooses which groups are named and leaves the counts alone.
    """
    order = np.argsort(by, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], by[order][1:] != by[order][:-1]])) if len(by) else np.zeros(0, int)
    runs = zip(starts.tolist(), [*starts[1:].tolist(), len(by)], strict=True)
    groups = [order[start:stop] for start, stop in runs if stop - start > 1]
    if differ is not None:
        groups = [group for group in groups if len(np.unique(differ[group])) > 1]
    named = groups
    if name_differing is not None:
        named = [group for group in groups if len(np.unique(name_differing[group])) > 1]
    largest = sorted(named, key=lambda group: (-len(group), int(group[0])))[:LARGEST]
    return Shared(
        num_examples=sum(map(len, groups)),
        num_groups=len(groups),
        groups=tuple(_group(examples, keys.places[group]) for group in largest),
    )


def _group(examples: Sequence[Example], places: NDArray[np.int64]) -> Group:
    first = [examples[int(place)] for place in places[:PLACES]]
    return Group(len(places), tuple(one.where for one in first), first[0].prompt or first[0].reference)


@dataclass(frozen=True, slots=True)
class Leakage:
    """Of `num_examples` held out, how many are trained on: by their prompt, by a prompt alike, with an answer alike.

    `places` names the first of those with a prompt alike, each beside the training example that it is like.
    """

    num_examples: int
    num_prompt: int
    num_prompt_alike: int
    num_whole_alike: int
    places: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def leakage_of(train: Sequence[Example], keys: Keys, held_out: Sequence[Example], held_keys: Keys) -> Leakage:
    """Which held-out examples training sees."""
    near = np.isin(held_keys.plain_prompt, keys.plain_prompt)
    named = []
    for place in np.flatnonzero(near)[:LARGEST].tolist():
        source = int(np.flatnonzero(keys.plain_prompt == held_keys.plain_prompt[place])[0])
        named.append((held_out[int(held_keys.places[place])].where, train[int(keys.places[source])].where))
    return Leakage(
        num_examples=len(held_keys.places),
        num_prompt=int(np.isin(held_keys.prompt, keys.prompt).sum()),
        num_prompt_alike=int(near.sum()),
        num_whole_alike=int(np.isin(held_keys.plain, keys.plain).sum()),
        places=tuple(named),
    )
