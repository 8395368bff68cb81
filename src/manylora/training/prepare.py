"""From configurations to what a run needs: the base, the examples, the adapters and the members."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.adapters.adapter import Adapter
from manylora.adapters.receipt import check_receipt
from manylora.base.frozen import FrozenModel
from manylora.data.batches import Epochs
from manylora.data.store import lengths_of
from manylora.errors import BaseMismatch, ConfigError, DataError
from manylora.methods.inits import INITS
from manylora.objectives import OBJECTIVES
from manylora.objectives.objective import objective_of
from manylora.tasks import TASKS
from manylora.tasks.data import (
    RunData,
    filling,
    split_off,
)
from manylora.training.inputs import first_readers, read_inputs
from manylora.training.member import Member, Recipe, follower_start, steps_for, tokens_of, total_steps
from manylora.training.optim.stacked import OptimizerSettings
from manylora.training.rates import auto_rate

if TYPE_CHECKING:
    from manylora.config import Config, TrainConfig
    from manylora.spec import AdapterSpec
    from manylora.tasks.task import Task
    from manylora.types import Objective


class Stock:
    """What the members of a run share: the base, opened once, and their examples, each reading of the data made once.

    `objects` are the base and the data sets that a configuration names `python:NAME`. `facts` say where the rows come
    from; `new_notes` are lines for the log, to which each member adds what has not been said yet.

    Raises:
        UserError: whatever of the configuration cannot be had; no file has been written.
    """

    def __init__(self, config: Config, *, objects: Mapping[str, Any] | None = None, use_cache: bool = True):
        self.config = config
        self._objects = objects or {}
        self.use_cache = use_cache
        self._data: dict[str, RunData] = {}
        self._epochs: dict[tuple[str, int], Epochs] = {}
        self._inputs_read: dict[tuple[str, str, str, int], Any] = {}
        task = self.task(config)
        self._found = task.find(config, self._objects)
        self.base: Any = task.open(config, self._objects)
        self._notes: list[str] = list(self.base.notes)
        self._taken = 0
        self.facts = self.data(config).facts

    def task(self, config: Config) -> Task:
        """What a configuration learns."""
        return TASKS.get(config.task)

    def objective(self, config: Config) -> Objective:
        """What a configuration minimises: what it names, else what its task does.

        Raises:
            ConfigError: its labels stand elsewhere than the task's do.
        """
        own = objective_of(self.task(config).objective)
        if config.objective.name is None:
            return own
        chosen = objective_of(config.objective.name, config.objective.own())
        if not own.supervises <= chosen.supervises:
            fitting = [name for name in OBJECTIVES if own.supervises <= OBJECTIVES.get(name).supervises]
            raise ConfigError(
                f"objective is {config.objective.name!r}, and the task {config.task!r} has labels at "
                f"{' and '.join(own.supervises)}, which it does not learn from",
                allowed=", ".join(fitting),
            )
        return chosen

    @property
    def slots_per_member(self) -> int:
        """How many slots a member takes at most: its own, and one for each follower of its objective."""
        return 1 + max(len(self.objective(config).followers) for config in (self.config, *self._searched()))

    def _searched(self) -> Iterator[Config]:
        """The configuration with every objective that a sweep may choose."""
        space = {} if self.config.sweep is None else self.config.sweep.space
        keys = [key for key, choices in space.items() if key.startswith("objective") and isinstance(choices, list)]
        for picked in product(*(space[key] for key in keys)) if keys else ():
            values = self.config.to_dict()
            chosen = values["objective"] if isinstance(values["objective"], dict) else {"name": values["objective"]}
            for key, choice in zip(keys, picked, strict=True):
                setting = key.partition(".")[2]
                chosen = chosen | {setting: choice} if setting else choice
            yield type(self.config).model_validate(values | {"objective": chosen, "sweep": None})

    def data(self, config: Config) -> RunData:
        """The examples that a configuration names, read and encoded once for all members that name the same."""
        _, notes = self._rows_of(config)
        key = self._key(config)
        if key not in self._data:
            task = self.task(config)
            found = self._found if config is self.config else task.find(config, self._objects)
            data = task.read(config, self.base, found, self._objects, use_cache=self.use_cache)
            for side in (data.train, data.held_out):
                if (empty := np.flatnonzero(lengths_of(side) < 1)).size:
                    raise DataError(
                        f"the task {config.task} made an example of no tokens, number {empty[0] + 1} of {len(side):,}",
                        allowed="examples of at least one token",
                    )
            data = split_off(config, data, _split_seed(config))
            counts = f"{len(data.train):,} examples to learn from, {len(data.held_out):,} held out"
            self._say([*notes, *data.notes, counts])
            self._data[key] = data
        return self._data[key]

    def member(self, config: Config, name: str, *, shape: AdapterSpec | None = None) -> tuple[Member, Adapter]:
        """A member as a configuration describes it, and its fresh adapter.

        `shape`: the adapter has that of this specification, and numbers of no meaning (`Adapter.shaped`): a checkpoint
        has them.

        Raises:
            UserError: its data, its adapter or its schedule cannot be had.
        """
        data = self.data(config)
        adapter = self.start(config, shape=shape)
        optimizer_of(config.train).check(list(adapter.factors))
        member = self._laid_out(config, name, adapter.spec, data)
        for follower in member.objective.followers.values():
            check_receipt(follower_start(follower, adapter), self.base)
        self._say(coverage(self.base, adapter))
        return member, adapter

    def start(self, config: Config, *, shape: AdapterSpec | None = None) -> Adapter:
        """What a configuration's member starts from, with what its task says of itself; `shape` as in `member`."""
        task = self.task(config)
        spec = replace(config.adapter.spec(), outputs=task.outputs(self.data(config)))
        if config.adapter.from_ is not None:
            adapter = continued_adapter(config, self.base)
        elif shape is not None:
            adapter = Adapter.shaped(self.base, replace(shape, outputs=spec.outputs))
        else:
            adapter = Adapter.new(self.base, spec, seed=config.train.seed, inputs=self._inputs(config, spec))
        return replace(adapter, record={"name": config.task, **task.record(config, self.base)})

    def _inputs(self, config: Config, spec: AdapterSpec) -> dict[str, Any] | None:
        """What the init found of each site's inputs: read once for all members that train on the same rows."""
        reader = INITS.get(spec.init).reads
        if reader is None:
            return None
        first, ranks = first_readers(self.base), Adapter.check(self.base, spec)
        low_rank = {name: rank for name, rank in ranks.items() if rank}
        wanted: dict[str, int] = {}
        for name, rank in low_rank.items():
            wanted[first[name]] = max(rank, wanted.get(first[name], 0))
        key = self._key(config), spec.init
        missing = {name: rank for name, rank in wanted.items() if (*key, name, rank) not in self._inputs_read}
        if missing:
            # The order of rows is of no member: those of other seeds share what is found.
            epochs = self._epochs_of(config, seed=0)
            for name, found in read_inputs(self.base, epochs, reader, missing).items():
                self._inputs_read[*key, name, missing[name]] = found
        return {name: self._inputs_read[*key, first[name], wanted[first[name]]] for name in low_rank}

    def check(self, config: Config) -> None:
        """Raise what `member` would of the data and of the adapter's sites and ranks; no factors are drawn."""
        self.data(config)
        if config.adapter.from_ is None:
            sites = list(Adapter.check(self.base, config.adapter.spec()))
        else:
            sites = list(self.start(config).factors)
        optimizer_of(config.train).check(sites)

    def length(self, config: Config) -> tuple[int, int]:
        """(trained tokens, steps) of a member that runs to its end."""
        member = self._laid_out(config, "", config.adapter.spec(), self.data(config))
        steps = member.recipe.total_steps
        return tokens_of(member.epochs, steps=steps, rows_per_step=member.recipe.rows_per_step), steps

    def _laid_out(self, config: Config, name: str, spec: AdapterSpec, data: RunData) -> Member:
        seed = config.train.seed
        epochs = self._epochs_of(config, seed=seed)
        self._say(filling(epochs, config.train.rows_per_step))
        recipe, notes = make_recipe(config, epochs, self.base)
        self._say(notes)
        return Member(
            name=name,
            seed=seed,
            spec=spec,
            recipe=recipe,
            epochs=epochs,
            objective=self.objective(config),
            eval_examples=data.held_out,
        )

    def _epochs_of(self, config: Config, *, seed: int) -> Epochs:
        key = self._key(config), seed
        if key not in self._epochs:
            data, row_tokens = self.data(config), self.row_tokens(config)
            self._epochs[key] = Epochs(
                data.train, row_tokens=row_tokens, seed=seed, packs=self.base.packs, weights=data.weights
            )
        return self._epochs[key]

    def _key(self, config: Config) -> str:
        """What decides a configuration's examples, as text."""
        split = config.data.eval_fraction is not None or config.data.fold is not None
        parts = (config.task, config.data.model_dump(mode="json"), self.row_tokens(config),
                 _split_seed(config) if split else None, config.evaluate.max_examples)  # fmt: skip
        return json.dumps(parts, sort_keys=True)

    def row_tokens(self, config: Config) -> int:
        """Tokens that a row of a configuration holds: what it asks for, where the base has as many positions."""
        return self._rows_of(config)[0]

    def _rows_of(self, config: Config) -> tuple[int, list[str]]:
        return self.task(config).row_tokens(config, self.base)

    def new_notes(self) -> list[str]:
        """What has been noted since this was last asked; each line once."""
        new, self._taken = self._notes[self._taken :], len(self._notes)
        return new

    def _say(self, lines: Sequence[str]) -> None:
        self._notes += [line for line in lines if line not in self._notes]


def _split_seed(config: Config) -> int:
    return config.train.seed if config.data.split_seed is None else config.data.split_seed


def continued_adapter(config: Config, base: FrozenModel) -> Adapter:
    """The adapter that `adapter.from` names, with the dropout that is asked for.

    Raises:
        BaseMismatch: it was made for another base.
    """
    assert config.adapter.from_ is not None
    adapter = Adapter.load(config.adapter.from_)
    if adapter.base_fingerprint not in (None, base.fingerprint):
        raise BaseMismatch(
            f"adapter.from was trained on {adapter.base_name or 'another base'}, and base is {base.name}",
            next_step="set base to the one that the adapter's receipt.json names",
        )
    given = config.adapter.model_fields_set - {"from_", "dropout"}
    if given:
        raise ConfigError(
            f"adapter.from continues an adapter as it is, and adapter.{sorted(given)[0]} is given too",
            allowed="adapter.dropout beside adapter.from",
            next_step=f"leave out {', '.join(f'adapter.{name}' for name in sorted(given))}",
        )
    spec = replace(adapter.spec, dropout=config.adapter.dropout)
    return replace(adapter, spec=spec, base_fingerprint=base.fingerprint)


def make_recipe(config: Config, epochs: Epochs, base: FrozenModel) -> tuple[Recipe, list[str]]:
    """How a member is trained, with epochs, tokens, ratios and `auto` turned into numbers; and why, for the log."""
    train = config.train
    if train.tokens is not None:
        steps = steps_for(epochs, tokens=train.tokens, rows_per_step=train.rows_per_step)
    else:
        steps = train.steps or total_steps(epochs, num_epochs=train.epochs, rows_per_step=train.rows_per_step)
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * steps)
    rate, notes = train.learning_rate, []
    if rate == "auto":
        rate, reason = auto_rate(
            base,
            method=config.adapter.method,
            rows_per_step=train.rows_per_step,
            total_steps=steps,
            optimizer=train.optimizer.name,
        )
        notes = [reason]
    recipe = Recipe(
        learning_rate=rate,
        schedule=train.schedule,
        total_steps=steps,
        warmup=warmup,
        floor_ratio=train.min_rate_ratio,
        rows_per_step=train.rows_per_step,
        accumulate=train.accumulate,
        optimizer=optimizer_of(train),
        evaluate_every=config.evaluate.every_steps,
        evaluate_at=config.evaluate.at_tokens,
        patience=config.checkpoint.early_stop_patience,
        stop_after=train.stop_after,
    )
    return recipe, notes


def optimizer_of(train: TrainConfig) -> OptimizerSettings:
    """All that an optimiser is told, from the keys of the same names."""
    shared = [one.name for one in fields(OptimizerSettings) if one.name not in ("name", "own")]
    given = {name: getattr(train, name) for name in shared}
    return OptimizerSettings(name=train.optimizer.name, own=train.optimizer.own(), **given)


def coverage(base: FrozenModel, adapter: Adapter) -> list[str]:
    """Lines that say what the adapter reaches, what it leaves out, and how much is trained."""
    total = base.num_parameters()
    held = sum(base.sites[name].num_parameters() for name in adapter.factors)
    left: dict[str, int] = {}
    for name, site in base.sites.items():
        if name not in adapter.factors and site.tied_to is None:
            kind = type(site.module).__name__
            left[kind] = left.get(kind, 0) + site.num_parameters()
    trained = adapter.num_parameters()
    lines = [
        f"{len(adapter.factors)} sites hold {held / total:.1%} of the base's {total:,} parameters; left out: "
        + (", ".join(f"{kind} ({count / total:.1%})" for kind, count in left.items()) or "nothing"),
        f"trainable parameters: {trained:,} ({trained / total:.2%} of the base)",
    ]
    if adapter.capped:
        ranks = ", ".join(f"{name} ({rank})" for name, rank in list(adapter.capped.items())[:4])
        lines.append(f"rank is capped by the size of {len(adapter.capped)} sites, scale kept: {ranks}")
    return lines
