"""`manylora inspect DATA`: what a base would be shown of data, what is learned of it, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from manylora.errors import OutputExists

if TYPE_CHECKING:
    from manylora.cli.output import Output
    from manylora.look.asked import Asked
    from manylora.runs.places import Place

SHOWN, ON_PAGE = 3, 100
"""Rows of each source that are printed where no number is asked for, and rows of each on a page."""


def inspect_data(output: Output, place: Place, asked: Asked) -> dict[str, Any]:
    """Print what data hold, write the page where one is asked for, and return the facts.

    Raises:
        UserError: whatever of the data, the base or the options cannot be had. Exit: 2 with `strict` and bad rows.
    """
    from manylora.cli.inspect_text import Screen, show
    from manylora.look.asked import look_of
    from manylora.look.found import find, first_rows
    from manylora.look.page import write_page

    if asked.html is not None and asked.html.exists():
        raise OutputExists(f"{str(asked.html)!r} is there already", next_step="give another --html, or remove it")
    found = find(look_of(place, asked), asked)
    examples = found.asked_for
    if asked.rows or not asked.lines:
        examples = [*first_rows(found.train, SHOWN if asked.rows is None else asked.rows), *examples]
    show(Screen(output), found, examples)
    facts = {"kind": "data"} | found.to_dict()
    if asked.html is not None:
        write_page(asked.html, place.name, found, first_rows(found.train, ON_PAGE))
        output.line(f"page: {asked.html}")
        facts["page"] = asked.html
    if asked.strict and found.num_bad:
        output.finish(facts)
        raise typer.Exit(2)
    return facts
