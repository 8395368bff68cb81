"""How many examples a test draws: few by default, all of them in `make test-all`."""

from __future__ import annotations

import os

FEW = 50


def examples(most: int) -> int:
    """What `hypothesis.settings(max_examples=...)` is to be for a test that draws `most` where all are drawn."""
    return most if os.environ.get("MANYLORA_HYPOTHESIS") == "all" else min(most, FEW)
