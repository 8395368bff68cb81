"""A task of a stranger's own: numbers that a small encoder reads off a text, by a head that its checkpoint lacks.

A configuration names it `task: measure_task:MEASURE`. Rows are {"text": ..., NAME: number, ...}; every other column is
one of the numbers. Nothing of manylora knows of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manylora.adapters.route import route_rows
from manylora.base.headless import load_headless
from manylora.data.packing import row_width
from manylora.errors import DataError
from manylora.objectives.objective import ALONE, Stateless
from manylora.tasks.data import RunData, held_out_places
from manylora.tasks.task import Answer, Scored
from manylora.types import Batch, RowTotals


@dataclass(frozen=True, eq=False)
class Measured:
    """One text and its numbers."""

    tokens: list[int]
    numbers: tuple[float, ...]
    text: str
    group: str
    prompt_length: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def batch(rows, base, *, width: int, slots, streams=None) -> Batch:
        examples = [row[0] for row in rows]
        size = row_width(max(map(len, examples)), width)
        tokens = torch.full((len(rows), size), base.tokenizer.pad_token_id or 0)
        for row, example in enumerate(examples):
            tokens[row, : len(example)] = torch.tensor(example.tokens)
        lengths = torch.tensor([len(example) for example in examples])
        return Batch(
            inputs={"input_ids": tokens, "attention_mask": (torch.arange(size) < lengths[:, None]).long()},
            targets={"numbers": torch.tensor([example.numbers for example in examples])},
            slots=tuple(slots), streams=None if streams is None else tuple(streams),
            costs=(size,) * len(rows), num_trained=(1,) * len(rows),
        )  # fmt: skip


class Measurements(Sequence):
    """The texts of a file; `names` are those of their numbers."""

    def __init__(self, items: Sequence[Measured], names: Sequence[str]):
        self.items, self.names = list(items), tuple(names)
        self.lengths = np.array([len(item) for item in self.items], dtype=np.int64)
        self.num_trained = np.ones(len(self.items), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place):
        return self.take(range(len(self))[place]) if isinstance(place, slice) else self.items[place]

    def take(self, places) -> Measurements:
        return Measurements([self.items[place] for place in places], self.names)


class Squares(Stateless):
    """The mean square of what is missed, over a row's numbers; `missed` is the mean of its size. Weight: rows."""

    supervises = frozenset({"rows"})

    def weight(self, batch: Batch) -> torch.Tensor:
        return torch.ones(batch.num_rows, dtype=torch.float64)

    def __call__(self, outputs, batch: Batch, beside=ALONE) -> RowTotals:
        off = outputs.whole_rows() - batch.targets["numbers"].to(outputs.whole_rows())
        return RowTotals(off.square().mean(1), {"missed": off.abs().mean(1)})


class Measure:
    """`r2`: the share of the numbers' variance that is told, over all of them."""

    name = "measure"
    auto = "AutoModelForSequenceClassification"
    objective = "measure_task:SQUARES"

    def find(self, config, objects) -> tuple[list[Path], list[Path]]:
        sides = (config.data.train, held_out_places(config))
        train, held_out = ([Path(place.path) for place in places] for places in sides)
        for path in (*train, *held_out):
            if not path.is_file():
                raise DataError(f"no file at {str(path)!r}")
        return train, held_out

    def open(self, config, objects):
        return load_headless(config.base, auto=self.auto, dtype=config.dtype, device=config.device)

    def row_tokens(self, config, base) -> tuple[int, list[str]]:
        return config.train.row_tokens, []

    def read(self, config, base, found, objects, *, use_cache: bool) -> RunData:
        train, held_out = (self._read(paths, base, config) for paths in found)
        return RunData(train, held_out or (), [(len(train), 1.0)], [], {"train": [{"rows": len(train)}]})

    def _read(self, paths, base, config) -> Measurements | None:
        if not paths:
            return None
        rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        names = [name for name in rows[0] if name != "text"]
        items = []
        for row in rows:
            tokens = base.tokenizer(row["text"]).input_ids[: config.train.row_tokens]
            items.append(Measured(tokens, tuple(float(row[name]) for name in names), row["text"], row["text"]))
        return Measurements(items, names)

    def outputs(self, data: RunData) -> int:
        return len(data.train.names)

    def score(self, base, examples, config, *, slot: int) -> Scored:
        given = predicted(base, examples, slot=slot, width=config.train.row_tokens)
        wanted = torch.tensor([one.numbers for one in examples])
        r2 = 1 - ((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()).item()
        asked = [{"text": one.text, "numbers": list(one.numbers)} for one in examples]
        answers = [Answer(fields, row.tolist()) for fields, row in zip(asked, given, strict=True)]
        return Scored({"r2": r2}, {"r2": "of all numbers together"}, answers)

    def record(self, config, base) -> Mapping[str, Any]:
        return {"unit": "as in the file"}


@torch.no_grad()
def predicted(base, examples, *, slot: int, width: int) -> torch.Tensor:
    batch = Measured.batch([[one] for one in examples], base, width=width, slots=[slot] * len(examples))
    with route_rows(base, batch.slots):
        return base.outputs(batch).whole_rows()


SQUARES = Squares()
MEASURE = Measure()
