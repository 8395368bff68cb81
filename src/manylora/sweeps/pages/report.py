"""report.html of a sweep: which trial won, what its values have to do with it, and what the search has cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from manylora.pages import run as run_page
from manylora.pages.charts import running_mean, short_number
from manylora.pages.page import folded, paragraph, section, table
from manylora.pages.run import Overview, RunFiles
from manylora.runs.console import duration
from manylora.sweeps.leaderboard import (
    Entry,
    finite,
    metric_names,
    ranked,
    searched_keys,
    short,
    short_names,
    tally,
    values_text,
)
from manylora.sweeps.ledger import SWEEP_FILE
from manylora.sweeps.pages.charts import MemberCurve, importance_bars, member_curves, spread_chart
from manylora.sweeps.pages.parallel import parallel_coordinates
from manylora.sweeps.pages.shades import STYLE, key

ROWS_SHOWN = 20
"""Rows of the leaderboard that are open; the others unfold."""
TRIALS_WITH_SPREAD = 20
SMOOTHED_SHARE = 0.05
TRIALS_PER_KEY, FEWEST_TRIALS = 8, 20
"""Finished trials below which importances are mostly chance; a rule of thumb, and the page says so."""


def write_report(run: str | Path) -> Path:
    """Write report.html of a run folder and return where it is; without sweep.json in it, the page of a plain run.

    Raises:
        CheckpointBroken: events.jsonl is damaged before its last line. DiskFull: no space.
    """
    path = Path(run) / SWEEP_FILE
    if not path.exists():
        return run_page.write_report(run)
    files = run_page.read_run(run)
    return run_page.write_page(files, _overview(files, json.loads(path.read_text(encoding="utf-8"))))


def _overview(files: RunFiles, sweep: Mapping[str, Any]) -> Overview:
    order = ranked(Entry.from_dict(plain) for plain in sweep.get("entries") or [])
    best = _winner(order, sweep)
    num_ranked = sum(finite(entry.loss) is not None for entry in order)
    colours = key(winner=best is not None, without_loss=num_ranked < len(order)) if order else ""
    return Overview(
        kind="sweep",
        state=_state(files, order, sweep),
        facts=list(_facts(files, order, best, sweep)),
        html=(
            section("Leaderboard", *_leaderboard(order, best)),
            section("Searched values", colours, parallel_coordinates(order, best.trial if best else None)),
            section("Curves of all members", _curves(files, order, best, num_ranked, sweep)),
            section("What the searched keys explain", *_importances(order, sweep)),
            section("What early stop saved", *_savings(order, sweep)),
            section("Spread over members", *_spread(order)),
        ),
        style=STYLE,
        member=best.member if best else None,
    )


def _winner(order: Sequence[Entry], sweep: Mapping[str, Any]) -> Entry | None:
    """The trial that the sweep has chosen; before it has, the one in front."""
    chosen = (sweep.get("winner") or {}).get("trial")
    front = order[0] if order and finite(order[0].loss) is not None else None
    return next((entry for entry in order if entry.trial == chosen), front)


def _rule(sweep: Mapping[str, Any]) -> str:
    stop = sweep.get("stop") or "none"
    return str(stop.get("rule", "none") if isinstance(stop, Mapping) else stop)


def _state(files: RunFiles, order: Sequence[Entry], sweep: Mapping[str, Any]) -> str:
    trials, ended = sweep.get("trials") or len(order), sum(entry.ended for entry in order)
    stop = "" if _rule(sweep) == "none" else f" with {_rule(sweep)}"
    state = "finished" if files.summary else f"unfinished, {ended} of {trials} trials have ended"
    return f"{sweep.get('search', 'search')} search of {trials} trials{stop}, {state}"


def _facts(
    files: RunFiles, order: Sequence[Entry], best: Entry | None, sweep: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    if best is not None and (loss := finite(best.loss)) is not None:
        base = (files.summary.get("base_eval") or {}).get("loss")
        before = f", base {base:.4g}" if isinstance(base, (int, float)) else ""
        yield "Best eval loss", f"{loss:.4f}", f"trial {best.trial}{before}"
    yield "Trials", str(sweep.get("trials") or len(order)), tally(order)
    tokens, full = _tokens(order, sweep)
    yield "Trained tokens", short_number(tokens), f"all trials to their end: {short_number(full)}" if full else ""
    if saved := _saved(order):
        yield "Saved by early stop", f"{saved / full:.0%}" if full else short_number(saved), "of those tokens"
    summary = files.summary
    times = [record["time"] for record in files.events if "time" in record]
    wall = summary.get("wall_s", times[-1] - times[0] if times else None)
    if wall is not None:
        speed = summary.get("tokens_per_s")
        yield "Time", duration(wall), f"{speed:,.0f} tokens per second" if speed is not None else ""
    if summary.get("peak_bytes"):
        yield "Peak memory", f"{summary['peak_bytes'] / 2**30:.3g} GiB", ""


def _tokens(order: Sequence[Entry], sweep: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens that all trials have trained, and those that all of them would have, run to their end."""
    trained, full = sum(entry.tokens for entry in order), sum(entry.full_tokens for entry in order)
    return sweep.get("tokens") or trained, sweep.get("full_tokens") or full


def _saved(order: Sequence[Entry]) -> int:
    """What stopped trials did not train; not what a retired one lost, nor what is still to come."""
    return sum(max(0, entry.full_tokens - entry.tokens) for entry in order if entry.state == "stopped")


def _leaderboard(order: Sequence[Entry], best: Entry | None) -> Iterator[str]:
    keys, metrics = searched_keys(order), metric_names(order)
    spread = any(finite(entry.spread) is not None for entry in order)
    head = ["place", "trial", "state", "tokens", "eval loss", *(["spread"] if spread else []), *metrics]
    rows = []
    for place, entry in enumerate(order, start=1):
        numbers = [entry.loss, *([entry.spread] if spread else []), *(entry.metrics.get(name) for name in metrics)]
        values = [short(entry.values[key]) if key in entry.values else "-" for key in keys]
        row = [str(place), str(entry.trial), entry.state, f"{entry.tokens:,}", *map(_number, numbers), *values]
        rows.append(row)
    head += short_names(keys)
    yield table(head, rows[:ROWS_SHOWN], "ranks led" if order and order[0] is best else "ranks")
    yield folded(f"{len(rows) - ROWS_SHOWN} more trials", table(head, rows[ROWS_SHOWN:], "ranks"))
    early = [entry for entry in order if entry.reason]
    why = table(("trial", "state", "reason"), ((f"{e.trial}", e.state, e.reason) for e in early), "facts")
    yield folded("Why trials wait or ended early", why)
    if rows:
        once = "" if spread else " Each trial was trained once: a small lead may be chance (sweep.repeats tells)."
        yield paragraph(f"leaderboard.csv holds every value in full, best first.{once}", "soft small")


def _number(value: float | None) -> str:
    value = finite(value)
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10_000 else f"{value:,.0f}"


def _curves(
    files: RunFiles, order: Sequence[Entry], best: Entry | None, num_ranked: int, sweep: Mapping[str, Any]
) -> str:
    tokens: dict[str, dict[int, float]] = {}
    losses: dict[str, dict[str, dict[int, float]]] = {"step": {}, "eval": {}}
    for record in files.events:
        kind, member = record.get("event"), str(record.get("member"))
        if kind == "step":
            tokens.setdefault(member, {})[record["step"]] = record["tokens"]
        if kind in losses and isinstance(record.get("loss"), (int, float)):
            losses[kind].setdefault(member, {})[record["step"]] = record["loss"]
    levels = [] if _rule(sweep) == "none" else [float(level) for level in sweep.get("levels") or []]
    charts = []
    for title, kind in (("Eval loss", "eval"), ("Training loss", "step")):
        curves = []
        for place, entry in enumerate(order):
            for member in entry.members:
                found, at = losses[kind].get(member, {}), tokens.get(member, {})
                # an evaluation stands at what its member had trained by then
                points = sorted((float(at[step]), loss) for step, loss in found.items() if step in at)
                if points:
                    smooth = points if kind == "eval" else running_mean(points, SMOOTHED_SHARE)
                    end, last = points[-1]
                    text = f"{member}: {title.lower()} {last:.5g} after {end:,.0f} tokens; {values_text(entry)}"
                    curves.append(MemberCurve(text, smooth, place, won=best is not None and entry is best))
        title = title if kind == "eval" else f"{title}, smoothed"
        charts.append(member_curves(title, curves, num_ranked=num_ranked, levels=levels))
    drawn = "".join(charts)
    return f'<div class="curves">{drawn}</div>' if drawn else ""


def _importances(order: Sequence[Entry], sweep: Mapping[str, Any]) -> Iterator[str]:
    shares = {str(name): float(share) for name, share in (sweep.get("importances") or {}).items()
              if share is not None and math.isfinite(share)}  # fmt: skip
    if not shares:
        return
    finished = sum(entry.state == "done" and finite(entry.loss) is not None for entry in order)
    enough = max(FEWEST_TRIALS, TRIALS_PER_KEY * len(shares))
    if finished < enough:
        yield paragraph(
            f"Only {finished} trials were trained to their end. With {len(shares)} searched keys, shares from fewer "
            f"than about {enough} are mostly chance: do not decide by them.",
            "notice",
        )
    yield importance_bars(shares)
    yield paragraph(
        "The share of the differences in eval loss, among the trials that were trained to their end, that goes with "
        "each key. A large share says that the choice of this key matters within the searched range, not which value "
        "is best, and nothing about values outside. Keys that only matter together can both look unimportant.",
        "soft small",
    )
    if any(entry.state == "stopped" for entry in order):
        yield paragraph(
            "Stopped trials do not count here, so a key whose bad values are stopped early looks less important "
            "than it is.",
            "soft small",
        )


def _savings(order: Sequence[Entry], sweep: Mapping[str, Any]) -> Iterator[str]:
    stopped = [entry for entry in order if entry.state == "stopped"]
    if _rule(sweep) == "none" and not stopped:
        return
    (tokens, full), saved = _tokens(order, sweep), _saved(order)
    so_far = "" if order and all(entry.ended for entry in order) else " so far"
    share = f" ({saved / full:.0%})" if full else ""
    yield paragraph(
        f"{len(stopped)} of {sweep.get('trials') or len(order)} trials were stopped{so_far}. "
        f"Trained: {tokens:,} tokens; all trials to their end: {full:,}. "
        f"What the stopped ones did not train: {saved:,}{share}."
    )
    levels = sorted(float(level) for level in sweep.get("levels") or [])
    if levels:
        at = [_last_level(entry, levels) for entry in order]
        rows = []
        for number, level in enumerate(levels):
            reached = [entry for entry, last in zip(order, at, strict=True) if last >= number]
            here = [entry for entry, last in zip(order, at, strict=True) if last == number]
            counts = [sum(entry.state == state for entry in here) for state in ("stopped", "waiting")]
            rows.append([f"{level:,.0f} tokens", str(len(reached)), *map(str, counts), str(len(reached) - sum(counts))])
        yield table(("judged at", "reached", "stopped there", "wait there", "went on"), rows, "numbers")
    yield paragraph(
        "A stopped trial might have caught up: early stop trades that risk for the tokens. The losses of stopped "
        "trials are those at which they were stopped, after less training than the others had.",
        "soft small",
    )


def _last_level(entry: Entry, levels: Sequence[float]) -> int:
    """The number of the last level that the trial has reached, -1 for none."""
    each = entry.tokens / max(1, len(entry.members))
    return sum(level <= each * (1 + 1e-9) for level in levels) - 1


def _spread(order: Sequence[Entry]) -> Iterator[str]:
    several = [entry for entry in order if finite(entry.loss) is not None and finite(entry.spread) is not None]
    if not several:
        return
    first, *others = several
    if others:
        near = [entry for entry in others if _close(first, entry)]
        lead = f"Trial {first.trial} leads trial {others[0].trial} by {_gap(first, others[0]):.4f}. "
        if near:
            names = ", ".join(str(entry.trial) for entry in near[:8]) + (", ..." if len(near) > 8 else "")
            lead += f"Its lead over {len(near)} trials is within two standard errors, so it may be chance: {names}."
        else:
            lead += "Its lead over every other trial is more than two standard errors."
        yield paragraph(lead)
    yield f'<div class="narrow">{spread_chart(several[:TRIALS_WITH_SPREAD])}</div>'
    yield paragraph(
        "Members of a trial differ in seed or fold alone. Folds share training rows, so their spread is "
        "smaller than that of independent repeats would be.",
        "soft small",
    )


def _gap(first: Entry, other: Entry) -> float:
    return (other.loss or 0.0) - (first.loss or 0.0)


def _close(first: Entry, other: Entry) -> bool:
    """Whether the means of two trials differ by no more than two standard errors of their difference."""
    errors = [(entry.spread or 0.0) ** 2 / max(1, len(entry.members)) for entry in (first, other)]
    return _gap(first, other) <= 2.0 * math.sqrt(sum(errors))
