"""A run of a configuration without numbers: what each of its phases makes and frees, in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.data.collate import batch_of
from manylora.data.packing import row_width
from manylora.data.store import lengths_of
from manylora.evaluation.evaluate import _inputs
from manylora.generation.decode import CachedStep
from manylora.memory.trace import Trace, Work
from manylora.methods.inits import INITS
from manylora.objectives.forward import Aim, SlotSums, forward_batch
from manylora.training.checkpointing import checkpointed
from manylora.training.optim import OPTIMIZERS
from manylora.training.optim.stacked import StackedOptimizer, drop_gradients
from manylora.training.prepare import Stock
from manylora.training.step import add_gradients, micro_batches

if TYPE_CHECKING:
    from manylora.base.language import LanguageBase
    from manylora.config import Config
    from manylora.training.member import Member
    from manylora.types import Batch, Beside, Objective, Outputs, RowTotals

COPIES = "copies"
"""The category of factors and states beside those in the bank: fresh, best, to be written. They lie in main memory."""
MOST_BATCHES = 4
"""Micro-batches of a step that are followed; the work of the others is counted by their tokens."""
GENERATED_ROWS = 128
"""Prompts that are answered at once. Source: evaluate_text's own."""


@dataclass(slots=True)
class PhaseTrace:
    """A phase: its events (block, bytes; 0 bytes: freed), what is alive at its peak by category, and its work."""

    name: str
    peak_bytes: int
    held: dict[str, int]
    events: list[tuple[int, int]]
    work: Work
    tokens: int = 0


@dataclass(slots=True)
class RunTrace:
    """`steady` is what stays through the steps, by category; phases are those of the run, in its order.

    `num_products` counts the products of a step that differ in their shapes, as far as it was followed; `num_steps` the
    steps of the run, `followed` the share of a step's tokens that was followed.
    """

    steady: dict[str, int]
    phases: list[PhaseTrace]
    notes: list[str]
    num_products: int
    num_steps: int
    followed: float


def traced_run(
    config: Config, stock: Stock, base: LanguageBase, trace: Trace, *,
    checkpointing: str, members: int = 1, budget_tokens: int | None = None, with_copies: bool = True,
) -> RunTrace:  # fmt: skip
    """What training, evaluating and generating by a configuration make and free, on a base that is fake.

    Without `with_copies`, what lies in main memory beside an accelerator's is left out.
    """
    notes: list[str] = []
    stock.data(config)
    found: list[PhaseTrace] = []
    with ExitStack() as stack:
        stack.enter_context(trace.running())
        example, base.example = base.example, None
        stack.callback(setattr, base, "example", example)
        with trace.of(COPIES):
            made = [_member(config, stock, place, notes) for place in range(members)]
        with trace.of("adapters"):
            bank = stack.enter_context(Bank(base, num_slots=sum(member.num_slots for member, _ in made)))
            bank._proven = set(base.sites)
            free = iter(range(bank.num_slots))
            for member, adapter in made:
                member.sit([next(free) for _ in range(member.num_slots)])
                for slot in (member.slot, *member.follower_slots.values()):
                    bank.put(adapter, slot=slot)
        rule = StackedOptimizer(bank, OPTIMIZERS.get(made[0][0].recipe.optimizer.name))
        with trace.of("optimizer"):
            for member, _ in made:
                rule.reset(member.slot, member.recipe.optimizer)
        own = [member for member, _ in made]
        for member in own:
            member.step = _longest_step(member)
        left_out = () if with_copies else (COPIES,)
        steady = _alive(trace, left_out)
        stack.enter_context(checkpointed(base, checkpointing))  # pyright: ignore[reportArgumentType]
        begin = len(trace.events)
        trace.begin("step")
        tokens, followed = _step(base, bank, rule, own, trace, budget_tokens)
        found.append(_phase(trace, "step", begin, left_out, tokens))
        products = len(trace.products)
        held_out = own[0].eval_examples
        if held_out:
            begin = len(trace.events)
            trace.begin("evaluation")
            with trace.of(COPIES):
                best = [bank.get(member.slot) for member in own]
            _evaluate(base, own, trace)
            found.append(_phase(trace, "evaluation", begin, left_out))
            begin = len(trace.events)
            trace.begin("generation")
            _generate(config, base, bank, held_out, trace)
            found.append(_phase(trace, "generation", begin, left_out))
            del best
        begin = len(trace.events)
        trace.begin("checkpoint")
        with trace.of(COPIES):
            kept: list[Any] = [
                (bank.get(one.slot).factors, rule.slot_state(one.slot, one.recipe.optimizer)) for one in own
            ]
        found.append(_phase(trace, "checkpoint", begin, left_out))
        del kept
    return RunTrace(steady, found, notes, products, max(member.recipe.last_step for member in own), followed)


def _member(config: Config, stock: Stock, place: int, notes: list[str]) -> tuple[Member, Adapter]:
    """A member with a fresh adapter; where its init needs numbers, one of the same shapes."""
    name, reads = f"member-{place}", "the weights"
    if config.adapter.from_ is None and INITS.get(config.adapter.init).reads is not None:
        reads = "data, and ranks are as asked for"
    else:
        try:
            return stock.member(config, name)
        except RuntimeError as error:
            if config.adapter.from_ is not None:
                raise
            reads = f"the weights ({type(error).__name__})"
    if not notes:
        notes.append(f"the start of adapter.init {config.adapter.init} is not in the plan: it reads {reads}")
    return stock.member(config, name, shape=config.adapter.spec())


def _longest_step(member: Member) -> int:
    """The step of the first epoch whose micro-batches compute most tokens."""
    rows, lengths = member.epochs.rows(0), lengths_of(member.epochs.examples)
    sums = np.add.reduceat(lengths[rows.items], rows.starts)
    of_step, most, chosen = member.recipe.rows_per_step, -1, 0
    for step, start in enumerate(range(0, len(sums), of_step)):
        own = sums[start : start + of_step]
        width = row_width(int(own.max()), member.epochs.row_tokens)
        tokens = width * math.ceil(len(own) / member.recipe.accumulate)
        if tokens > most:
            most, chosen = tokens, step
    return chosen


class _Counted:
    """An objective, of which what is made is the loss's."""

    def __init__(self, objective: Objective, trace: Trace):
        self.objective = objective
        self.trace = trace
        self.followers, self.supervises = objective.followers, objective.supervises
        self.told, self.summary = objective.told, objective.summary
        self.begin, self.update, self.weight = objective.begin, objective.update, objective.weight

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside) -> RowTotals:
        with self.trace.of("loss"):
            return self.objective(outputs, batch, beside)


def _aims(members: Sequence[Member], trace: Trace) -> dict[int, Aim]:
    """The members' aims; members of one objective still share its call."""
    counted: dict[Objective, Objective] = {m.objective: _Counted(m.objective, trace) for m in members}
    return {member.slot: replace(member.aim(), objective=counted[member.objective]) for member in members}


def _step(
    base: LanguageBase, bank: Bank, rule: Any, members: Sequence[Member], trace: Trace, budget_tokens: int | None
) -> tuple[int, float]:
    """One step as `training.step` makes it, but for the numbers that it reads.

    How many tokens it computes, and the share of them that was followed.
    """
    aims = _aims(members, trace)
    with trace.of("data and other"):
        batches = micro_batches(members, base, budget_tokens)
    # The widest come first, and from the second on gradients are there to be added to.
    for batch in batches[:MOST_BATCHES]:
        add_gradients(base, batch, aims, SlotSums(aims, base.device))
    tokens = [sum(batch.costs) for batch in batches]
    followed = sum(tokens[:MOST_BATCHES]) / sum(tokens)
    trace.scale_work("step", 1 / followed)
    factors = [tensor for stack in bank.stacks.values() for tensor in stack.tensors.values()]
    trace.mark([tensor.grad for tensor in factors if tensor.grad is not None], "gradients")
    with trace.of("optimizer"):
        # A norm above the one to clip at, so that what clipping makes is there.
        rule.step({member.slot: member.update() for member in members}, [2.0] * bank.num_slots)
    drop_gradients(bank)
    return sum(tokens), followed


def _evaluate(base: LanguageBase, members: Sequence[Member], trace: Trace) -> None:
    first = members[0]
    rows = first.epochs.__class__(first.eval_examples, row_tokens=first.epochs.row_tokens, seed=0, packs=base.packs)
    chosen = list(rows.rows(0)[: first.recipe.rows_per_step])
    examples = [[first.eval_examples[index] for index in row] for row in chosen]
    slots = tuple(member.slot for member in members for _ in examples)
    batch = batch_of(examples * len(members), base, width=first.epochs.row_tokens, slots=slots)
    with torch.no_grad():
        forward_batch(base, batch, _aims(members, trace))


def _generate(config: Config, base: LanguageBase, bank: Bank, examples: Sequence[Any], trace: Trace) -> None:
    """The prompts that take most, and one token after them with the cache as it is at the end."""
    inputs = [list(prompt) for prompt, _ in _inputs(examples)]
    longest = sorted(inputs, key=len)[-GENERATED_ROWS:]
    if not longest:
        return
    step = CachedStep(base, longest)
    width = step.tokens.shape[1]
    new = int(min(config.evaluate.max_new_tokens, (base.max_positions or math.inf) - width))
    step.expect(new)
    with torch.no_grad(), bank.route([0] * len(longest)):
        step(None)
        step.skip(new - 2)
        step(step.tokens[:, -1])


def _alive(trace: Trace, left_out: Sequence[str], at: int | None = None) -> dict[str, int]:
    held: dict[str, int] = {}
    for block in trace.blocks:
        there = (at is None or block.born <= at) and (block.died is None or (at is not None and block.died > at))
        if there and block.category not in left_out:
            held[block.category] = held.get(block.category, 0) + block.num_bytes
    return held


def _phase(trace: Trace, name: str, begin: int, left_out: Sequence[str], tokens: int = 0) -> PhaseTrace:
    """What the events since `begin` come to."""
    peak, at = trace.peak(begin, left_out)
    events = [
        (id(block), block.num_bytes if made else 0)
        for block, made in trace.events[begin:]
        if block.category not in left_out
    ]
    return PhaseTrace(name, peak, _alive(trace, left_out, at), events, trace.work.get(name, Work()), tokens)


def total_of(held: Mapping[str, int]) -> int:
    """The sum of what is held, by category."""
    return sum(held.values())
