"""The demo's own measure: how many of the attribute values that a prompt gives does the sentence name?

A prompt of the E2E data is `name : The Eagle | price : cheap | family friendly : yes`, its answer a sentence that says
all of it. A value counts as named where the sentence has its words or one of the phrases below that mean the same,
whatever the case, the accents, the spelling of centre, and the spaces, hyphens and pound signs in between. Prices and
ratings given as bare words (`high`) count beside a word of price or rating only, and whether families are welcome is
named where it is said, negation and all. It looks for words, not for truth: a sentence that adds things loses nothing.
"""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.evaluation.sample import Sample

_ALIKE = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "center": "centre"}

_PRICE = r"(?:pric\w*|cost\w*|expens\w*)"
_RATING = r"(?:rat(?:e|es|ed|ing|ings)|review\w*|customers?|scor\w*|stars?|starred|feedback|quality|standards?)"


def _beside(words: str, cue: str) -> str:
    """A pattern of one of the words, at most four other words before or after a cue."""
    return rf"(?:{words})(?: \w+){{0,4}} {cue}|{cue}(?: \w+){{0,4}} (?:{words})"


_FIVE = "(?<!out of )5"  # not the last word of `1 out of 5`
_MORE = r"more than|over|above|at least|starting at|upwards? of|exceed\w*"
_CHEAP = rf"cheap\w*|inexpensive\w*|affordabl\w*|budget|{_beside('low|lower', _PRICE)}"

# What says the same as a value, as patterns of whole words in text that `_words` has made plain.
_PHRASES = {
    ("type", "coffee shop"): r"coffee ?(?:shops?|house)|cafe",
    ("area", "city centre"): r"(?:city|town) centre|(?:centre|middle|heart) of (?:the )?(?:city|town)",
    ("area", "riverside"): r"river ?(?:side|front|bank)?|waterfront",
    ("food", "english"): r"english|british",
    ("price", "cheap"): _CHEAP,
    ("price", "moderate"): rf"moderate\w*|{_beside('average|mid|middle|medium|reasonabl[ey]|fair(?:ly)?', _PRICE)}",
    ("price", "high"): rf"(?<!not )expensive|pricey|costly|upscale|{_beside('high|higher|highly', _PRICE)}",
    ("price", "less than 20"): rf"(?:less|lower|cheaper) than 20|under 20|below 20|{_CHEAP}",
    ("price", "20 25"): r"20 (?:(?:to|and|or) )?25",
    ("price", "more than 30"): rf"(?:{_MORE}) 30|30 (?:plus|and up)",
    ("customer rating", "low"): _beside("low|lower|poor|poorly|bad|badly|1", _RATING),
    ("customer rating", "average"): _beside("average|averagely|moderate|moderately|decent|medium|3", _RATING),
    ("customer rating", "high"): _beside("high|higher|highly|excellent|excellently|great|top|" + _FIVE, _RATING),
    ("customer rating", "1 out of 5"): rf"1 (?:out )?of 5|{_beside('1', _RATING)}",
    ("customer rating", "3 out of 5"): rf"3 (?:out )?of 5|{_beside('3', _RATING)}",
    ("customer rating", "5 out of 5"): rf"5 (?:out )?of 5|{_beside(_FIVE, _RATING)}",
}

_FAMILY = r"\b(?:famil(?:y|ies)|kids?|child|childrens?)\b"
_REFUSED = r"\b(?:not?|non|t|never|without|unfriendly|unsuitable|cannot|lacks?)\b"  # t: what is left of isn't
_ADULTS = r"\b(?:adults?|grown ups?)\b"


def attributes(prompt: str) -> dict[str, str]:
    """The values that a prompt gives, by attribute in lower case, in the prompt's order."""
    pairs = (part.split(":", 1) for part in prompt.split("|") if ":" in part)
    return {key.strip().lower(): value.strip() for key, value in pairs}


def missing_attributes(prompt: str, text: str) -> dict[str, str]:
    """The attributes of a prompt whose values the text does not name."""
    return {key: value for key, value in attributes(prompt).items() if not _is_named(key, value, text)}


def named_values(prompt: str, text: str) -> tuple[int, int]:
    """How many of the prompt's values the text names, and how many there are."""
    given = len(attributes(prompt))
    return given - len(missing_attributes(prompt, text)), given


def share_named(samples: Sequence[Sample]) -> float:
    """The share, 0 to 1, of all values given by the samples' prompts that their texts name; 0 where none is given."""
    pairs = [named_values(sample.prompt, sample.text) for sample in samples]
    given = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / given if given else 0.0


def _is_named(key: str, value: str, text: str) -> bool:
    if key == "family friendly":
        return _says_families(text) == value.lower()
    wanted = _words(value)
    pattern = _PHRASES.get((key, wanted)) or re.escape(wanted.removeprefix("the "))
    return re.search(rf"\b(?:{pattern})\b", _words(text)) is not None


def _says_families(text: str) -> str | None:
    """`yes`, `no`, or None where a text says nothing of families and children."""
    said = None
    for clause in re.split(r"[.,;!?]|\b(?:but|although|however|yet|though)\b", text.lower()):
        words = _words(clause)
        if re.search(_FAMILY, words):
            if re.search(_REFUSED, words):
                return "no"
            said = "yes"
        elif re.search(_ADULTS, words):
            said = said or "no"
    return said


def _words(text: str) -> str:
    """Lower-case words and numbers, one space between them; accents, hyphens and signs gone."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words: list[str] = re.findall(r"[a-z0-9]+", plain)
    return " ".join(_ALIKE.get(word, word) for word in words)
