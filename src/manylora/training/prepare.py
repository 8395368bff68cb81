"""From a configuration to what a run needs: the base, the examples, the adapter and the member."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.data.batches import Epochs
from manylora.data.examples import Example, encode
from manylora.data.readers import read_rows
from manylora.data.split import split_by_group
from manylora.errors import BaseMismatch, ConfigError
from manylora.tasks import TASKS
from manylora.training.member import Member, Recipe, total_steps

if TYPE_CHECKING:
    from manylora.config import Config

MEMBER = "main"
"""The name of the only member of a run that is no sweep."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything that a run needs, checked; nothing has been written yet."""

    base: LanguageBase
    bank: Bank
    member: Member
    task: Any
    notes: list[str]


def prepare(config: Config) -> Prepared:
    """Load the base, read and encode the data, put the adapter into a bank and lay out the member.

    Raises:
        UserError: whatever of the configuration cannot be had; no file has been written.
    """
    task = TASKS.get(config.task)
    files = [*config.data.train, *config.data.eval]
    rows = {path: read_rows([path], columns=config.data.columns) for path in files}
    base = load_base(
        config.base,
        dtype=config.dtype,
        device=config.device,
        auto=task.auto,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.data.chat_template,
    )
    row_tokens, notes = _row_tokens(config.train.row_tokens, base)
    train, train_notes = _encode(config, [row for path in config.data.train for row in rows[path]], base, row_tokens)
    held_out: Sequence[Example] = ()
    if config.data.eval:
        held_out, _ = _encode(config, [row for path in config.data.eval for row in rows[path]], base, row_tokens)
    elif config.data.eval_fraction is not None:
        train, held_out = split_by_group(train, config.data.eval_fraction, config.train.seed)
    if config.evaluate.max_examples is not None:
        held_out = held_out[: config.evaluate.max_examples]

    adapter = start_adapter(config, base)
    bank = Bank(base, num_slots=1)
    bank.put(adapter, slot=0)
    epochs = Epochs(train, row_tokens=row_tokens, seed=config.train.seed, packs=base.packs)
    member = Member(
        name=MEMBER,
        slot=0,
        seed=config.train.seed,
        spec=adapter.spec,
        recipe=make_recipe(config, epochs),
        epochs=epochs,
        eval_examples=held_out,
    )
    counts = f"{len(train):,} examples to learn from, {len(held_out):,} held out"
    return Prepared(base, bank, member, task, [*base.notes, *notes, *train_notes, counts, *coverage(base, adapter)])


def _encode(
    config: Config, rows: Sequence[Any], base: LanguageBase, row_tokens: int
) -> tuple[Sequence[Example], list[str]]:
    encoded = encode(
        rows,
        base.tokenizer,
        format=config.data.format,
        max_length=row_tokens,
        overflow=config.data.overflow,
        eos_id=base.eos_ids,
    )
    return encoded.examples, list(encoded.notes)


def _row_tokens(asked: int, base: LanguageBase) -> tuple[int, list[str]]:
    if base.max_positions is None or asked <= base.max_positions:
        return asked, []
    if base.packs:
        return asked, [
            f"train.row_tokens {asked} is above this base's {base.max_positions} positions: sequences may not be"
        ]
    return base.max_positions, [f"train.row_tokens is lowered to this base's {base.max_positions} positions"]


def start_adapter(config: Config, base: LanguageBase) -> Adapter:
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


def coverage(base: LanguageBase, adapter: Adapter) -> list[str]:
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


def data_files(config: Config) -> list[Path]:
    return [*config.data.train, *config.data.eval]
