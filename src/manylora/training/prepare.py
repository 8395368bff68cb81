"""From a configuration to what a run needs: the base, the examples, the adapter and the member."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.data.batches import Epochs
from manylora.errors import BaseMismatch, ConfigError
from manylora.tasks import TASKS
from manylora.training.data import (
    filling,
    held_out_places,
    object_of,
    open_places,
    reading_of,
    split_off,
    tensor_data,
    text_data,
)
from manylora.training.member import Member, Recipe, total_steps

if TYPE_CHECKING:
    from manylora.config import Config

MEMBER = "main"
"""The name of the only member of a run that is no sweep."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a run needs, checked; nothing has been written yet. `data` is for the manifest."""

    base: Any
    bank: Bank
    member: Member
    task: Any
    notes: list[str]
    data: dict[str, list[dict[str, Any]]]


def prepare(config: Config, *, objects: Mapping[str, Any] | None = None, use_cache: bool = True) -> Prepared:
    """Load the base, read and encode the data, put the adapter into a bank and lay out the member.

    `objects` are the base and the data sets that the configuration names `python:NAME`.

    Raises:
        UserError: whatever of the configuration cannot be had; no file has been written.
    """
    task = TASKS.get(config.task)
    objects = objects or {}
    if task.kinds:
        sources = open_places(config.data.train, config.data.columns, objects)
        eval_sources = open_places(held_out_places(config), config.data.columns, objects)
        base = _language_base(config, objects)
        if task.causal and not base.causal:
            raise ConfigError(
                f"the task {config.task} learns to predict the next token, and in {base.name} a token sees the next: "
                "it would only learn to copy",
                next_step="choose a base that is a causal language model",
            )
        row_tokens, notes = _row_tokens(config.train.row_tokens, base)
        data = text_data(base, sources, eval_sources, reading_of(config, row_tokens), use_cache=use_cache)
    else:
        base, row_tokens, notes = _module_base(config, objects), config.train.row_tokens, []
        data = tensor_data(config, base, objects)
    data = split_off(config, data)

    adapter = start_adapter(config, base)
    bank = Bank(base, num_slots=1)
    bank.put(adapter, slot=0)
    epochs = Epochs(data.train, row_tokens=row_tokens, seed=config.train.seed, packs=base.packs, weights=data.weights)
    member = Member(
        name=MEMBER,
        slot=0,
        seed=config.train.seed,
        spec=adapter.spec,
        recipe=make_recipe(config, epochs),
        epochs=epochs,
        eval_examples=data.held_out,
    )
    counts = f"{len(data.train):,} examples to learn from, {len(data.held_out):,} held out"
    notes = [*base.notes, *notes, *data.notes, counts]
    if task.kinds:
        notes.append(filling(epochs, config.train.rows_per_step))
    return Prepared(base, bank, member, task, [*notes, *coverage(base, adapter)], data.facts)


def _language_base(config: Config, objects: Mapping[str, Any]) -> LanguageBase:
    if config.base.startswith("python:"):
        base = object_of(config.base, objects, "base")
        if isinstance(base, LanguageBase):
            return base
        raise ConfigError(
            f"the task {config.task} learns from text, and the base is a {type(base).__name__} without a tokenizer",
            next_step="set task: module to learn from tensors, or give a base that manylora.load_base made",
        )
    return load_base(
        config.base,
        dtype=config.dtype,
        device=config.device,
        quantize=config.quantize,
        auto=TASKS.get(config.task).auto,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.data.chat_template,
    )


def _module_base(config: Config, objects: Mapping[str, Any]) -> FrozenModel:
    base = object_of(config.base, objects, "base") if config.base.startswith("python:") else None
    if isinstance(base, FrozenModel):
        return base
    raise ConfigError(
        f"the task {config.task} adapts a torch module, and base is {config.base!r}",
        next_step="manylora.train(config, base=manylora.FrozenModel(module), train_data=...)",
    )


def _row_tokens(asked: int, base: LanguageBase) -> tuple[int, list[str]]:
    if base.max_positions is None or asked <= base.max_positions:
        return asked, []
    if base.packs:
        return asked, [
            f"train.row_tokens {asked} is above this base's {base.max_positions} positions: sequences may not be"
        ]
    return base.max_positions, [f"train.row_tokens is lowered to this base's {base.max_positions} positions"]


def start_adapter(config: Config, base: FrozenModel) -> Adapter:
    """A fresh adapter, or the one that `adapter.from` names with the dropout that is asked for.

    Raises:
        BaseMismatch: the adapter to continue was made for another base.
    """
    spec = config.adapter.spec()
    if config.adapter.from_ is None:
        return Adapter.new(base, spec, seed=config.train.seed)
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
    return replace(adapter, spec=replace(adapter.spec, dropout=spec.dropout), base_fingerprint=base.fingerprint)


def make_recipe(config: Config, epochs: Epochs) -> Recipe:
    """How a member is trained, with epochs and ratios turned into steps."""
    train = config.train
    steps = train.steps or total_steps(epochs, num_epochs=train.epochs, rows_per_step=train.rows_per_step)
    warmup = train.warmup_steps if train.warmup_steps is not None else math.ceil(train.warmup_ratio * steps)
    return Recipe(
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        total_steps=steps,
        warmup=warmup,
        floor_ratio=train.min_rate_ratio,
        rows_per_step=train.rows_per_step,
        accumulate=train.accumulate,
        optimizer=train.optimizer,
        weight_decay=train.weight_decay,
        betas=train.betas,
        epsilon=train.epsilon,
        clip_norm=train.clip_norm,
        evaluate_every=config.evaluate.every_steps,
        patience=config.checkpoint.early_stop_patience,
    )


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
