"""What memory refused: how such an error is known, and how what it left behind is freed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from manylora.errors import OutOfMemory
from manylora.memory.allocator import give_back_freed

Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    # torch's CPU allocator raises a plain RuntimeError; the accelerators' a RuntimeError of their own kind.
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its class where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def give_back(device: torch.device) -> None:
    """Free what a failed forward has left behind, cycles of its graph among it."""
    gc.collect()
    give_back_freed()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def as_many_as_fit(run: Callable[[int], Result], most: int, device: torch.device) -> Result:
    """What `run(count)` gives: with `most`, and where memory refuses that, with half of it, and so on down to 1.

    `run` begins anew each time, so what it gives may not depend on the count but for rounding.

    Raises:
        OutOfMemory: memory does not hold even one.
    """
    count = most
    while True:
        try:
            return run(count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = first_line(error)
        # Only here: as long as the error is known, its frames hold all that the forward kept.
        give_back(device)
        if count == 1:
            raise OutOfMemory(
                f"the memory does not hold the forward of one row: {failure}",
                next_step="lower train.row_tokens, or store the base in fewer bits (quantize: nf4)",
            )
        count = (count + 1) // 2
