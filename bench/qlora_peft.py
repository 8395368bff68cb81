"""A QLoRA run's step against PEFT with bitsandbytes' 4-bit weights on the CPU, in a plain loop as its guide writes it.

    python bench/qlora_peft.py

As in lora_step.py, with the base packed as nf4 by each side from the same weights, the constants packed again (double
quantisation): loss and gradients agree in float32 on a small base only where both hold the same codes. Writes
bench/results/qlora_peft.json, and ends with an error where a bound is not kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lora_step import against_peft, arguments, finish, same_gradients

BOUNDS = {"times": 3.0, "memory_ratio": 1.0}
"""The least and the most."""


def main() -> None:
    asked = arguments().parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = same_gradients(Path(place) / "small", asked.rows, quantize="nf4")
        figures |= against_peft(Path(place) / "full", asked, quantize="nf4")
    finish("qlora_peft", figures, BOUNDS, asked)


if __name__ == "__main__":
    main()
