"""What is known of data in lines of text, for the terminal and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.data.pieces import harmless

if TYPE_CHECKING:
    from manylora.data.balance import Balance, Classes
    from manylora.data.example import Example
    from manylora.data.likeness import Leakage, Repeats, Shared
    from manylora.data.survey import Lengths
    from manylora.look.found import Found

BAR, EXCERPT = 40, 64
BLOCKS = "".join(map(chr, (0x20, *range(0x258F, 0x2588, -1))))
"""From nothing to seven eighths of a block."""
FULL, LINE_END = "\N{FULL BLOCK}", "\N{RETURN SYMBOL}"


def facts_of(found: Found) -> dict[str, str]:
    """The numbers that come first."""
    survey, look = found.survey, found.look
    totals, packed = survey.totals, survey.packed
    facts = {"data": ", ".join(part.name for part in found.train.parts)}
    if found.held_out is not None:
        facts["held out"] = ", ".join(part.name for part in found.held_out.parts)
    facts["base"] = look.base + (" (as none is named: its tokenizer makes the tokens)" if look.base_is_default else "")
    facts["format"] = ", ".join(dict.fromkeys(part.encoded.format for part in found.train.parts))
    facts["rows"] = f"{sum(part.encoded.num_rows for part in found.train.parts):,}"
    pairs = " (a chosen and a rejected one of each row)" if survey.balance.answers else ""
    facts["examples"] = f"{totals.num_examples:,}{pairs}"
    if survey.held_out is not None:
        facts["held-out examples"] = f"{survey.held_out.num_examples:,}"
    facts["tokens"] = f"{totals.num_tokens:,}"
    learns_class = not totals.num_trained
    facts["trained tokens"] = "none: the class of each text is learned" if learns_class else (
        f"{totals.num_trained:,} ({totals.share_trained:.1%})"
    )  # fmt: skip
    facts["longest example"] = f"{totals.longest:,} tokens, {totals.mean:,.1f} on average"
    trained = "" if learns_class else f", {packed.share_trained:.1%} are trained"
    facts["packed"] = (
        f"{counted(packed.num_rows, 'row')} of {packed.row_tokens:,} tokens: {packed.share_used:.1%} of the computed "
        f"tokens are no padding{trained}"
    )
    return facts


def counted(number: int, what: str) -> str:
    """A number of things: "1 row", "2 rows"."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def title_of(example: Example) -> str:
    """Where an example comes from, and what belongs to it besides its tokens."""
    more = [example.variant] if example.variant else []
    more += [f"label {example.label}"] if example.label is not None else []
    trained = f", {example.num_trained:,} trained" if example.num_trained else ""
    return "  ".join([example.where, *more, f"({len(example):,} tokens{trained})"])


def histogram(lengths: Lengths, fancy: bool) -> list[str]:
    """A line for each bin: its lengths, how many examples have them, a bar, and what lies in it.

    The bins below the shortest example are left out.
    """
    marks = [(value, f"p{percent}") for percent, value in lengths.percentiles.items()]
    marks += [(lengths.limit, f"row_tokens {lengths.limit:,}")]
    most = max(lengths.counts)
    rows = []
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        inside = [name for value, name in marks if low < value <= high]
        if not (rows or count or inside):
            continue
        bar = _bar(count / most, fancy)
        rows.append(
            (f"{low + 1:,} to {high:,}", f"{count:,}", f"{bar:<{BAR}}", f"< {', '.join(inside)}" * bool(inside))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"  {row[0]:>{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}  {row[3]}".rstrip() for row in rows]


def _bar(share: float, fancy: bool) -> str:
    if not fancy:
        return "#" * max(round(share * BAR), 1 if share else 0)
    eighths = max(round(share * BAR * 8), 1 if share else 0)
    return FULL * (eighths // 8) + BLOCKS[eighths % 8].strip()


def length_line(lengths: Lengths) -> str:
    """The percentiles, the longest, and how many do not fit a row."""
    parts = [f"p{percent} {value:,}" for percent, value in lengths.percentiles.items()]
    parts.append(f"longest {lengths.longest:,}")
    if lengths.above:
        parts.append(f"{lengths.above:,} are above row_tokens {lengths.limit:,}")
    return ", ".join(parts)


def repeat_lines(repeats: Repeats) -> list[str]:
    """What repeats, the largest groups with their places."""
    lines = _repeat_lines("the same tokens", repeats.exact)
    if repeats.alike.num_repeats > repeats.exact.num_repeats:
        lines += _repeat_lines("alike but for case, white space and punctuation at the ends", repeats.alike)
    if repeats.conflicts.num_groups:
        lines += _group_lines("the same tokens with several classes", repeats.conflicts)
    if repeats.answers.num_groups:
        lines += _group_lines("the same prompt with several answers", repeats.answers)
    return lines


def _repeat_lines(what: str, shared: Shared) -> list[str]:
    if not shared.num_groups:
        return [f"{what}: none"]
    first, *rest = _group_lines(what, shared)
    return [f"{first}; {shared.num_repeats:,} repeat an earlier one", *rest]


def _group_lines(what: str, shared: Shared) -> list[str]:
    lines = [f"{what}: {shared.num_examples:,} examples in {counted(shared.num_groups, 'group')}"]
    for group in shared.groups:
        more = ", ..." if group.count > len(group.places) else ""
        lines.append(f"  {group.count:,} times: {', '.join(group.places)}{more}")
        lines.append(f"    {excerpt(group.text)}")
    return lines


def excerpt(text: str) -> str:
    """The beginning of a text on one line."""
    line = harmless(" ".join(text.split()), keep="")
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}..."


def leakage_lines(leakage: Leakage) -> list[str]:
    """How much of what is held out is trained on, the first of it with its places."""
    counts = {
        "have a prompt that is trained on": leakage.num_prompt,
        "have a prompt alike but for case, white space and punctuation at the ends": leakage.num_prompt_alike,
        "have their prompt and answer alike in training": leakage.num_whole_alike,
    }
    total = leakage.num_examples
    if not any(counts.values()):
        return [f"none of {total:,} has a prompt that is trained on, nor one that is alike"]
    lines = [f"{count:,} of {total:,} ({count / total:.1%}) {what}" for what, count in counts.items()]
    return lines + [f"  {held} is like {trained}" for held, trained in leakage.places]


def classes_of(balance: Balance) -> list[tuple[str, Classes]]:
    """The tables of classes, each with its title."""
    tables = (("classes", balance.labels), ("tags", balance.tags), ("entities", balance.entities))
    return [(title, classes) for title, classes in tables if classes is not None]


def balance_line(classes: Classes) -> str:
    """How many classes there are, and how unequal they are."""
    return (
        f"{len(classes.counts):,}, {classes.total:,} in all; the most frequent comes {classes.imbalance:,.1f} times as "
        "often as the rarest"
    )


def answers_line(balance: Balance) -> str:
    """How long chosen answers are beside rejected ones."""
    answers = balance.answers
    if answers is None:
        return ""
    return (
        f"answers: chosen ones have {answers.chosen:,.1f} trained tokens on average, rejected ones "
        f"{answers.rejected:,.1f} (ratio {answers.ratio:.2f}); the chosen one is longer in {answers.chosen_longer:.1%} "
        f"of the rows, as long in {answers.same_length:.1%}"
    )
