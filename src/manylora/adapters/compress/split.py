"""`split`: two bits a number for the components that hold most of the product, one bit for the rest.

The singular components of B A up to a cumulative sigma^2 of rho are stored with four levels, the others as sign and
mean, in groups of 128 along the rows of A and the columns of B. Within each of the two sets the components are turned
until they are equally large (`spectrum.levelled`), which does not change what the set stands for.

The four levels are -3/2, -1/2, 1/2 and 3/2 of a step that leaves the least squared error: of Gaussian groups 0.34 of
their size. Levels from the least number of a group to the largest, as is usual, leave 0.50.

Source: LoRAQuant (2510.26690). Not as in its authors' code: there one component too few is kept in two bits (an index
is taken for a count), and scales do not count as bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manylora.adapters.compress.bits import from_bytes, num_bytes, to_bytes
from manylora.adapters.compress.scheme import Part
from manylora.adapters.compress.spectrum import components, count_for, halves, levelled
from manylora.errors import AdapterBroken, ConfigError

GROUP = 128
RHO = 0.8
_FIRST_STEP = 0.9957
"""The best step of four levels for a Gaussian of size 1 (Max 1960, table II)."""
_ROUNDS = 12


class Split:
    """Tensors of a factor: `high.codes` uint8 and `high.step` bfloat16 of H rows; `low.codes` and `low.mean` of the
    rest, where there is one.
    """

    name = "split"

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"group": GROUP, "rho": _rho(options)}

    def encode(self, a: Tensor, b: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        u, sigma, v = components(a, b)
        count = count_for(sigma, _rho(options))
        sets = [slice(0, count), slice(count, len(sigma))]
        pairs = [levelled(*halves(u[:, own], sigma[own], v[own]), sigma[own]) for own in sets if own.start < own.stop]
        factors = [tuple(pair[0] for pair in pairs), tuple(pair[1].t() for pair in pairs)]
        made = []
        for rows in factors:
            tensors = _four_levels(rows[0].float())
            for low in rows[1:]:
                tensors |= _signs(low.float())
            made.append(tensors)
        return made[0], made[1]

    def decode(self, part: Part, settings: Mapping[str, Any]) -> Tensor:
        if settings.get("group") != GROUP:
            raise AdapterBroken(f"{part.name} has groups of {settings.get('group')!r}", allowed=str(GROUP))
        columns, groups = part.columns, -(-part.columns // min(GROUP, part.columns))
        codes = part.take("high.codes", torch.uint8, (None, num_bytes(columns, 2)))
        count = codes.shape[0]
        step = part.take("high.step", torch.bfloat16, (count, groups))
        pieces = [(from_bytes(codes, 2, columns).float() - 1.5) * _spread(step, columns)]
        if count < part.rows:
            rest = part.rows - count
            codes = part.take("low.codes", torch.uint8, (rest, num_bytes(columns, 1)))
            mean = part.take("low.mean", torch.bfloat16, (rest, groups))
            pieces.append((from_bytes(codes, 1, columns).float() * 2 - 1) * _spread(mean, columns))
        part.done()
        rows = torch.cat(pieces)
        if len(rows) != part.rows:
            raise AdapterBroken(f"{part.name} holds {len(rows)} components", allowed=f"{part.rows}, its rank")
        return rows


def _rho(options: Mapping[str, Any]) -> float:
    rho = options.get("rho", RHO)
    if not 0.0 < rho <= 1.0:
        raise ConfigError(f"rho is {rho!r}", allowed="above 0, at most 1", next_step=f"try {RHO}")
    return float(rho)


def _four_levels(rows: Tensor) -> dict[str, Tensor]:
    """Codes 0..3 and steps: each is the best for the other, in turns, from where a Gaussian's would be."""
    groups, counts = _groups(rows)
    step = _FIRST_STEP * (groups.square().sum(-1) / counts).sqrt()
    for _ in range(_ROUNDS):
        levels = _level_codes(groups, step) - 1.5
        used = levels * _used(groups, counts)
        step = (used * groups).sum(-1) / used.square().sum(-1)
    kept = step.to(torch.bfloat16)
    codes = _level_codes(groups, kept.to(rows.dtype)).flatten(-2)[..., : rows.shape[-1]]
    return {"high.codes": to_bytes(codes, 2), "high.step": kept}


def _level_codes(groups: Tensor, step: Tensor) -> Tensor:
    """The nearest of four levels: 0 or 1 below zero, 2 or 3 from zero on."""
    whole = step.masked_fill(step == 0, 1.0)[..., None]
    return (groups / whole).floor().clamp(-2, 1) + 2


def _signs(rows: Tensor) -> dict[str, Tensor]:
    """Bits, 1 for what is not negative, and the mean of a group's magnitudes: the best factor for signs."""
    groups, counts = _groups(rows)
    mean = groups.abs().sum(-1) / counts
    return {"low.codes": to_bytes(rows >= 0, 1), "low.mean": mean.to(torch.bfloat16)}


def _groups(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R, groups, size), zeros after a row's end, and how many of a group's numbers are the row's own (groups,)."""
    columns = rows.shape[-1]
    size = min(GROUP, columns)
    padded = functional.pad(rows, (0, -columns % size)).unflatten(-1, (-1, size))
    counts = torch.full((padded.shape[-2],), float(size))
    counts[-1] = columns - size * (padded.shape[-2] - 1)
    return padded, counts


def _used(groups: Tensor, counts: Tensor) -> Tensor:
    return torch.arange(groups.shape[-1]) < counts[:, None]


def _spread(scales: Tensor, columns: int) -> Tensor:
    return scales.float().repeat_interleave(min(GROUP, columns), dim=-1)[..., :columns]


SPLIT = Split()
