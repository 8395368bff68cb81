"""How near a LoRA step comes to what this machine's products can do.

    python bench/roofline.py

The products of every kind of linear site, forward and backward, at the sizes of the step (a Llama of 135 M parameters
in bfloat16, 4 rows of 512 tokens), each first held to float64, then timed before and after the steps of a `manylora
train` that stops between them. Two shares: of the step's floating-point operations at the rate of the fastest product,
and of the time that its own products alone would take, each at its own rate (the rest is attention, norms, the update's
thin products, the optimiser). Writes bench/results/roofline.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lora_step import FULL, RANK, ROW_TOKENS, Job
from results import write_result
from workers import ours

WIDTH, INNER, KEYS, HEADS, HEAD_WIDTH = 576, 1536, 192, 9, 64
SITES = {
    "q_proj": (WIDTH, WIDTH), "k_proj": (KEYS, WIDTH), "v_proj": (KEYS, WIDTH), "o_proj": (WIDTH, WIDTH),
    "gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER),
}  # fmt: skip
"""(out, in) of the linear sites of a layer."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=FULL[0])
    parser.add_argument("--vocabulary", type=int, default=FULL[1])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tokens = asked.rows * ROW_TOKENS
    shapes = sorted({*SITES.values(), (asked.vocabulary, WIDTH)})
    before = {shape: product_seconds(tokens, *shape) for shape in shapes}
    seconds = step_seconds(asked)
    after = {shape: product_seconds(tokens, *shape) for shape in shapes}
    best = {shape: min(before[shape], after[shape]) for shape in shapes}
    rates = {f"{out} x {into}": 4 * tokens * out * into / best[out, into] for out, into in shapes}
    products = sum(best[shape] for shape in SITES.values()) * asked.layers + best[asked.vocabulary, WIDTH]
    counted = operations(tokens, asked.layers, asked.vocabulary)
    figures = {
        "layers": asked.layers, "vocabulary": asked.vocabulary, "threads": asked.threads, "tokens_a_step": tokens,
        "gflops_by_shape": {name: round(rate / 1e9, 1) for name, rate in rates.items()},
        "operations": counted,
        "step_seconds": [round(value, 3) for value in seconds],
        "product_seconds": products,
        "share_of_best_rate": sum(counted.values()) / min(seconds) / max(rates.values()),
        "share_in_products": products / min(seconds),
    }  # fmt: skip
    if (asked.layers, asked.vocabulary) == FULL:
        write_result("roofline", figures)
    else:
        print(json.dumps(figures, indent=1))


def operations(tokens: int, layers: int, vocabulary: int) -> dict[str, float]:
    """Floating-point operations of a step: base products forward and for the input's gradient, factors, attention."""
    sizes = sum(out * into for out, into in SITES.values())
    edges = sum(out + into for out, into in SITES.values())
    # A position sees half of its row on average; two products forward and four backward (and none computed anew).
    attention = 6 * 2 * tokens * (ROW_TOKENS + 1) / 2 * HEADS * HEAD_WIDTH
    return {
        "base": 4.0 * tokens * sizes * layers,
        "head": 4.0 * tokens * vocabulary * WIDTH,
        "factors": 6.0 * tokens * RANK * edges * layers,  # thrice: forward, input's gradient, factor's gradient
        "attention": attention * layers,
    }


def product_seconds(tokens: int, out: int, into: int) -> float:
    """The least time of a product with a weight and of the one for its input's gradient."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, into, generator=draw).bfloat16()
    weight = torch.randn(out, into, generator=draw).div(into**0.5).bfloat16()
    y = x @ weight.t()
    want = x[:8].double() @ weight.t().double()
    if not float((y[:8].double() - want).norm() / want.norm()) < 5e-3:
        raise SystemExit(f"the product of {out} x {into} is wrong")
    found = []
    for _ in range(12):
        begun = time.perf_counter()
        torch.mm(torch.mm(x, weight.t()), weight)
        found.append(time.perf_counter() - begun)
    return min(found[2:])


def step_seconds(asked: argparse.Namespace) -> list[float]:
    """Seconds of the steps of a run, whose losses must be finite."""
    with tempfile.TemporaryDirectory() as place:
        job = Job(Path(place) / "base", layers=asked.layers, vocabulary=asked.vocabulary, dtype="bfloat16",
                  rows=asked.rows, steps=4, threads=asked.threads, alone=True)  # fmt: skip
        with ours("run", {"config": job.config}, asked.threads) as worker:
            worker.steps(1)
            answers = [worker.steps(1) for _ in range(asked.rounds)]
    losses = [one["losses"][0] for one in answers]
    if not all(0.0 < loss < 100.0 for loss in losses):
        raise SystemExit(f"losses {losses}")
    found: list[Any] = [one["seconds"] for one in answers]
    return found


if __name__ == "__main__":
    main()
