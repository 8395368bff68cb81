"""What an init that reads data is told of the inputs of its sites: on the bare base, over rows that are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manylora.adapters.route import route_rows
from manylora.data.collate import batch_of
from manylora.errors import SpecError
from manylora.forwards import Level, own_forward, standing_in
from manylora.types import IGNORED, Batch

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel
    from manylora.data.batches import Epochs
    from manylora.methods.inits.init import InputReader, InputStatistic
    from manylora.types import Site

BATCH_TOKENS = 4096
"""Tokens of one batch, at least a row."""
MOST_TOKENS = 1 << 17
"""Tokens that are read at most; an epoch that has fewer is read once."""
HELD_BYTES = 1 << 30
"""What statistics may hold at one time; where they need more, sites take turns and the rows are read again."""


def first_readers(base: FrozenModel) -> dict[str, str]:
    """By site, the first of the sites that read the same tensor; itself where it reads alone."""
    first = {name: name for name in base.sites}
    for name, others in base.reads_along.items():
        for other in others:
            first[other] = first[name]
    return first


def read_inputs(
    base: FrozenModel,
    epochs: Epochs,
    reader: InputReader,
    ranks: Mapping[str, int],
    *,
    held_bytes: int = HELD_BYTES,
) -> dict[str, Any]:
    """What `reader` finds of the inputs of each of these sites, which are to have these ranks, by name.

    A site's result depends on the base, the rows and its rank alone, so that whoever shares them may share it. Of a
    batch those places count that are learned from, or all that are no padding where the batch has no such places.

    Raises:
        SpecError: a site is never called, or its input is not laid out by the batch's rows.
    """
    found: dict[str, Any] = {}
    for group in _turns([base.sites[name] for name in ranks], reader, held_bytes):
        statistics = {site.name: reader.begin(site, ranks[site.name]) for site in group}
        for count, batch in enumerate(_batches(base, epochs), start=1):
            _take_in(base, batch, statistics)
            if count & (count - 1) == 0:
                settled = [name for name, statistic in statistics.items() if statistic.settled()]
                found |= {name: statistics.pop(name).result() for name in settled}
            if not statistics:
                break
        found |= {name: statistic.result() for name, statistic in statistics.items()}
    return found


def _turns(sites: Sequence[Site], reader: InputReader, held_bytes: int) -> Iterator[list[Site]]:
    turn: list[Site] = []
    held = 0
    for site in sites:
        size = reader.num_bytes(site)
        if turn and held + size > held_bytes:
            yield turn
            turn, held = [], 0
        turn.append(site)
        held += size
    if turn:
        yield turn


def _batches(base: FrozenModel, epochs: Epochs) -> Iterator[Batch]:
    at_once = max(1, BATCH_TOKENS // epochs.row_tokens)
    rows = epochs.rows(0)
    for start in range(0, min(len(rows), max(1, MOST_TOKENS // epochs.row_tokens)), at_once):
        chosen = [[epochs.examples[index] for index in row] for row in rows[start : start + at_once]]
        yield batch_of(chosen, base, width=epochs.row_tokens, slots=[-1] * len(chosen)).to(base.device)


@torch.no_grad()
def _take_in(base: FrozenModel, batch: Batch, statistics: Mapping[str, InputStatistic]) -> None:
    """Run the bare base on a batch and let each site's statistic have the places that count."""
    counted = _counted(batch)
    called: set[str] = set()

    def taking(name: str, statistic: InputStatistic) -> Callable[[nn.Module, tuple], None]:
        def take(_: nn.Module, args: tuple) -> None:
            called.add(name)
            inputs: Tensor = args[0]
            if counted is None:
                statistic.add(inputs.reshape(-1, inputs.shape[-1]))
            elif inputs.shape[:-1].numel() == counted.numel():
                statistic.add(inputs.reshape(-1, inputs.shape[-1])[counted.reshape(-1)])
            else:
                raise SpecError(
                    f"{name!r} is given {tuple(inputs.shape)} for a batch of {tuple(counted.shape)} places, so which "
                    "of them are learned from cannot be told",
                    next_step="leave the site out, or choose an adapter.init that reads no data",
                )

        return take

    with ExitStack() as stack:
        stack.enter_context(route_rows(base, batch.slots))
        for site in base.lacking:  # what they give is of no meaning here, and nobody's
            stack.enter_context(standing_in(site.module, partial(own_forward, site.module), Level.HEAD))
        for name, statistic in statistics.items():
            stack.enter_context(_hooked(base.sites[name].module, taking(name, statistic)))
        base.outputs(batch)
    if missing := statistics.keys() - called:
        raise SpecError(
            f"{min(missing)!r} is not called in a forward of the base, so an init that reads data learns nothing of it",
            next_step="leave the site out, or choose an adapter.init that reads no data",
        )


@contextmanager
def _hooked(module: nn.Module, hook: Callable[[nn.Module, tuple], None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _counted(batch: Batch) -> Tensor | None:
    """(rows, tokens) whether a place counts; None: all do, or the batch does not say."""
    labels, mask = batch.targets.get("labels"), batch.inputs.get("attention_mask")
    if labels is not None and labels.dim() == 2:
        return labels.ne(IGNORED)
    return mask.bool() if mask is not None and mask.dim() == 2 else None
