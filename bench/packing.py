"""Rows packed without padding against padded ones: the same gradients, and how many learned tokens a second.

    python bench/packing.py

The rows are the bundled E2E ones at their real lengths, the base is the builtin one with an adapter of rank 16 on every
linear site. The same examples are taken packed into rows of 512 tokens, one a row in the order in which they are drawn,
and one a row with like lengths together. First, in float64, all three must give the same loss and the same gradient of
every factor. Then forward and backward over all of them take turns, in bfloat16. Writes bench/results/packing.json, and
ends with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
from results import ROOT, write_result

ROW_TOKENS, RANK = 512, 16
EXAMPLES = 256
STEP_TOKENS = 2048
BOUNDS = {"times_padded": 1.2, "times_sorted": 1.0}
"""The least, over one example a row: as drawn, and with like lengths together."""
TOLERANCE = 1e-9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from manylora.memory.allocator import freed_memory_kept

    figures: dict[str, Any] = {"threads": asked.threads, "examples": asked.examples, "row_tokens": ROW_TOKENS}
    with freed_memory_kept():
        figures |= differences(min(asked.examples, 32))
        figures |= speeds(asked.examples, asked.rounds)
    figures["bounds"] = BOUNDS
    if asked.examples == EXAMPLES:
        write_result("packing", figures)
    else:
        print(json.dumps(figures, indent=1))
        return
    broken = [name for name, least in BOUNDS.items() if figures[name] < least]
    if broken:
        raise SystemExit(f"bounds that are not kept: {', '.join(broken)}")


class Job:
    """The examples on one base, laid out in the three ways."""

    def __init__(self, dtype: str, count: int):
        from manylora.adapters.adapter import Adapter
        from manylora.adapters.bank import Bank
        from manylora.base.load import load_base
        from manylora.data.collate import batch_of
        from manylora.data.examples import Reading, encode
        from manylora.data.packing import pack
        from manylora.data.readers import read_rows
        from manylora.spec import AdapterSpec

        self.base = load_base("builtin:tiny-en", dtype=dtype, device="cpu")
        rows = read_rows([ROOT / "src" / "manylora" / "data" / "demo" / "e2e" / "train.jsonl"])
        found = encode(rows, self.base.tokenizer, Reading(max_length=ROW_TOKENS), eos_id=self.base.eos_ids).examples
        drawn = [found[int(place)] for place in np.random.default_rng(0).permutation(len(found))[:count]]
        self.targets = sum(one.num_trained for one in drawn)
        self.lengths = [len(one) for one in drawn]
        ordered = sorted(drawn, key=len)
        packed = [[drawn[place] for place in row] for row in pack(self.lengths, ROW_TOKENS)]
        size = max(1, STEP_TOKENS // int(np.mean(self.lengths)))
        layouts = {"packed": (packed, STEP_TOKENS // ROW_TOKENS), "padded": ([[one] for one in drawn], size),
                   "sorted": ([[one] for one in ordered], size)}  # fmt: skip
        self.batches = {
            name: [
                batch_of(rows[start : start + step], self.base, width=ROW_TOKENS,
                         slots=[0] * len(rows[start : start + step]))
                for start in range(0, len(rows), step)
            ]
            for name, (rows, step) in layouts.items()
        }  # fmt: skip
        self.bank = Bank(self.base, num_slots=1, dtype=torch.float64 if dtype == "float64" else torch.float32)
        self.bank.put(Adapter.new(self.base, AdapterSpec(rank=RANK, alpha=2.0 * RANK), seed=1), slot=0)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # a b of zeros would leave half of the gradients zero
            for stack in self.bank.stacks.values():
                b = stack.tensors["b"]
                b.copy_(0.02 * torch.randn(b.shape, generator=generator, dtype=b.dtype))

    def learn(self, layout: str) -> float:
        """The loss of all examples; their gradients are added to the factors."""
        from manylora.objectives import OBJECTIVES
        from manylora.objectives.forward import Aim
        from manylora.training.step import backward

        aim = Aim.fresh(OBJECTIVES.get("causal-lm"))
        return backward(self.base, {0: aim}, self.batches[layout]).loss(0)

    def gradients(self, layout: str) -> tuple[float, list[torch.Tensor]]:
        """The loss, and the gradient of every factor."""
        from manylora.training.optim.stacked import drop_gradients

        loss = self.learn(layout)
        tensors = [tensor for stack in self.bank.stacks.values() for tensor in stack.tensors.values()]
        found = [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
        drop_gradients(self.bank)
        if len(found) != len(tensors):
            raise SystemExit("a factor has no gradient, so nothing is shown")
        return loss, found


def differences(count: int) -> dict[str, Any]:
    """The largest relative differences of packed from padded in float64; ends where they are more than rounding."""
    job = Job("float64", count)
    loss, own = job.gradients("packed")
    worst: dict[str, float] = {}
    for name in ("padded", "sorted"):
        other, theirs = job.gradients(name)
        off = max(float((a - b).norm() / b.norm()) for a, b in zip(own, theirs, strict=True))
        worst[name] = max(off, abs(loss - other) / other)
    if not max(worst.values()) <= TOLERANCE:
        raise SystemExit(f"packed rows do not learn what padded ones learn: {worst}")
    return {"largest_difference": max(worst.values())}


def speeds(count: int, rounds: int) -> dict[str, Any]:
    """Learned tokens a second of each layout, in turns."""
    from manylora.training.optim.stacked import drop_gradients

    job = Job("bfloat16", count)
    times: dict[str, list[float]] = {name: [] for name in job.batches}
    for turn in range(rounds + 1):  # the first warms up
        for name, seconds in times.items():
            begun = time.perf_counter()
            job.learn(name)
            if turn:
                seconds.append(time.perf_counter() - begun)
            drop_gradients(job.bank)
    computed = {
        name: sum(batch.targets["labels"].numel() for batch in batches) for name, batches in job.batches.items()
    }
    ratios = {
        name: [other / own for own, other in zip(times["packed"], times[name], strict=True)]
        for name in ("padded", "sorted")
    }
    return {
        "lengths": {"least": min(job.lengths), "mean": float(np.mean(job.lengths)), "most": max(job.lengths)},
        "filled": {name: sum(job.lengths) / tokens for name, tokens in computed.items()},
        "targets_per_second": {name: job.targets / statistics.median(found) for name, found in times.items()},
        "seconds": {name: [round(value, 3) for value in found] for name, found in times.items()},
        "times_padded": statistics.median(ratios["padded"]),
        "times_sorted": statistics.median(ratios["sorted"]),
    }


if __name__ == "__main__":
    main()
