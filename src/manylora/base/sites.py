"""The sites of a base, and the patterns that name them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.kinds import KINDS
from manylora.base.packing.linear import PackedLinear
from manylora.errors import SiteNotFound, nearest_names
from manylora.spec import match_pattern
from manylora.types import Site, SiteKind, dense_parameters

GROUPS = ("all-linear", "everything")


def _kind(module: nn.Module) -> tuple[SiteKind, bool]:
    """The kind of a module that owns parameters, and whether its class is the textbook one."""
    for name in KINDS:
        kind = KINDS.get(name)
        textbook = kind.recognises(module)
        if textbook is not None:
            return kind, textbook
    raise TypeError(f"no kind of site recognises a {type(module).__name__}")


def find_sites(
    model: nn.Module, head: nn.Module | None = None, lacks: Mapping[str, Mapping[str, int | None]] | None = None
) -> dict[str, Site]:
    """Every module that owns parameters or a packed weight; a weight met again is `tied_to` its first owner."""
    sites: dict[str, Site] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        own = dense_parameters(module)
        if not own and not isinstance(module, PackedLinear):
            continue
        kind, textbook = _kind(module)
        weight = own.get("weight")
        tied_to = owners.setdefault(id(weight), name) if weight is not None else name
        sites[name] = Site(
            name=name,
            kind=kind,
            module=module,
            textbook=textbook,
            is_head=module is head,
            lacks=(lacks or {}).get(name),
            tied_to=None if tied_to == name else tied_to,
        )
    return sites


def _matcher(pattern: str):
    """A predicate on site names for one pattern that is not a group."""
    if pattern.startswith("re:"):
        try:
            compiled = re.compile(pattern[3:])
        except re.error as error:
            raise SiteNotFound(f"the pattern {pattern!r} is no regular expression: {error}") from error
        return lambda name: compiled.fullmatch(name) is not None
    if any(sign in pattern for sign in "*?["):
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    return lambda name: name == pattern or name.endswith("." + pattern)


def layer_of(name: str) -> int | None:
    """The layer that a site lies in: the first number in its name, as PEFT's `layers_to_transform` reads it."""
    match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", "." + name)
    return int(match["index"]) if match else None


def match_sites(
    sites: dict[str, Site],
    patterns: Iterable[str],
    *,
    exclude: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    adapts: Callable[[SiteKind], bool] = lambda kind: True,
) -> list[Site]:
    """The sites that the patterns name, in the base's order.

    `all-linear` is every site that is a product with a matrix, but the output head; `everything` is every site. A site
    that is named but whose kind nobody `adapts` is an error, unless a group named it.

    Raises:
        SiteNotFound: a pattern that matches nothing, with near names; or everything that matched was excluded.
    """
    picked: dict[str, Site] = {}
    for pattern in patterns:
        if pattern == "all-linear":
            found = [site for site in sites.values() if site.kind.product and not site.is_head]
        elif pattern == "everything":
            found = [site for site in sites.values() if adapts(site.kind)]
        else:
            matches = _matcher(pattern)
            found = [site for site in sites.values() if matches(site.name)]
            wrong = [site for site in found if not adapts(site.kind)]
            if wrong and not [site for site in found if adapts(site.kind)]:
                raise SiteNotFound(
                    f"{pattern!r} names {wrong[0].name!r}, {_described(wrong[0].module)}, which this method cannot "
                    "adapt",
                    allowed=f"sites of kind {', '.join(name for name in KINDS if adapts(KINDS.get(name)))}",
                    next_step="train a copy of it: add it to full_sites",
                )
            found = [site for site in found if adapts(site.kind)]
        if not found:
            raise _nothing_matches(sites, pattern)
        picked.update((site.name, site) for site in found)
    for pattern in exclude:
        matches = _matcher(pattern)
        if not any(matches(name) for name in sites):
            raise _nothing_matches(sites, pattern)
        picked = {name: site for name, site in picked.items() if not matches(name)}
    if layers is not None:
        known = {layer for name in sites if (layer := layer_of(name)) is not None}
        missing = sorted(set(layers) - known)
        if missing:
            raise SiteNotFound(
                f"layer {missing[0]} is asked for, and this base has none",
                allowed=f"{min(known)} to {max(known)}" if known else "no layer of this base is numbered",
            )
        picked = {name: site for name, site in picked.items() if layer_of(name) in layers}
    if not picked:
        raise SiteNotFound(
            f"no site is left of {list(patterns)!r} after exclude {list(exclude)!r} and layers {layers!r}",
            next_step="list the sites: manylora inspect BASE --sites",
        )
    return [site for name, site in sites.items() if name in picked]


def _described(module: nn.Module) -> str:
    """A module as torch prints it, where that is a line: what sets it apart may be one of its settings."""
    whole = repr(module)
    return f"a {type(module).__name__}" if "\n" in whole else f"a {whole}"


def check_patterns(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Pass where each pattern of a setting matches one of these sites, by the rule of `spec.match_pattern`.

    Raises:
        SiteNotFound: one matches none, with near names.
    """
    for pattern in patterns:
        if not any(match_pattern({pattern: True}, name) for name in names):
            parts = [name.split(".") for name in names]
            endings = dict.fromkeys(".".join(part[-count:]) for count in (1, 2) for part in parts)
            raise SiteNotFound(
                f"{key}: {pattern!r} matches none of the {len(names)} low-rank sites",
                nearest=nearest_names(pattern, [*endings, *names]),
                allowed="the end of a site's name, or a regular expression for it",
                next_step="list them: manylora inspect BASE --sites",
            )


def _nothing_matches(sites: dict[str, Site], pattern: str) -> SiteNotFound:
    endings: dict[str, int] = {}
    for name in sites:
        ending = name.rsplit(".", 1)[-1]
        endings[ending] = endings.get(ending, 0) + 1
    plain = pattern.removeprefix("re:").strip("*.")
    near = nearest_names(plain.rsplit(".", 1)[-1], [*endings, *GROUPS])
    linear = sum(site.kind.product for site in sites.values())
    return SiteNotFound(
        f"no site matches {pattern!r} ({linear} linear sites in this base)",
        nearest=[f"{name} ({endings[name]})" if name in endings else name for name in near],
        next_step="list them: manylora inspect BASE --sites",
    )


@torch.no_grad()
def reads_along(sites: Mapping[str, Site], run: Callable[[], Any]) -> dict[str, tuple[str, ...]]:
    """By site, the sites that `run`, a forward, calls after it with the same tensor object; of those called once."""
    seen: dict[str, list[Tensor]] = {}

    def noting(name: str) -> Callable[[nn.Module, tuple], None]:
        def note(_: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor):
                seen.setdefault(name, []).append(args[0])

        return note

    handles = [site.module.register_forward_pre_hook(noting(name)) for name, site in sites.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    readers: dict[int, list[str]] = {}
    for name, inputs in seen.items():
        if len(inputs) == 1:
            readers.setdefault(id(inputs[0]), []).append(name)
    return {name: tuple(names[place + 1 :]) for names in readers.values() for place, name in enumerate(names[:-1])}
