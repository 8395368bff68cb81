"""What a fleet holds in memory, from the real base and adapters, and how many members and tokens therefore fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import CHUNK_ELEMENTS, LanguageBase, LanguageOutputs
from manylora.data.batches import Epochs
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.data.packing import WIDTH_STEP, row_width
from manylora.data.store import lengths_of
from manylora.memory.hollow import hollow_of, without_weights
from manylora.memory.trace import Trace
from manylora.methods import METHODS
from manylora.objectives.forward import Aim, forward_batch
from manylora.ops.positions import TILE_POSITIONS
from manylora.training.deal import FIXED_TOKENS
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import OptimizerSettings
from manylora.types import Batch, Objective

BACKWARD_FACTOR = 1.4
"""What a step holds at most, over what its forward keeps: gradients of activations, and copies of the present layer.

Measured on 2026-11-21 on the CPU as the growth of the process's peak over that of what was kept: 1.34 a token, 1.20 to
1.40 in all, with 4 to 40 rows of 512 tokens, 1 to 8 members of rank 16 and `load_base("builtin:tiny-en")`, whose 7
layers are few: with more of them the present one is a smaller share.
"""

PROBE_TOKENS = 512
"""Width of the longer row that is measured: the model is linear and quadratic in it, and holds for any other."""

ENOUGH_TOKENS = {"cpu": 16 * FIXED_TOKENS}
"""Computed tokens of one forward from which more bring next to nothing: the fixed cost is then a sixteenth."""

ENOUGH_ON_ACCELERATOR = 32768
"""The same for devices that compute far faster than they are launched; an estimate, not measured here."""

SHARE_OF_LEARNING_SEARCH = 4
"""A search that learns from results has at most one in so many of its trials under way."""


@dataclass(frozen=True, slots=True)
class ActivationModel:
    """Bytes that a forward keeps for its backward: `fixed` of each member in it, `linear` and `quadratic` of each row.

    A row of w tokens holds linear w + quadratic w^2. `chunk` is what one supervised token of a chunk of the loss takes
    while the backward computes that chunk again, `chunk_tokens` the most tokens of a chunk. Where the loss could not be
    `followed` without numbers, both are 0.

    Source: the form is that of mLoRA (2312.02515), b0 + b1 B L + b2 B L^2; here measured before the first step instead
    of fitted while training.
    """

    fixed: float
    linear: float
    quadratic: float
    chunk: float = 0.0
    chunk_tokens: int = 0
    followed: bool = True

    def saved(self, rows: int, width: int, members: int = 1) -> int:
        """What is kept from the forward to the backward."""
        return round(members * self.fixed + rows * width * (self.linear + self.quadratic * width))

    def total(self, rows: int, width: int, members: int = 1) -> int:
        """The most that the forward and its backward hold, a chunk of the loss included."""
        chunk = self.chunk * min(self.chunk_tokens, rows * width)
        return round(BACKWARD_FACTOR * self.saved(rows, width, members) + chunk)

    def tokens_within(self, held: int, width: int, members: int = 1) -> int:
        """How many tokens, in rows of `width`, one forward of so many members may compute within `held` bytes."""
        left = (held - self.chunk * self.chunk_tokens) / BACKWARD_FACTOR - members * self.fixed
        return max(0, int(left / max(1.0, self.linear + self.quadratic * width)))


def member_bytes(base: FrozenModel, adapter: Adapter, optimizer: OptimizerSettings, *, copies: int = 1) -> int:
    """What one more member holds for as long as it is resident: factors, gradients, optimiser states, and anchors.

    All of them float32, at the rank that its stacks are padded to; `copies` times where followers stand beside it,
    which share its stacks and so have room for gradients and states too.
    """
    rule = OPTIMIZERS.get(optimizer.name)
    total = 0
    for name, factors in adapter.factors.items():
        method, site = METHODS.get(factors.method), base.sites[name]
        for shape in method.stack_shapes(site, method.shape_class(site, factors)).values():
            states = rule.state_shapes(shape, optimizer).values()
            total += math.prod(shape) * (2 + bool(factors.anchors)) + sum(map(math.prod, states))
    return copies * total * torch.float32.itemsize


def token_bytes(base: FrozenModel, adapter: Adapter, objective: Objective, epochs: Epochs) -> ActivationModel:
    """How memory grows with the tokens of a forward, measured: three forwards of one or two short rows.

    The rows are cut from the longest of the first epoch, padded and every token a target, so that what is found is the
    most that rows of these data take. The base must carry no bank.

    Raises:
        RouteError: the base carries a bank.
    """
    row = _longest_row(epochs)
    most = min(PROBE_TOKENS, sum(map(len, row)), getattr(base, "max_positions", None) or PROBE_TOKENS)
    long, short = _probe_row(row, most), _probe_row(row, max(WIDTH_STEP, most // 4))
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        one, two = (_probe(base, objective, [short] * rows, epochs) for rows in (1, 2))
        narrow, wide = _width(short, epochs), _width(long, epochs)
        per_row, fixed = two - one, max(0, 2 * one - two)
        linear, quadratic = per_row / narrow, 0.0
        if wide > narrow:
            per_wide = _probe(base, objective, [long], epochs) - fixed
            quadratic = max(0.0, (per_wide / wide - per_row / narrow) / (wide - narrow))
            linear = per_wide / wide - quadratic * wide
        try:
            chunk, chunk_tokens, followed = *_chunk(base, objective, short, epochs), True
        except RuntimeError:  # what torch raises of operations that need numbers
            chunk, chunk_tokens, followed = 0.0, 0, False
    return ActivationModel(fixed, linear, quadratic, chunk, chunk_tokens, followed)


def saved_bytes(base: FrozenModel, forward: Callable[[], Any]) -> int:
    """Bytes that a forward keeps for its backward, each storage once; what the base and its bank own is not counted."""
    own = {tensor.untyped_storage()._cdata for tensor in _owned(base)}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # it holds the graph, so that no address is used twice
    del result
    return sum(held.values())


def _owned(base: FrozenModel) -> list[Tensor]:
    stacks = [] if base.bank is None else base.bank.stacks.values()
    factors = [tensor for stack in stacks for tensor in (*stack.tensors.values(), *stack.anchors.values())]
    return [*base.model.parameters(), *base.model.buffers(), *factors]


def _longest_row(epochs: Epochs) -> list[Any]:
    lengths, plan = lengths_of(epochs.examples), epochs.rows(0)
    longest = int(np.add.reduceat(lengths[plan.items], plan.starts).argmax())
    return [epochs.examples[index] for index in plan[longest]]


def _probe_row(row: Sequence[Any], tokens: int) -> list[Any]:
    """The first tokens of a row as one sequence of targets, just too short for its width; tensors as they are.

    A batch with padding needs a mask, which may take more than all else, and nearly every batch has padding.
    """
    if not all(isinstance(example, Example) for example in row):
        return list(row)
    joined = np.concatenate([example.tokens for example in row])[:tokens]
    size = max(1, len(joined) // WIDTH_STEP * WIDTH_STEP - 1)
    return [replace(row[0], tokens=joined[:size], trained=np.arange(size) > 0)]


def _width(row: Sequence[Any], epochs: Epochs) -> int:
    return row_width(sum(map(len, row)), epochs.row_tokens)


def _batch(base: FrozenModel, rows: Sequence[Sequence[Any]], epochs: Epochs) -> Batch:
    slots = [0] * len(rows)
    return batch_of(rows, base, width=epochs.row_tokens, slots=slots, streams=range(len(rows))).to(base.device)


def _probe(base: FrozenModel, objective: Objective, rows: Sequence[Sequence[Any]], epochs: Epochs) -> int:
    aims = {0: Aim.fresh(objective)}
    return saved_bytes(base, lambda: forward_batch(base, _batch(base, rows, epochs), aims))


class _Stated:
    """A base whose hidden states are there already, whatever the batch."""

    def __init__(self, base: LanguageBase, states: Tensor):
        self.bank, self.device = base.bank, states.device
        self._base, self._states = base, states

    def outputs(self, batch: Batch) -> LanguageOutputs:
        return LanguageOutputs(self._base, self._states, batch)


def _chunk(base: FrozenModel, objective: Objective, row: Sequence[Any], epochs: Epochs) -> tuple[float, int]:
    """Bytes of a supervised token while the loss of a chunk is computed, and the most tokens that share them.

    Followed on states without numbers, many enough for a whole chunk or tile: nothing is computed.
    """
    supervised = sum(_batch(base, [row], epochs).num_trained)
    if not isinstance(base, LanguageBase) or not supervised:
        return 0.0, 0
    batch = replace(_batch(base, [row] * math.ceil(TILE_POSITIONS / supervised), epochs), streams=None)
    head = None if base.post_head is None else base.head
    size = base.vocabulary if head is None else head.get_parameter("weight").shape[-1]
    with ExitStack() as stack:
        trace = Trace.now
        if trace is None:
            trace = Trace()
            stack.enter_context(without_weights(hollow_of(base), trace))
            stack.enter_context(trace.running())
        shape = batch.num_rows, batch.costs[0], size
        stated: Any = _Stated(base, torch.empty(shape, dtype=base.dtype, device="cpu").requires_grad_())
        begin = len(trace.events)
        (part,) = forward_batch(stated, batch, {0: Aim.fresh(objective)})
        part.totals.total.sum().backward()
        peak, _ = trace.peak(begin)
    tokens = min(sum(batch.num_trained), max(TILE_POSITIONS, CHUNK_ELEMENTS // base.vocabulary))
    return peak / tokens, tokens


def choose_concurrency(
    *,
    num_trials: int,
    members_per_trial: int = 1,
    search: str = "random",
    asked: int | None = None,
    bytes_per_member: int,
    activations: ActivationModel,
    row_tokens: int,
    step_tokens: int,
    free: int,
    device_type: str = "cpu",
) -> tuple[int, int, str]:
    """How many members are resident at once, how many tokens one forward may compute, and one line that says why.

    `bytes_per_member` is `member_bytes` of the largest member, `row_tokens` its widest row, `step_tokens` the tokens
    of one of its steps, `free` what `free_bytes` gave; `asked` is the number that the user set, which is then kept
    whatever memory says. Else it is the largest number whose members leave room for a forward that either holds all
    their steps or is large enough to be fast. A search that proposes from results (tpe) has at most a quarter of its
    trials under way: those that start together know nothing of each other, and of 4 groups 3 are proposed from
    results.
    """
    num_members = num_trials * members_per_trial
    most, why = num_members, "all of them fit"
    if search == "tpe":
        most = max(1, num_trials // SHARE_OF_LEARNING_SEARCH) * members_per_trial
        why = f"{search} proposes from results, so at most a quarter of its {num_trials} trials is under way"
    if asked is not None:
        most, why = min(asked, num_members), "sweep.concurrent"
    enough = max(row_tokens, ENOUGH_TOKENS.get(device_type, ENOUGH_ON_ACCELERATOR))

    def room(members: int) -> int:
        return activations.tokens_within(free - members * bytes_per_member, row_tokens, members)

    chosen = most
    if asked is None:
        while chosen > 1 and room(chosen) < min(enough, max(row_tokens, chosen * step_tokens)):
            chosen -= 1
        why = why if chosen == most else "memory holds no more"
    budget = max(row_tokens, min(enough, room(chosen)))
    if room(chosen) < row_tokens:
        why += ", and the memory that is free may not hold them"
    per_token = BACKWARD_FACTOR * (activations.linear + activations.quadratic * row_tokens)
    reason = (
        f"{chosen} of {num_members} members train at once: {why} ({_size(bytes_per_member)} a member and "
        f"{_size(per_token)} a token, {_size(free)} to plan with); up to {budget:,} tokens a forward"
    )
    return chosen, budget, reason


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
