"""report.html: a run on one self-contained page, from the files in its folder; also while the run goes on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

from manylora.files import write_text_atomic
from manylora.training.charts import Curve, legend, line_chart, short_number
from manylora.training.console import duration
from manylora.training.events import read_events
from manylora.training.page import code, folded, page, paragraph, section, table, tiles

FILE_NAME = "report.html"
MOST_SAMPLES = 24
LONGEST_PROMPT_TO_TYPE = 160
MOST_FAINT_CURVES = 3
"""Members up to which a noisy curve shows its single steps behind its running mean."""
FEWEST_TO_SMOOTH = 100
"""Points below which the running mean would be the curve itself."""
NOT_METRICS = {"event", "member", "step", "time", "tokens", "tokens_per_s", "memory_bytes", "wall_s"}
TITLES = {"loss": "Loss", "perplexity": "Perplexity", "bleu": "BLEU", "chrf": "chrF", "ter": "TER"}

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Run:
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


def write_report(run: str | Path) -> Path:
    """Write a run folder's report.html and return where it is; what the run has not written yet is left out.

    Raises:
        CheckpointBroken: events.jsonl is damaged before its last line. DiskFull: no space.
    """
    found = _read(Path(run))
    parts = [
        _header(found),
        section("Results", _results(found)),
        section("Curves", legend(found.members()), _curves(found)),
        section("Before and after", *_samples(found)),
        section("Use the adapter", _usage(found)),
        section("Settings", folded("config.yaml", code(found.config)) if found.config else ""),
        section("Machine and versions", _manifest(found)),
        "<footer>Written by manylora from the files in this folder. Hover over a curve for its numbers.</footer>",
    ]
    path = found.folder / FILE_NAME
    write_text_atomic(path, page(f"{found.folder.name} - manylora", "\n".join(part for part in parts if part)))
    return path


def _read(run: Path) -> _Run:
    config = run / "config.yaml"
    return _Run(
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


def _header(run: _Run) -> str:
    times = [record["time"] for record in run.events if "time" in record]
    when = f"{datetime.fromtimestamp(times[-1], UTC):%Y-%m-%d %H:%M} UTC" if times else ""
    steps = max((record["step"] for record in run.of("step")), default=0)
    state = "finished" if run.summary else f"unfinished, {steps:,} steps so far"
    line = ", ".join(part for part in (_setup(run), state, when) if part)
    ends = [_early_end(record) for record in [*run.of("retired"), *run.of("done")] if record.get("reason")]
    return "\n".join(
        [
            '<header>\n<div class="kicker">manylora run</div>',
            f"<h1>{escape(run.folder.name)}</h1>",
            paragraph(line, "soft"),
            *(paragraph(text, "notice") for text in ends),
            tiles(_headline(run)),
            "</header>",
        ]
    )


def _setup(run: _Run) -> str:
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


def _headline(run: _Run) -> Iterator[tuple[str, str, str]]:
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


def _results(run: _Run) -> str:
    bases = _by_member(run.summary.get("base_eval"))
    rows = []
    scores = _by_member(run.summary.get("eval"))
    for member, numbers in scores.items():
        base = _base_of(bases, member)
        for name, value in numbers.items():
            if name in NOT_METRICS:
                continue
            label = _title(name) if len(scores) == 1 else f"{member}: {_title(name)}"
            before = base.get(name)
            shown = _figure(before) if before is not None else "-"
            rows.append((label, shown, _figure(value), _change(before, value)))
    return table(("on the held-out rows", "base", "adapter", "change"), rows, "numbers")


def _curves(run: _Run) -> str:
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
    curves = []
    for colour, member in enumerate(members):
        own = {r["step"]: r[name] for r in records if str(r.get("member")) == member and _is_number(r.get(name))}
        label = member if len(members) > 1 else ""
        curves.append(Curve(label, sorted(own.items()), colour, mean if len(own) >= FEWEST_TO_SMOOTH else "no"))
    return curves


def _samples(run: _Run) -> Iterator[str]:
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


def _usage(run: _Run) -> str:
    adapters = run.summary.get("adapters", {})
    if not adapters:
        return ""
    path = str(next(iter(adapters.values())))
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


def _manifest(run: _Run) -> str:
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
