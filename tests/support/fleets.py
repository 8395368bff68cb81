"""Members and loops over small bases, for tests that train."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import KINDS, optimizer
from starts import new_adapter

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.data.batches import Epochs
from manylora.data.example import Example
from manylora.objectives import OBJECTIVES
from manylora.spec import AdapterSpec
from manylora.training import checkpoint as checkpoint_module
from manylora.training.loop import Loop, LoopSettings
from manylora.training.member import Member, Recipe
from manylora.training.optim.stacked import OptimizerSettings
from manylora.training.orders import Given

RECIPE = Recipe(
    learning_rate=1e-2,
    schedule="cosine",
    total_steps=6,
    warmup=2,
    rows_per_step=4,
    optimizer=OptimizerSettings(weight_decay=0.1, clip_norm=1.0),
)
SHARED = {one.name for one in fields(OptimizerSettings)} - {"name", "own"}
"""The settings that all optimisers have."""


def ragged(count: int, seed: int = 0, longest: int = 20) -> list[Example]:
    """Examples of random tokens below 97, of several lengths."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, longest + 1, count).tolist()
    tokens = [draw.integers(0, 97, length).astype(np.int32) for length in lengths]
    return [Example(own, np.arange(len(own)) >= 2, 2, f"p{n}", "", "", "made", n) for n, own in enumerate(tokens)]


class Memory:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stage(self, text: str) -> None:
        pass

    def losses(self, member: str) -> list[float]:
        return [e["loss"] for e in self.events if e["event"] == "step" and e["member"] == member]


def member(name: str, examples: list, *, spec: AdapterSpec, seed: int = 0, held_out=(), **changes) -> Member:
    """A member trained by RECIPE but for `changes`: `optimizer` is a label of KINDS, its settings are named as such."""
    name_of, own = KINDS[changes.pop("optimizer", "adamw")]
    shared = {key: getattr(RECIPE.optimizer, key) for key in SHARED} | {
        key: changes.pop(key) for key in SHARED & changes.keys()
    }
    recipe = replace(RECIPE, optimizer=optimizer(name_of, own=own, **shared), **changes)
    epochs = Epochs(examples, row_tokens=32, seed=seed, packs=True)
    objective = OBJECTIVES.get("causal-lm")
    return Member(
        name=name, seed=seed, spec=spec, recipe=recipe, epochs=epochs, objective=objective, eval_examples=held_out
    )


class Running:
    """A loop over members that are given, on a bank of their number of slots; keeps what each ends with."""

    def __init__(self, base, members: list[Member], dtype: torch.dtype, *, spoil=None, **more) -> None:
        by_name = {m.name: m for m in members}
        bank = Bank(base, num_slots=more.pop("num_slots", len(members)), dtype=dtype)
        self.adapters: dict[str, Adapter] = {}

        def make(name: str, shape: AdapterSpec | None) -> tuple[Member, Adapter]:
            adapter = new_adapter(base, by_name[name].spec, seed=by_name[name].seed)
            return by_name[name], adapter if spoil is None else spoil(name, adapter)

        self.recorder = Memory()
        self.members = members
        source = more.pop("source", None) or Given(list(by_name))
        settings = LoopSettings(**{"checkpoint_every": None, **more.pop("settings", {})})
        slots = more.pop("slots", range(bank.num_slots))
        self.loop = Loop(bank, slots, source, make, self.recorder, settings=settings, hand=self._hand, **more)
        self.bank = bank

    def _hand(self, member: Member, adapter: Adapter) -> None:
        assert member.name not in self.adapters
        self.adapters[member.name] = adapter

    def run(self, *args) -> Running:
        self.loop.run(*args)
        return self

    def final(self, name: str) -> dict[str, torch.Tensor]:
        return checkpoint_module.flatten(self.adapters[name].factors)


def spoilt(which: str, value: float):
    """Adapters as they are, but for one whose every factor is `value`."""

    def spoil(name: str, adapter: Adapter) -> Adapter:
        if name != which:
            return adapter
        filled = {
            site: replace(own, tensors={key: torch.full_like(t, value) for key, t in own.tensors.items()})
            for site, own in adapter.factors.items()
        }
        return replace(adapter, factors=filled)

    return spoil


def killed_after(stop: int, run: Running) -> None:
    """Run until `stop` ticks are done and saved, and die in the next as a process that is killed."""
    calls = []

    def kill() -> bool:
        calls.append(1)
        if len(calls) > stop:
            raise SystemExit  # as a kill between two checkpoints: nothing is saved on the way out
        return False

    run.loop.save, save = (lambda: save() if len(calls) < stop else None), run.loop.save
    with pytest.raises(SystemExit):
        run.run(kill)
