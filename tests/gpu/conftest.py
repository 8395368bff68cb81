"""Examples for the device tests."""

from __future__ import annotations

import numpy as np
import pytest

from manylora.data.example import Example


@pytest.fixture
def ragged_examples() -> list[Example]:
    """Six random examples of different lengths."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(6):
        length, prompt = int(draw.integers(5, 20)), int(draw.integers(1, 4))
        made.append(
            Example(
                tokens=draw.integers(0, 97, length).astype(np.int32),
                trained=np.arange(length) >= prompt,
                prompt_length=prompt,
                prompt="",
                reference="",
                group=str(index),
                file="made",
                line=index,
            )
        )
    return made
