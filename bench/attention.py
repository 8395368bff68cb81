"""What attention inside the sequences of packed rows costs, forward and backward, against torch's own.

    python bench/attention.py

First the values and gradients of each case must be those of the plain reference: in float64 to rounding, in bfloat16
within a band of it. Then, in bfloat16, our op and what a transformers model does by itself take turns: its call of
torch's `scaled_dot_product_attention`, which is told `is_causal` where a row is one sequence and given a mask of tokens
x tokens, made beforehand, where it is packed. A ratio is the median over rounds of theirs to ours within a round.
Writes bench/results/attention.json, and ends with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from results import write_result
from torch import Tensor

from manylora.memory.allocator import freed_memory_kept
from manylora.ops.attention import attention, reference
from manylora.ops.attention_layout import Layout

BAND = 1e-2
"""How far the gradients may be from the reference's in bfloat16, as a share of their norm."""


@dataclass(frozen=True)
class Case:
    """Rows of sequences of about `length` tokens; `at_least`: how many times torch's speed is claimed."""

    rows: int
    tokens: int
    length: int
    heads: int
    shared: int
    width: int
    at_least: float

    @property
    def name(self) -> str:
        kind = "single" if self.length == self.tokens else f"sequences of about {self.length}"
        return f"{self.rows} x {self.tokens}, {self.heads}/{self.shared} heads x {self.width}, {kind}"

    def layout(self) -> Layout:
        """Lengths between 0.6 and 1.4 times `length`, the same at every call."""
        draw = torch.Generator().manual_seed(1)
        positions = torch.zeros(self.rows, self.tokens, dtype=torch.long)
        for row in positions:
            start = 0
            while start < self.tokens:
                size = int(self.length * (0.6 + 0.8 * float(torch.rand((), generator=draw))))
                size = min(self.tokens - start, self.tokens if self.length == self.tokens else size)
                row[start : start + size] = torch.arange(size)
                start += size
        return Layout.of_positions(positions, causal=True)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient, laid out as a model's projections leave them."""
        draw = torch.Generator().manual_seed(2)
        made = [
            torch.randn(self.rows, self.tokens, heads, self.width, generator=draw).bfloat16().to(dtype).transpose(1, 2)
            for heads in (self.heads, self.shared, self.shared, self.heads)
        ]
        return (*(part.requires_grad_() for part in made[:3]), made[3])  # pyright: ignore[reportReturnType]


CASES = (
    Case(4, 512, 40, 9, 3, 64, 3.5),
    Case(4, 512, 100, 9, 3, 64, 2.4),
    Case(4, 512, 200, 9, 3, 64, 2.0),
    Case(4, 512, 512, 9, 3, 64, 1.5),
    Case(1, 2048, 2048, 9, 3, 64, 1.1),
    Case(1, 4096, 4096, 9, 3, 64, 1.1),
    Case(1, 512, 100, 32, 8, 128, 3.0),
    Case(1, 512, 512, 32, 8, 128, 1.7),
    Case(8, 64, 20, 4, 2, 32, 0.8),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    # Each of our calls joins its threads, torch has two joins: on a machine with neighbours more threads measure these.
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    figures: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds}
    with freed_memory_kept():
        farthest = [errors(case) for case in CASES if case.tokens <= 512]
        figures["error in float64"] = max(exact for exact, _ in farthest)
        figures["error in bfloat16"] = max(rounded for _, rounded in farthest)
        if figures["error in float64"] > 1e-10 or figures["error in bfloat16"] > BAND:
            sys.exit(f"wrong: {figures}")
        figures["cases"] = {case.name: measured(case, asked.rounds) for case in CASES}
    write_result("attention", figures)
    slow = [case.name for case in CASES if figures["cases"][case.name]["times_torch"] < case.at_least]
    if slow:
        sys.exit(f"below the bound: {'; '.join(slow)}")


def errors(case: Case) -> tuple[float, float]:
    """The largest distance of a value or gradient from the reference's: in float64, and in bfloat16."""
    layout = case.layout()
    truth = results(lambda q, k, v: reference(q, k, v, layout), case.inputs(torch.float64))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        own = results(lambda q, k, v: attention(q, k, v, layout), case.inputs(dtype))
        found.append(max(float((a - b).norm() / b.norm()) for a, b in zip(own, truth, strict=True)))
    return found[0], found[1]


def results(form: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    *parts, grad = inputs
    out = form(*parts)
    return [part.double() for part in (out.detach(), *torch.autograd.grad(out, parts, grad))]


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds of a forward and backward, ours and torch's in turns, and the ratios."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layout = case.layout()
    *parts, grad = case.inputs(torch.bfloat16)
    module: Any = SimpleNamespace(num_key_value_groups=case.heads // case.shared, is_causal=True)
    mask = None if case.length == case.tokens else layout.mask()

    def ours() -> Tensor:
        return attention(*parts, layout)

    def theirs() -> Tensor:
        return sdpa_attention_forward(module, *parts, mask)[0].transpose(1, 2)

    times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours forward": [], "theirs forward": []}
    for turn in range(rounds + 2):
        for name, form in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            out = form()
            middle = time.perf_counter()
            torch.autograd.grad(out, parts, grad)
            if turn > 1:  # the first ones compile and allocate
                times[name].append(time.perf_counter() - start)
                times[f"{name} forward"].append(middle - start)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    forward = [theirs / ours for ours, theirs in zip(times["ours forward"], times["theirs forward"], strict=True)]
    return {
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "torch_ms": 1e3 * statistics.median(times["theirs"]),
        "times_torch": statistics.median(ratios),
        "times_torch_forward": statistics.median(forward),
    }


if __name__ == "__main__":
    main()
