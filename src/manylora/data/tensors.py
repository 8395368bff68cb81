"""Rows of tensors: a `torch.utils.data.Dataset` whose items are inputs of a module and a target."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.errors import DataError
from manylora.types import Batch

TARGETS = ("labels", "label")
"""What a data set of mappings may call its target."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorExample:
    """One row: keyword arguments of the module's forward, and the target; neither has a dimension for rows.

    Every row is a `group` of its own, and has no prompt.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor
    group: str
    prompt: str = ""
    prompt_length: int = 0

    def __len__(self) -> int:
        return 1

    @staticmethod
    def batch(
        rows: Sequence[Sequence[TensorExample]],
        base: Any,
        *,
        width: int,
        slots: Sequence[int],
        streams: Sequence[int] | None = None,
    ) -> Batch:
        """Tensors as they are, rows first."""
        return stack(rows, slots=slots, streams=streams)


def argument_names(module: torch.nn.Module) -> list[str]:
    """The arguments of a module's forward that an input may be given to, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, one in inspect.signature(module.forward).parameters.items() if one.kind in kinds]


class TensorExamples(Sequence[TensorExample]):
    """The rows of a data set of torch, each made when it is asked for; `names` are the module's arguments in order.

    An item is (input, ..., target), or a mapping with `labels` or `label` beside the inputs.

    Raises:
        DataError: no length, no rows, an item of another form, a target that is no class number.
    """

    def __init__(self, dataset: Any, names: Sequence[str]):
        self.name = type(dataset).__name__
        if not isinstance(dataset, Sized):
            raise DataError(
                f"a {self.name} without a length cannot be drawn from in random order", next_step="give it __len__"
            )
        self._dataset = dataset
        self._names = tuple(names)
        self._places = np.arange(len(dataset))
        if not len(dataset):
            raise DataError(f"the {self.name} holds no rows", next_step="give data that holds at least one row")
        self.notes = [self._described()]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> TensorExample: ...
    @overload
    def __getitem__(self, place: slice) -> TensorExamples: ...
    def __getitem__(self, place: int | slice) -> TensorExample | TensorExamples:
        return self.take(np.arange(len(self))[place]) if isinstance(place, slice) else self._row(self._places[place])

    def take(self, places: NDArray[np.int64]) -> TensorExamples:
        """The rows at these places, in this order."""
        chosen = object.__new__(TensorExamples)
        chosen.__dict__.update(self.__dict__ | {"_places": self._places[places]})
        return chosen

    @property
    def lengths(self) -> NDArray[np.int64]:
        """1 for each row: a row of tensors fills a row of a batch."""
        return np.ones(len(self), dtype=np.int64)

    @property
    def num_trained(self) -> NDArray[np.int64]:
        """1 for each row: it has one target."""
        return self.lengths

    def _row(self, at: int) -> TensorExample:
        try:
            item = self._dataset[int(at)]  # pyright: ignore[reportIndexIssue] - a data set of torch has items
        except IndexError as error:
            raise DataError(
                f"the {self.name} says that it has {len(self._dataset)} items and has none at {at}",
                next_step="correct its __len__",
            ) from error
        inputs, target = self._parts(item, int(at))
        target = torch.as_tensor(target)
        if target.is_floating_point() or target.is_complex() or target.dim():
            raise DataError(
                f"row {at + 1} of the {self.name}: the target is {target.dtype} of shape {tuple(target.shape)}",
                allowed="one class number a row, from 0: torch.long",
                next_step="labels.long(), or labels.argmax(-1) of one-hot targets",
            )
        return TensorExample({name: torch.as_tensor(value) for name, value in inputs.items()}, target.long(), str(at))

    def _parts(self, item: Any, at: int) -> tuple[dict[str, Any], Any]:
        if isinstance(item, Mapping):
            target = next((name for name in TARGETS if name in item), None)
            if target is not None:
                return {str(name): value for name, value in item.items() if name != target}, item[target]
        elif isinstance(item, list | tuple) and 2 <= len(item) <= len(self._names) + 1:
            return dict(zip(self._names, item[:-1], strict=False)), item[-1]
        held = ", ".join(map(str, item)) if isinstance(item, Mapping) else f"a {type(item).__name__}"
        held = f"a {type(item).__name__} of {len(item)} values" if isinstance(item, list | tuple) else held
        raise DataError(
            f"row {at + 1} of the {self.name} holds {held}",
            allowed=f"({', '.join(self._names[:1])}, target) with up to {len(self._names)} inputs "
            f"({', '.join(self._names)}), or a mapping with {' or '.join(TARGETS)}",
        )

    def _described(self) -> str:
        first = self._row(0)
        shapes = [f"{name} {tuple(value.shape)} {str(value.dtype)[6:]}" for name, value in first.inputs.items()]
        return f"{self.name}: {len(self):,} rows of {', '.join(shapes)}, each with a class number"


def stack(
    rows: Sequence[Sequence[TensorExample]], *, slots: Sequence[int], streams: Sequence[int] | None = None
) -> Batch:
    """The tensors of some rows, rows first; `labels` (rows,) int64.

    Raises:
        DataError: rows of other shapes than their neighbours'.
    """
    examples = [example for row in rows for example in row]
    try:
        inputs = {name: torch.stack([one.inputs[name] for one in examples]) for name in examples[0].inputs}
    except (RuntimeError, KeyError) as error:
        shapes = {name: sorted({tuple(one.inputs[name].shape) for one in examples if name in one.inputs})
                  for name in examples[0].inputs}  # fmt: skip
        raise DataError(
            f"rows of one batch have other shapes or inputs: {shapes}", next_step="give every row the same shapes"
        ) from error
    labels = torch.stack([one.target for one in examples])
    return Batch(
        inputs=inputs,
        targets={"labels": labels},
        slots=tuple(slots),
        streams=None if streams is None else tuple(streams),
        costs=(1,) * len(examples),
        num_trained=tuple(labels.ge(0).long().tolist()),
    )
