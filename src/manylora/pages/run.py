"""report.html: a run on one self-contained page, from the files in its folder; also while the run goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

from manylora.files import write_text_atomic
from manylora.pages.charts import Curve, legend, line_chart, short_number
from manylora.pages.page import code, folded, page, paragraph, section, table, tiles
from manylora.runs.console import duration
from manylora.runs.events import read_events

FILE_NAME = "report.html"
MOST_SAMPLES = 24
LONGEST_PROMPT_TO_TYPE = 160
MOST_FAINT_CURVES = 3
"""Members up to which a noisy curve shows its single steps behind its running mean."""
FEWEST_TO_SMOOTH = 100
"""Points below which the running mean would be the curve itself."""
NOT_METRICS = {"event", "member", "step", "tick", "time", "tokens", "tokens_per_s", "memory_bytes", "wall_s"}
TITLES = {"loss": "Loss", "perplexity": "Perplexity", "bleu": "BLEU", "chrf": "chrF", "ter": "TER"}

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run folder holds; a file that is not there yet is empty here."""

    folder: Path
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    config: str
    manifest: dict[str, Any]
    samples: list[dict[str, Any]]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.events if record.get("event") == event]

    def members(self) -> list[str]:
        named = [str(record["member"]) for record in self.events if record.get("member") is not None]
        return list(dict.fromkeys([*named, *self.summary.get("adapters", {})]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What the page of a run of many members shows where a single one shows its own state, numbers and curves.

    `facts` are tiles of (name, value, remark), `html` the sections in the place of the curves, `style` the rules that
    they add to the style sheet. `member` is the one whose results are shown, None while there is none.
    """

    kind: str
    state: str
    facts: Sequence[tuple[str, str, str]]
    html: Sequence[str]
    style: str
    member: str | None


def write_report(run: str | Path) -> Path:
    """Write a run folder's report.html and return where it is; what the run has not written yet is left out.

    Raises:
        CheckpointBroken: events.jsonl is damaged before its last line. DiskFull: no space.
    """
    return write_page(read_run(run))


def write_page(run: RunFiles, overview: Overview | None = None) -> Path:
    """Write report.html from what was read, and return where it is.

    Raises:
        DiskFull: no space.
    """
    member = overview.member if overview else None
    curves = overview.html if overview else (section("Curves", legend(run.members()), _curves(run)),)
    parts = [
        _header(run, overview),
        # of many members, the winner's results come after the leaderboard that says why it is the winner
        *(curves if overview else ()),
        section(f"Results of {member}" if member else "Results", _results(run, member)),
        *(() if overview else curves),
        section("Before and after", *_samples(run)),
        section("Use the adapter", _usage(run)),
        section("Settings", folded("config.yaml", code(run.config)) if run.config else ""),
        section("Machine and versions", _manifest(run)),
        "<footer>Written by manylora from the files in this folder. Hover over a curve for its numbers.</footer>",
    ]
    path = run.folder / FILE_NAME
    html = "\n".join(part for part in parts if part)
    style = overview.style if overview else ""
    write_text_atomic(path, page(f"{run.folder.name} - manylora", html, style=style))
    return path


def read_run(run: str | Path) -> RunFiles:
    """What a run folder holds, also while the run goes on.

    Raises:
        CheckpointBroken: events.jsonl is damaged before its last line.
    """
    run = Path(run)
    config = run / "config.yaml"
    return RunFiles(
        folder=run.absolute(),
        events=read_events(run),
        summary=_read_json(run / "summary.json"),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        manifest=_read_json(run / "manifest.json"),
        samples=list(_read_samples(run / "samples.jsonl")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        # like the event log, the file of a live run may end in a line that is being written
        for line in path.read_bytes().split(b"\n")[:-1]:
            if line.strip():
                yield json.loads(line)


def _header(run: RunFiles, overview: Overview | None) -> str:
    times = [record["time"] for record in run.events if "time" in record]
    when = f"{datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else ""
    state, ends = (overview.state, []) if overview else (_state(run), _ends(run))
    line = ", ".join(part for part in (_setup(run), state, when) if part)
    return "\n".join(
        [
            f'<header>\n<div class="kicker">manylora {escape(overview.kind if overview else "run")}</div>',
            f"<h1>{escape(run.folder.name)}</h1>",
            paragraph(line, "soft"),
            *(paragraph(text, "notice") for text in ends),
            tiles(overview.facts if overview else _headline(run)),
            "</header>",
        ]
    )


def _state(run: RunFiles) -> str:
    steps = max((record["step"] for record in run.of("step")), default=0)
    return "finished" if run.summary else f"unfinished, {steps:,} steps so far"


def _ends(run: RunFiles) -> list[str]:
    return [_early_end(record) for record in [*run.of("retired"), *run.of("done")] if record.get("reason")]


def _setup(run: RunFiles) -> str:
    """One phrase for what was trained on what."""
    import yaml

    config = yaml.safe_load(run.config) if run.config else None
    if not isinstance(config, dict) or "base" not in config:
        return ""
    adapter = config.get("adapter") or {}
    method = str(adapter.get("method", "adapter"))
    rank = f" of rank {adapter['rank']}" if "rank" in adapter and method != "full" else ""
    base = str(config["base"])
    # the last part of a long path says enough here; the settings below hold all of it
    return f"{method}{rank} on {Path(base).name if base.startswith('/') else base}"


def _early_end(record: Mapping[str, Any]) -> str:
    ended = "was retired" if record["event"] == "retired" else "stopped early"
    return f"{record.get('member', 'A member')} {ended} after step {record.get('step', '?')}: {record['reason']}"


def _headline(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    bases = _by_member(run.summary.get("base_eval"))
    scores = _by_member(run.summary.get("eval"))
    if len(scores) == 1:
        member, numbers = next(iter(scores.items()))
        base = _base_of(bases, member)
        for name, value in numbers.items():
            if name not in NOT_METRICS:
                remark = f"base {_figure(base[name])}" if name in base else ""
                yield _eval_title(name) if name == "loss" else _title(name), _figure(value), remark
    steps = run.of("step")
    last = steps[-1] if steps else {}
    wall = run.summary.get("wall_s")
    if wall is None and len(steps) > 1:
        wall = last["time"] - steps[0]["time"]
    if wall is not None:
        yield "Time", duration(wall), ""
    tokens, speed = (run.summary.get(name, last.get(name)) for name in ("tokens", "tokens_per_s"))
    if tokens is not None:
        yield "Trained tokens", short_number(tokens), f"{speed:,.0f} per second" if speed is not None else ""
    peak = run.summary.get("peak_bytes", max((r.get("memory_bytes") or 0 for r in steps), default=0))
    if peak:
        yield "Peak memory", _bytes(peak), ""
    count, whole = run.summary.get("trainable_parameters"), run.summary.get("base_parameters")
    if count is not None:
        share = f"{count / whole:.2%} of the base's" if whole else f"{count:,} trained"
        yield "Trained weights", short_number(count), share


def _results(run: RunFiles, only: str | None) -> str:
    bases = _by_member(run.summary.get("base_eval"))
    rows = []
    scores = _by_member(run.summary.get("eval"))
    if only in scores:
        scores = {only: scores[only]}
    for member, numbers in scores.items():
        base = _base_of(bases, member)
        for name, value in numbers.items():
            if name in NOT_METRICS:
                continue
            label = _title(name) if len(scores) == 1 else f"{member}: {_title(name)}"
            before = base.get(name)
            shown = _figure(before) if before is not None else "-"
            rows.append((label, shown, _figure(value), _change(before, value)))
    notes = "".join(paragraph(f"{_title(name)}: {text}") for name, text in (run.summary.get("footnotes") or {}).items())
    return table(("on the held-out rows", "base", "adapter", "change"), rows, "numbers") + notes


def _curves(run: RunFiles) -> str:
    members, steps, evals = run.members(), run.of("step"), [_flat(record) for record in run.of("eval")]
    end = float(max((record.get("step", 0) for record in [*steps, *evals]), default=0))
    noisy: Literal["over", "only"] = "over" if len(members) <= MOST_FAINT_CURVES else "only"
    base = next(iter(_by_member(run.summary.get("base_eval")).values()), {})
    names = list(dict.fromkeys(name for record in evals for name in record if name not in NOT_METRICS))
    charts = [line_chart("Training loss", _lines(members, steps, "loss", noisy), x_end=end)]
    for name in sorted(names, key=lambda name: (name != "loss", name != "perplexity")):
        # a base whose perplexity is a hundred times the adapter's would press the curve flat
        level = ("base", base[name]) if name in base and name != "perplexity" else None
        charts.append(line_chart(_eval_title(name), _lines(members, evals, name), x_end=end, level=level))
    charts += [
        line_chart("Learning rate", _lines(members, steps, "learning_rate"), x_end=end),
        line_chart("Gradient norm", _lines(members, steps, "gradient_norm", noisy), x_end=end),
        line_chart("Tokens per second", _lines(members, steps, "tokens_per_s", noisy), x_end=end),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _lines(
    members: list[str], records: list[dict[str, Any]], name: str, mean: Literal["no", "over", "only"] = "no"
) -> list[Curve]:
    """One curve a member, coloured by its place among all members, so that a colour means the same in every chart."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if _is_number(record.get(name)):
            found.setdefault(str(record.get("member")), {})[record["step"]] = record[name]
    curves = []
    for colour, member in enumerate(members):
        own = found.get(member, {})
        label = member if len(members) > 1 else ""
        curves.append(Curve(label, sorted(own.items()), colour, mean if len(own) >= FEWEST_TO_SMOOTH else "no"))
    return curves


def _samples(run: RunFiles) -> Iterator[str]:
    for sample in run.samples[:MOST_SAMPLES]:
        sides = [("Reference", "reference", ""), ("Base", "base", ""), ("Adapter", "adapter", "after")]
        several = len(run.members()) > 1
        cells = []
        for title, key, kind in sides:
            if sample.get(key) is None:
                continue
            name = f"{title} {sample['member']}" if several and key == "adapter" and "member" in sample else title
            cells.append(f'<div class="{kind}"><h3>{escape(name)}</h3>{_text(sample[key])}</div>')
        prompt = f'<div class="prompt"><h3>Prompt</h3>{_text(sample.get("prompt", ""))}</div>'
        yield f'<article class="sample">{prompt}<div class="sides">{"".join(cells)}</div></article>'
    if len(run.samples) > MOST_SAMPLES:
        yield paragraph(f"{len(run.samples) - MOST_SAMPLES} more in samples.jsonl", "soft small")


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f'<div class="text">{escape(text) or "&nbsp;"}</div>'


def _usage(run: RunFiles) -> str:
    adapters = run.summary.get("adapters", {})
    if not adapters:
        return ""
    path = str(next(iter(adapters.values())))  # of several, the winner stands first
    folder, config = shlex.quote(str(run.folder)), shlex.quote(str(run.folder / "config.yaml"))
    prompt = str(run.samples[0].get("prompt", "")) if run.samples else ""
    if not prompt.isprintable() or not 0 < len(prompt) <= LONGEST_PROMPT_TO_TYPE:
        prompt = "..."
    commands = [
        f"manylora generate --adapter {shlex.quote(path)} --with-base --prompt {shlex.quote(prompt)}",
        f"manylora evaluate {folder}",
        f"manylora train {config} --set output=runs/again",
    ]
    python = (
        f"import manylora\n\nadapter = manylora.Adapter.load({path!r})\n\n"
        f"# or, in PEFT:  peft.PeftModel.from_pretrained(model, {path!r})"
    )
    return code("\n".join(commands)) + code(python)


def _manifest(run: RunFiles) -> str:
    rows = [(name, _plain(value)) for name, value in _flat(run.manifest).items()]
    return folded("manifest.json", table((), rows, "facts"))


def _by_member(value: Any) -> dict[str, dict[str, float]]:
    """Numbers by member, whether the summary gives one member's alone or those of several by name."""
    if not value:
        return {}
    if all(isinstance(item, Mapping) for item in value.values()):
        return {str(name): {key: v for key, v in _flat(item).items() if _is_number(v)} for name, item in value.items()}
    return {"": {name: item for name, item in _flat(value).items() if _is_number(item)}}


def _base_of(bases: Mapping[str, Numbers], member: str) -> Numbers:
    return bases.get(member, bases.get("", {}))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " ").replace(".", " ").capitalize())


def _eval_title(name: str) -> str:
    title = _title(name)
    return f"Eval {title.lower() if title[1:].islower() else title}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _change(before: float | None, after: float) -> str:
    if before is None:
        return "-"
    difference = after - before
    # +15000 % of a score near zero says nothing
    share = f" ({difference / abs(before):+.0%})" if abs(difference) < 10 * abs(before) else ""
    return f"{difference:+.4g}{share}" if difference else "0"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:,.0f} bytes"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
