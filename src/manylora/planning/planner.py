"""What a run will hold in memory at its peak and how long a step takes, from its configuration alone; and what it held.

Nothing is trained for it and no weight is read: the real step runs on tensors that have no numbers (`memory.trace`),
and what the C library's heap makes of it is simulated (`planning.heap`). What cannot be seen so is a constant that was
measured, and is said to be one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from manylora.base.language import LanguageBase
from manylora.errors import ConfigError
from manylora.memory.device import MOST_PRODUCT_BYTES, NEW_PRODUCTS, PRODUCT_BYTES
from manylora.memory.hollow import HollowBase, hollow_of, without_weights
from manylora.memory.trace import Trace
from manylora.planning.devices import CONTEXT_BYTES, Device, measured, this_device
from manylora.planning.heap import grown
from manylora.planning.hollow import hollow_base
from manylora.planning.phases import COPIES, PhaseTrace, RunTrace, total_of, traced_run
from manylora.tasks import TASKS
from manylora.training.prepare import Stock

if TYPE_CHECKING:
    from manylora.config import Config

BASE = "python:planned"
PROCESS_BYTES = 130 * 2**20
"""What opening any base and reading its data adds to a process that has only imported everything: pages of libraries
that are used for the first time, the tokenizer, examples. Measured on 2026-11-21 with `manylora train` on two bases of
6 and 135 M parameters, after the weights are taken off: 106 and 110 MiB, and some 25 that the look at how much fits at
once leaves in the heap."""
MODULE_BYTES = 15 * 2**20
"""The same of a module that is given in Python, with neither tokenizer nor text."""
OTHER_KERNEL_BYTES = 8 * 2**20
"""What kernels keep in any dtype."""
MOST_ROUNDS = 6
"""Steps for which the heap is followed at most. It grows most in the first few: after 59 steps by what six simulated
ones say (219 MiB, of which 118 are alive), after three by what three say."""
ACCELERATOR_HOLES = 1.08
"""What an accelerator's caching allocator reserves over what is alive in it; an assumption, not measured here."""
CATEGORIES: tuple[str, ...] = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "freed and kept",
              "data and other")  # fmt: skip
REACHED = 0.75
"""Of the speed of the trials, what a step reaches on a CPU: steps take 0.8 to 1.1 times what is planned so. Measured on
2026-11-21 by bench/plan.py with one thread, bases of 6 and 135 M parameters."""
MODES = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run holds at its peak, over a process that has imported everything and opened nothing; bytes, seconds.

    `categories` are what it is made of and add up to `total_bytes`; `phase` is when it comes, `phases` are the peaks of
    all. `seconds_per_step` is None where the device's speed is not known. `tokens_per_step` are computed tokens.
    """

    device: Device
    total_bytes: int
    phase: str
    categories: Mapping[str, int]
    phases: Mapping[str, int]
    checkpointing: str
    members: int
    flops_per_step: float
    tokens_per_step: int
    seconds_per_step: float | None
    notes: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether it is at most what is free."""
        return self.total_bytes <= self.device.free_bytes

    def to_dict(self) -> dict[str, Any]:
        """What `manylora plan --json` prints."""
        return {
            "device": self.device.name, "free_bytes": self.device.free_bytes, "fits": self.fits,
            "peak_bytes": self.total_bytes, "phase": self.phase, "categories": dict(self.categories),
            "phases": dict(self.phases), "checkpointing": self.checkpointing, "members": self.members,
            "flops_per_step": self.flops_per_step, "tokens_per_step": self.tokens_per_step,
            "seconds_per_step": self.seconds_per_step, "notes": list(self.notes),
        }  # fmt: skip


class Planner:
    """Plans configurations of one base and task, which differ in how they train; the base is made once.

    `objects` are the base and the data sets that a configuration names `python:NAME`.

    Raises:
        UserError: the base or the data cannot be had.
    """

    def __init__(self, config: Config, device: Device | None = None, *, objects: Mapping[str, Any] | None = None):
        self.device = device or this_device(config.device)
        self._objects = dict(objects or {})
        if config.base in self._objects:
            self.hollow = hollow_of(self._objects[config.base])
        else:
            self.hollow = hollow_base(
                config.base, auto=TASKS.get(config.task).auto, dtype=config.dtype, device_type=self.device.kind,
                quantize=config.quantize, trust_remote_code=config.trust_remote_code,
                chat_template=config.data.chat_template,
            )  # fmt: skip
        self._stock: Stock | None = None
        # A size of main memory that is not this machine's says nothing of speed: this machine's is taken.
        if self.device.flops is None and (device is None or device.kind == "cpu"):
            self.device = measured(self.device, self.hollow.base.dtype)

    @property
    def stock(self) -> Stock:
        """The stock of the last configuration that was planned."""
        assert self._stock is not None
        return self._stock

    def plan(self, config: Config, *, members: int = 1, budget_tokens: int | None = None) -> Plan:
        """The plan of a configuration; `train.checkpointing: auto` is the first way that fits, else what holds least.

        `members` train at once, in forwards of at most `budget_tokens`.
        """
        asked = getattr(config.train, "checkpointing", "none")
        plans: list[Plan] = []
        for mode in MODES if asked == "auto" else (asked,):
            try:
                plans.append(self._plan(config, mode, members, budget_tokens))
            except ConfigError:
                break
            if plans[-1].fits:
                return plans[-1]
        return min(plans, key=lambda plan: plan.total_bytes)

    def hollow_as(self, config: Config) -> HollowBase:
        """The base with its weights packed as a configuration asks."""
        return replace(self.hollow, format=config.quantize or self.hollow.format)

    def stock_of(self, config: Config) -> Stock:
        """The examples of a configuration on the hollow base."""
        own = config.model_copy(update={"base": BASE, "quantize": None})
        self._stock = Stock(own, objects={**self._objects, BASE: self.hollow.base})
        return self._stock

    def _plan(self, config: Config, mode: str, members: int, budget_tokens: int | None) -> Plan:
        stock = self._stock if self._stock is not None and self._same_data(config) else self.stock_of(config)
        own = config.model_copy(update={"base": BASE, "quantize": None})
        hollow = self.hollow_as(config)
        trace = Trace(packs=self.device.kind == "cpu")
        with without_weights(hollow, trace) as base:
            run = traced_run(
                own, stock, base, trace, checkpointing=mode, members=members, budget_tokens=budget_tokens,
                with_copies=self.device.kind == "cpu",
            )  # fmt: skip
        return self._summed(config, run, mode, members, hollow)

    def _same_data(self, config: Config) -> bool:
        stock = self._stock
        return stock is not None and (stock.config.data, stock.config.task) == (config.data, config.task)

    def _summed(self, config: Config, run: RunTrace, mode: str, members: int, hollow: HollowBase) -> Plan:
        steady, fixed = total_of(run.steady), self._fixed(run)
        peaks = {"loading": self._loading(run, hollow)}
        for phase in run.phases:
            peaks[phase.name] = steady + self._held(phase, run.num_steps) + fixed
        highest = max(peaks, key=lambda name: peaks[name])
        categories: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        phase = next((phase for phase in run.phases if phase.name == highest), None)
        for name, count in (run.steady if phase is None else phase.held).items():
            categories["adapters" if name == COPIES else name] += count
        left = peaks[highest] - sum(categories.values())
        other = min(max(left, 0), fixed)
        categories["data and other"] += other
        categories["freed and kept"] += left - other
        step = run.phases[0]
        flops, moved = self.device.flops, self.device.moved_bytes
        seconds = step.work.flops / flops + step.work.moved_bytes / moved if flops and moved else None
        if seconds is not None and self.device.kind == "cpu":
            seconds /= REACHED
        return Plan(
            self.device, peaks[highest], highest, categories, peaks, mode, members, step.work.flops, step.tokens,
            seconds, (*hollow.notes, *run.notes, *self._said()),
        )  # fmt: skip

    def _loading(self, run: RunTrace, hollow: HollowBase) -> int:
        """While the weights are read: those, the file's pages where they are cast, and nothing yet of the rest."""
        weights = run.steady.get("weights", 0)
        cast = 0 if hollow.format is not None or abs(hollow.file_bytes - weights) < 0.1 * weights else hollow.file_bytes
        return weights + cast + self._process()

    def _held(self, phase: PhaseTrace, num_steps: int) -> int:
        if self.device.kind != "cpu":
            return round(ACCELERATOR_HOLES * phase.peak_bytes)
        later = round(math.log2(max(1.0, num_steps / 3)))
        rounds = min(num_steps, 3 + later, MOST_ROUNDS) if phase.name == "step" else 1
        return grown(phase.events, rounds=rounds)

    def _fixed(self, run: RunTrace) -> int:
        if self.device.kind != "cpu":
            return CONTEXT_BYTES
        each = PRODUCT_BYTES.get(self.hollow.base.dtype, 0.0)
        kernels = min(MOST_PRODUCT_BYTES, each * run.num_products * (run.num_steps / run.followed) ** NEW_PRODUCTS)
        return self._process() + OTHER_KERNEL_BYTES + round(kernels)

    def _process(self) -> int:
        return PROCESS_BYTES if isinstance(self.hollow.base, LanguageBase) else MODULE_BYTES

    def _said(self) -> list[str]:
        if self.device.kind == "cpu":
            return []
        return [
            "an accelerator's kernels are planned as those of the CPU: their scratch memory is not in the plan",
            f"{CONTEXT_BYTES >> 20} MiB for its context and {ACCELERATOR_HOLES - 1:.0%} for holes are assumptions",
        ]


def planned(
    config: Config, *, device: Device | None = None, objects: Mapping[str, Any] | None = None,
    members: int = 1, budget_tokens: int | None = None,
) -> Plan:  # fmt: skip
    """What a run of a configuration will hold at its peak on a device (None: this one), with what is free there now.

    Raises:
        UserError: the base, the data or the adapter cannot be had.
    """
    return Planner(config, device, objects=objects).plan(config, members=members, budget_tokens=budget_tokens)
