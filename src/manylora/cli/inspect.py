"""`manylora inspect`: what a base, an adapter, a run or data are made of."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from manylora.cli.inspect_data import inspect_data
from manylora.cli.opened import Dtype, TrustRemoteCode, UseCache
from manylora.cli.output import AsJson, Output, note
from manylora.errors import UserError
from manylora.look.asked import Asked
from manylora.runs.places import Kind, adapters_of, recognise

if TYPE_CHECKING:
    from manylora.types import Site

KINDS: tuple[Kind, ...] = ("data", "config", "run", "adapter", "base")
OF_MODELS = frozenset({"sites", "dtype"})
OF_ALL = frozenset({"target", "as_json", "trust_remote_code"})


def inspect(
    context: typer.Context,
    target: Annotated[str, typer.Argument(help="Data, a configuration, a run folder, an adapter folder, or a base.")],
    sites: Annotated[
        bool, typer.Option("--sites", help="Of a base or adapter: list every site, not only how many there are.")
    ] = False,
    dtype: Dtype = "bfloat16",
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="Whose tokenizer reads the data. Default: the configuration's, or builtin:tiny-en."
        ),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval", help="Held-out data, to find what is trained on too.")
    ] = None,
    format_name: Annotated[str | None, typer.Option("--format", help="How a row is read. Default: found.")] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="OURS=YOURS,...", help="prompt=question,completion=answer")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=0, help="Show the first so many rows of each source. Default: 3.")
    ] = None,
    lines: Annotated[
        list[int] | None, typer.Option("--row", min=1, metavar="LINE", help="Show the row at a line; may be repeated.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with all of it.")] = None,
    row_tokens: Annotated[
        int | None, typer.Option("--row-tokens", min=8, help="Tokens of a packed row. Default: 512.")
    ] = None,
    overflow: Annotated[
        str | None, typer.Option("--overflow", help="Rows above --row-tokens: error, split or right.")
    ] = None,
    turns: Annotated[
        Literal["all", "last"] | None, typer.Option("--turns", help="Which assistant turns are learned.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="A file with a chat template, in place of the base's.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, valid, test, ... of a folder or hub:NAME.")
    ] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="The configuration of hub:NAME.")] = None,
    data: Annotated[bool, typer.Option("--data", help="Of a run: its data, not its course.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 2 where a row is bad.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    use_cache: UseCache = True,
    as_json: AsJson = False,
) -> None:
    """Show what data, a base, an adapter or a run hold."""
    output, place = Output(as_json), recognise(target, KINDS)
    if place.kind == "run" and not data:
        _check_options(context, OF_ALL, target, next_step=f"manylora inspect {target} --data ...")
    elif place.kind in ("base", "adapter"):
        _check_options(context, OF_ALL | OF_MODELS, target)
    else:
        _check_options(context, frozenset(context.params) - OF_MODELS, target)
        asked = Asked(
            base=base, eval=eval_data, format=format_name, columns=columns, row_tokens=row_tokens, overflow=overflow,
            turns=turns, chat_template=chat_template, split=split, subset=subset, rows=rows, lines=lines or (),
            html=html, strict=strict, trust_remote_code=trust_remote_code, use_cache=use_cache,
        )  # fmt: skip
        output.finish(inspect_data(output, place, asked))
        return
    if place.kind == "adapter" and place.folder is not None:
        facts = _adapter(output, place.folder, sites)
    elif place.kind == "run" and place.folder is not None:
        facts = _run(output, place.folder)
    else:
        facts = _base(output, place.name, sites, dtype, trust_remote_code)
    output.finish({"kind": place.kind} | facts)


def _check_options(context: typer.Context, known: frozenset[str], target: str, *, next_step: str | None = None) -> None:
    """Pass where every option that was typed says something about the target."""
    options = {option.name: option for option in context.command.params if option.name not in known}
    for name, option in options.items():
        source = context.get_parameter_source(str(name))
        if source is not None and source.name == "COMMANDLINE":
            kind = recognise(target, KINDS).kind
            typed = option.opts[0]
            raise UserError(f"{typed} says nothing about {target!r}, which is {_article(kind)}", next_step=next_step)


def _article(kind: Kind) -> str:
    return {"adapter": "an adapter", "data": "data", "config": "a configuration"}.get(kind, f"a {kind}")


def _lines(output: Output, facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        output.line(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


def _base(output: Output, name: str, sites: bool, dtype: str, trust_remote_code: bool) -> dict[str, Any]:
    from manylora.base.auto import auto_class_of
    from manylora.base.fingerprint import quick_fingerprint
    from manylora.base.load import find_base
    from manylora.planning.hollow import hollow_base

    # No weight is read to list sites: a base of any size is there in seconds.
    folder = find_base(name)
    hollow = hollow_base(name, auto=auto_class_of(folder), dtype=dtype, trust_remote_code=trust_remote_code)
    base = hollow.base
    for text in (*hollow.notes, *base.notes):
        note(text)
    facts = {
        "base": base.name,
        "architecture": type(base.model).__name__,
        "parameters": base.num_parameters(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "vocabulary": base.vocabulary,
        "positions": base.max_positions,
        "chat template": base.template_digest is not None,
        "packs rows": base.packs,
        "fingerprint": quick_fingerprint(folder) or "not read: the weights are many; training and evaluating find it",
        "folder": str(base.folder),
    }
    _lines(output, facts)
    packed = hollow.packed_sites()
    listed = [_site(site, packed.get(site.name)) for site in base.sites.values()]
    output.line()
    if sites:
        output.table(("site", "kind", "shape", "parameters"), [tuple(site.values()) for site in listed])
    else:
        output.table(("sites ending in", "kind", "shape", "count", "parameters"), _by_ending(listed))
        output.line("\neach by name: --sites")
    return facts | {"sites": listed}


def _site(site: Site, format_name: str | None) -> dict[str, Any]:
    shapes = list(site.shapes().values())
    kind = f"{site.kind.name}, head" if site.is_head else site.kind.name
    kind = f"{kind}, tied to {site.tied_to}" if site.tied_to else kind
    kind = f"{kind}, {format_name}" if format_name is not None else kind
    shape = " x ".join(map(str, shapes[0]))
    return {"name": site.name, "kind": kind, "shape": shape, "parameters": site.num_parameters()}


def _by_ending(sites: list[dict[str, Any]]) -> list[tuple[str, str, str, int, int]]:
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for site in sites:
        groups[site["name"].rpartition(".")[2], site["kind"], site["shape"]].append(site["parameters"])
    return [(*key, len(counts), sum(counts)) for key, counts in groups.items()]


def _adapter(output: Output, folder: Path, sites: bool) -> dict[str, Any]:
    from manylora.adapters.adapter import Adapter
    from manylora.methods import METHODS

    adapter = Adapter.load(folder)
    spec = adapter.spec
    ranks_at = {name: METHODS.get(factors.method).rank(factors) for name, factors in adapter.factors.items()}
    low_rank = {name: rank for name, rank in ranks_at.items() if rank}
    ranks = Counter(low_rank.values())
    scales = sorted({round(spec.scale(name), 6) for name in low_rank})
    facts: dict[str, Any] = {
        "adapter": str(folder),
        "base": adapter.base_name or "not said",
        "fingerprint of its base": adapter.base_fingerprint or "not said",
        "method": spec.method,
        "sites": len(adapter.factors),
        "whole copies": len(spec.full_sites),
        "ranks": ", ".join(f"{rank} at {count} sites" for rank, count in sorted(ranks.items())) or "none",
        "scales": ", ".join(f"{scale:g}" for scale in scales) or "none",
        "dropout": spec.dropout,
        "parameters": adapter.num_parameters(),
        "receipt": ", ".join(adapter.receipt) or "none",
    }
    _lines(output, facts)
    listed = [_factors(name, factors.tensors) for name, factors in adapter.factors.items()]
    if sites:
        output.line()
        output.table(("site", "tensors", "parameters"), [tuple(site.values()) for site in listed])
    return facts | {"spec": spec.to_dict(), "receipt": adapter.receipt, "site list": listed}


def _factors(name: str, tensors: Any) -> dict[str, Any]:
    shapes = ", ".join(f"{key} {' x '.join(map(str, tensor.shape))}" for key, tensor in tensors.items())
    return {"name": name, "tensors": shapes, "parameters": sum(tensor.numel() for tensor in tensors.values())}


def _sweep_facts(told: dict[str, Any]) -> dict[str, Any]:
    """What sweep.json says of a run that is a sweep."""
    from manylora.sweeps.leaderboard import Entry, ranked, tally, values_text

    entries = ranked(map(Entry.from_dict, told["entries"]))
    best = next((entry for entry in entries if entry.loss is not None), None)
    return {
        "trials": f"{len(entries)} of {told['trials']} ({tally(entries)})",
        "search": f"{told['search']}, stop {told['stop']}",
        "tokens": told["tokens"],
        "best trial": None if best is None else f"{best.trial} ({values_text(best)})",
    }


def _run(output: Output, folder: Path) -> dict[str, Any]:
    from manylora.runs.events import read_events

    events = read_events(folder)
    steps = [event for event in events if event.get("event") == "step"]
    evals = [event for event in events if event.get("event") == "eval"]
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    retired = {event["member"]: event.get("reason", "") for event in events if event.get("event") == "retired"}
    resumable = any((folder / "checkpoints").glob("step-*"))
    facts: dict[str, Any] = {
        "run": str(folder),
        "state": "finished" if summary else "unfinished; resume it with --resume" if resumable else "unfinished",
        "steps": max((event["step"] for event in steps), default=0),
        "tokens": max((event.get("tokens", 0) for event in steps), default=0),
        "last training loss": steps[-1]["loss"] if steps else None,
        "last eval loss": evals[-1]["loss"] if evals else None,
        "best eval loss": min((event["loss"] for event in evals), default=None),
        "base eval loss": (summary.get("base_eval") or {}).get("loss"),
        "retired": ", ".join(f"{name}: {why}" for name, why in retired.items()) or "none",
    }
    sweep_file = folder / "sweep.json"
    if sweep_file.is_file():
        facts |= _sweep_facts(json.loads(sweep_file.read_text(encoding="utf-8")))
    adapters = {name: str(path) for name, path in adapters_of(folder).items()}
    _lines(output, facts | {f"adapter {name}": path for name, path in adapters.items()})
    return facts | {"adapters": adapters, "summary": summary}
