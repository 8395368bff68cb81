"""What a run learns from: the places that a configuration names, opened, encoded and split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manylora.data.examples import Reading
from manylora.data.load import Loaded, load_examples, overlap
from manylora.data.sources import Source, open_source, splits_of
from manylora.data.split import fold_by_group, split_by_group
from manylora.data.tensors import TensorExamples, argument_names
from manylora.errors import ConfigError, DataNotFound

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from manylora.base.frozen import FrozenModel
    from manylora.base.language import LanguageBase
    from manylora.config import Config, DataPlace
    from manylora.data.batches import Epochs, Weights


@dataclass(frozen=True, slots=True)
class RunData:
    """What is trained on and what is held out, with lines for the log and facts for the manifest."""

    train: Any
    held_out: Any
    weights: Weights
    notes: list[str]
    facts: dict[str, list[dict[str, Any]]]


def open_places(
    places: Sequence[DataPlace], columns: Mapping[str, str], objects: Mapping[str, Any] | None = None
) -> list[tuple[Source, float]]:
    """The sources that a configuration names, each with how often an epoch shows it.

    Raises:
        DataNotFound: a place that is not there; a data set of Python that was not handed over.
    """
    return [
        (
            open_source(
                object_of(place.path, objects or {}, "the data"),
                split=place.split,
                subset=place.subset,
                columns=columns,
            ),
            place.weight,
        )
        for place in places
    ]


def object_of(path: str, objects: Mapping[str, Any], what: str) -> Any:
    """The place itself, or the object of Python that it names."""
    if not path.startswith("python:"):
        return path
    if path not in objects:
        raise DataNotFound(
            f"{what}: {path!r} was an object in Python, which no file can name",
            next_step="manylora.train(config, base=..., train_data=..., eval_data=...), or name a file",
        )
    return objects[path]


def held_out_places(config: Config) -> tuple[DataPlace, ...]:
    """Where the held-out rows are: as said, else the valid split of a folder that is trained on."""
    if config.data.held_out:
        return config.data.eval
    return tuple(held for place in config.data.train for held in own_held_out(place))


def own_held_out(place: DataPlace) -> tuple[DataPlace, ...]:
    """The valid split of a folder whose train split is meant; nothing where it has none."""
    if place.split not in (None, "train") or not Path(place.path).is_dir() or "valid" not in splits_of(place.path):
        return ()
    return (place.model_copy(update={"split": "valid", "weight": 1.0}),)


def reading_of(config: Config, row_tokens: int, kinds: tuple[str, ...]) -> Reading:
    """How the configuration wants rows read, in sequences of at most `row_tokens` tokens."""
    data = config.data
    return Reading(
        max_length=row_tokens,
        format=data.format,
        kinds=kinds,
        overflow=data.overflow,
        turns=data.turns,
        on_bad_row=data.on_bad_row,
    )


def text_data(
    base: LanguageBase,
    sources: Sequence[tuple[Source, float]],
    eval_sources: Sequence[tuple[Source, float]],
    reading: Reading,
    *,
    use_cache: bool,
) -> RunData:
    """Rows of text as examples for a base.

    Raises:
        DataError: rows that cannot be read or learned from.
    """

    def load(opened: Sequence[tuple[Source, float]]) -> Loaded:
        return load_examples(opened, base.tokenizer, reading, eos_ids=base.eos_ids, use_cache=use_cache)

    loaded = load(sources)
    notes, facts = loaded.notes(), {"train": [part.describe() for part in loaded.parts]}
    if not eval_sources:
        return RunData(loaded.examples, (), loaded.weights, notes, facts)
    apart = load(eval_sources)
    notes += [*apart.notes(), *overlap(loaded.examples, apart.examples)]
    facts["eval"] = [part.describe() for part in apart.parts]
    return RunData(loaded.examples, apart.examples, loaded.weights, notes, facts)


def tensor_data(config: Config, base: FrozenModel, objects: Mapping[str, Any]) -> RunData:
    """Rows of tensors for a module.

    Raises:
        ConfigError: a place that is no object of Python. DataError: items of another form.
    """
    names = argument_names(base.model)
    for side, places in (("train", config.data.train), ("eval", config.data.eval)):
        if len(places) > 1:
            raise ConfigError(
                f"data.{side} names {len(places)} data sets of torch",
                allowed="one",
                next_step="torch.utils.data.ConcatDataset([first, second])",
            )
    found: dict[str, list[TensorExamples]] = {}
    for side, places in (("train", config.data.train), ("eval", config.data.eval)):
        for place in places:
            if not place.path.startswith("python:"):
                raise ConfigError(
                    f"the task {config.task} learns from data sets of torch, and data.{side} is {place.path!r}",
                    next_step="manylora.train(config, base=..., train_data=a torch.utils.data.Dataset)",
                )
            found.setdefault(side, []).append(TensorExamples(object_of(place.path, objects, f"data.{side}"), names))
    facts = {side: [{"name": one.name, "rows": len(one)} for one in sets] for side, sets in found.items()}
    notes = [note for sets in found.values() for one in sets for note in one.notes]
    train, held_out = found["train"][0], found.get("eval", [()])[0]
    return RunData(train, held_out, [(len(train), config.data.train[0].weight)], notes, facts)


def split_off(config: Config, data: RunData, seed: int) -> RunData:
    """The same data, a part of it held out as the configuration asks; `seed` decides which."""
    sides = None
    if config.data.eval_fraction is not None:
        sides = split_by_group(data.train, config.data.eval_fraction, seed)
    if config.data.fold is not None:
        part, parts = (int(number) for number in config.data.fold.split("/"))
        sides = fold_by_group(data.train, part - 1, parts, seed)
    if sides is not None:
        chosen, rest = sides
        train, held_out = data.train.take(chosen), data.train.take(rest)
        data = replace(data, train=train, held_out=held_out, weights=_weights_of(data.weights, chosen))
    if config.evaluate.max_examples is not None:
        data = replace(data, held_out=data.held_out[: config.evaluate.max_examples])
    return data


def _weights_of(weights: Weights, chosen: NDArray[np.int64]) -> Weights:
    """The weights of the examples that are left of each run."""
    ends = np.cumsum([count for count, _ in weights])
    counts = np.diff(np.searchsorted(chosen, ends), prepend=0)
    return [(int(count), weight) for count, (_, weight) in zip(counts, weights, strict=True)]


def filling(epochs: Epochs, rows_per_step: int) -> list[str]:
    """A line that says how full the rows of the first epoch are; none where every example is as long as a row."""
    if len(set(epochs.lengths.tolist())) == 1 and epochs.lengths[0] == 1:
        return []
    trained, real, computed = epochs.fill(rows_per_step)
    how = "packed into" if epochs.packs else "in"
    line = (
        f"{real:,} tokens {how} {epochs.num_rows(0):,} rows: of the tokens that are computed, "
        f"{real / computed:.1%} are no padding and {trained / computed:.1%} are learned"
    )
    return [line]
