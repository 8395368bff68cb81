"""What checkpointing keeps and costs: a LoRA step whose layers keep all, all but what is cheap, or only their inputs.

    python bench/checkpointing.py

First, on a small base in float64, losses and gradients must be those without checkpointing to the last bit, with
dropout, two ranks, packed rows and rows of the bare base. Then, on a random Llama-shaped base of 135 M parameters in
bfloat16, the modes take turns at the forward and backward of a step: rows of 512 tokens, rank 16 on all linear sites. A
ratio is the median over rounds of a mode to none within a round; that of processor time says what neighbours on the
machine cannot change. Kept are the bytes that a forward leaves for its
backward, peak the growth of the process over what it held before the step. Writes bench/results/checkpointing.json, and
ends with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qlora_step import write_base
from results import write_result
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.load import load_base
from manylora.data.collate import batch_of
from manylora.data.example import Example
from manylora.memory.allocator import freed_memory_kept, give_back_freed
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.objectives.forward import Aim
from manylora.spec import AdapterSpec
from manylora.training.checkpointing import MODES, Checkpointing, checkpointed
from manylora.training.footprint import saved_bytes
from manylora.training.step import backward
from manylora.types import Batch

BOUNDS = {"selective": (1.2, 0.8), "full": (1.6, 0.2)}
"""Of each mode, the most that its time and its kept bytes may be, over those of none."""
LENGTH = 100
"""Tokens of a sequence, about; several share a row."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, help="a folder to take the base from, else a random one is written")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    figures: dict[str, Any] = {"rows": asked.rows, "tokens": asked.tokens, "threads": asked.threads}
    with tempfile.TemporaryDirectory() as place:
        figures["farthest gradient in float64"] = farthest(write_base(Path(place) / "small", 4, 512))
        if figures["farthest gradient in float64"] != 0.0:
            sys.exit(f"wrong: {figures}")
        folder = asked.base or write_base(Path(place) / "base", asked.layers, asked.vocabulary)
        figures |= measured(folder, asked.rows, asked.tokens, asked.rounds)
    write_result("checkpointing", figures)
    missed = [
        f"{mode}: {figures[mode]['time_ratio']:.2f} times as long, {figures[mode]['kept_ratio']:.2f} kept"
        for mode, (longest, most) in BOUNDS.items()
        if figures[mode]["processor_time_ratio"] > longest or figures[mode]["kept_ratio"] > most
    ]
    if missed:
        sys.exit(f"beyond the bound: {'; '.join(missed)}")


def rows_of(count: int, tokens: int, vocabulary: int) -> list[list[Example]]:
    """Packed rows, all of them full."""
    draw = np.random.default_rng(0)
    rows: list[list[Example]] = []
    for _ in range(count):
        row, left = [], tokens
        while left:
            size = min(left, int(LENGTH * draw.uniform(0.6, 1.4)))
            size = left if left - size < 2 else size
            row.append(Example(draw.integers(0, vocabulary, size).astype(np.int32), np.arange(size) > 0, 1, "", "", "",
                               "made", 1))  # fmt: skip
            left -= size
        rows.append(row)
    return rows


def batch_for(base: Any, slots: Sequence[int], tokens: int) -> Batch:
    rows = rows_of(len(slots), tokens, base.vocabulary)
    return batch_of(rows, base, width=tokens, slots=slots, streams=range(len(slots)))


def gradients(base: Any, batch: Batch) -> list[Tensor]:
    """Losses, then the gradient of every factor; none is left behind."""
    losses = backward(base, {slot: Aim.fresh(CAUSAL_LM) for slot in batch.slots}, [batch]).losses()
    found = [torch.tensor([losses[slot] for slot in sorted(losses)])]
    for stack in base.bank.stacks.values():
        for tensor in stack.tensors.values():
            if tensor.grad is not None:
                found.append(tensor.grad)
            tensor.grad = None
    return found


def farthest(folder: Path) -> float:
    """The largest difference of a loss or gradient from that without checkpointing, in float64."""
    base = load_base(str(folder), dtype="float64")
    with Bank(base, num_slots=2, dtype=torch.float64) as bank, checkpointed(base) as layers:
        draw = torch.Generator().manual_seed(0)
        for slot, rank in enumerate((4, 16)):
            bank.put(Adapter.new(base, AdapterSpec(rank=rank, dropout=0.1), seed=slot), slot=slot)
        for stack in bank.stacks.values():
            stack.tensors["b"].data.normal_(std=0.01, generator=draw)
        batch = batch_for(base, (0, 1, -1, 1, 0), 64)
        found = {}
        for mode in MODES:
            layers.set(mode)
            found[mode] = gradients(base, batch)
        return max(
            float((own - plain).abs().max())
            for mode in MODES
            for own, plain in zip(found[mode], found["none"], strict=True)
        )


def measured(folder: Path, rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds, kept bytes and peak growth of each mode."""
    base = load_base(str(folder), dtype="bfloat16")
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    worked: dict[str, list[float]] = {mode: [] for mode in MODES}
    with Bank(base) as bank, checkpointed(base) as layers:
        bank.put(Adapter.new(base, AdapterSpec(rank=16, alpha=32.0), seed=0), slot=0)
        batch = batch_for(base, (0,) * rows, tokens)
        short = batch_for(base, (0,), 64)
        for mode in MODES:  # what is compiled and loaded at the first use
            layers.set(mode)
            gradients(base, short)
        peaks = {mode: peak_growth(base, batch, layers, mode) for mode in MODES}
        with freed_memory_kept():
            for turn in range(rounds):
                for mode in MODES[:: 1 if turn % 2 else -1]:
                    layers.set(mode)
                    start, begun = time.perf_counter(), time.process_time()
                    gradients(base, batch)
                    times[mode].append(time.perf_counter() - start)
                    worked[mode].append(time.process_time() - begun)
        held = {}
        for mode in MODES:
            layers.set(mode)
            held[mode] = kept(base, batch)
    return {
        mode: {
            "seconds": statistics.median(times[mode]),
            "time_ratio": ratio(times[mode], times["none"]),
            "processor_seconds": statistics.median(worked[mode]),
            "processor_time_ratio": ratio(worked[mode], worked["none"]),
            "kept_bytes": held[mode],
            "kept_ratio": held[mode] / held["none"],
            "peak_growth_bytes": peaks[mode],
        }
        for mode in MODES
    }


def ratio(own: Sequence[float], none: Sequence[float]) -> float:
    return statistics.median(one / plain for one, plain in zip(own, none, strict=True))


def kept(base: Any, batch: Batch) -> int:
    def forward() -> Tensor:
        with base.bank.route(batch.slots, batch.streams):
            return CAUSAL_LM(base.outputs(batch), batch).total

    return saved_bytes(base, forward)


def peak_growth(base: Any, batch: Batch, layers: Checkpointing, mode: Any) -> int | None:
    """By how much the process grows during a step; None where the system does not tell."""
    layers.set(mode)
    give_back_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark becomes what is held now
        before = _resident("VmRSS")
        gradients(base, batch)
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
