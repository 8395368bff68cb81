"""What DoRA's further passes over the outputs cost: its step against LoRA's, here and in PEFT.

    python bench/dora.py

Rank 16 on every linear site of a random Llama of 135 M parameters, 4 rows of 512 tokens, AdamW. First, in float32 on a
small base, loss and the gradient of every factor, the magnitudes' too, must be those of PEFT's DoRA; then, in bfloat16,
the loss of every step that is timed. manylora's two, PEFT's two, and manylora's two with dropout 0.1 take turns, each a
process of its own. `floor` is the least that DoRA's passes over outputs can take: one multiplication of each output in
the forward, one of each gradient and one product with its sum over rows in the backward, on tensors of the same sizes,
in the seconds of a LoRA step. Writes bench/results/dora.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_step import ROW_TOKENS, TOLERANCE, Job, arguments, finish, same_gradients
from workers import memory, ours, peers, take_turns

BOUNDS = {"dora_over_lora": 1.15}
WIDTHS = (576, 192, 192, 576, 1536, 1536, 576)
"""Outputs of the adapted sites of a layer."""
DROPOUT = 0.1


def main() -> None:
    asked = arguments().parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = same_gradients(Path(place) / "small", asked.rows, method="dora")
        figures |= in_turns(Path(place), asked)
    figures["floor"] = 1 + passes(asked) / figures["seconds"]["lora"]
    finish("dora", figures, BOUNDS, asked)


def in_turns(place: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a step of each, and their ratios by round."""
    sizes = {"layers": asked.layers, "vocabulary": asked.vocabulary, "rows": asked.rows, "steps": asked.rounds + 2}
    jobs = {
        method: Job(place / method, dtype="bfloat16", threads=asked.threads, method=method, **sizes)
        for method in ("lora", "dora")
    }
    with ExitStack() as stack:
        workers = {}
        for name, job in jobs.items():
            for ending, dropout in (("", 0.0), (" with dropout", DROPOUT)):
                config = {**job.config, "adapter": {**job.config["adapter"], "dropout": dropout},
                          "output": str(job.place / f"run{ending}")}  # fmt: skip
                config["train"] = {**config["train"], "compile": "off", "checkpointing": "none"}
                workers[name + ending] = stack.enter_context(ours("run", {"config": config}, asked.threads))
            workers[f"peft {name}"] = stack.enter_context(peers("plain", job.peers, asked.threads))
        warm = take_turns(workers, 1, 1)
        answers = take_turns(workers, asked.rounds, 1)
    losses = {
        name: [*worker.opened["losses"], *(loss for one in warm[name] + answers[name] for loss in one["losses"])]
        for name, worker in workers.items()
    }
    for name in jobs:
        pairs = zip(losses[name], losses[f"peft {name}"], strict=True)
        off = max(abs(mine - want) / want for mine, want in pairs)
        if not off <= TOLERANCE["bfloat16"]:
            raise SystemExit(f"the losses of {name} differ from PEFT's by up to {off:.1e}: {losses}")
    seconds = {name: [one["seconds"] for one in found] for name, found in answers.items()}
    peaks = memory(answers, "lora")["peak_bytes"]

    def ratio(over: str, under: str) -> float:
        return statistics.median(one / two for one, two in zip(seconds[over], seconds[under], strict=True))

    def busy(name: str) -> float:
        return sum(one["cpu_seconds"] for one in answers[name])

    pairs = {"dora_over_lora": ("dora", "lora"), "peft_dora_over_lora": ("peft dora", "peft lora"),
             "with_dropout_over_lora": ("dora with dropout", "lora with dropout"),
             "peft_dora_over_ours": ("peft dora", "dora")}  # fmt: skip
    return {
        "tokens_a_step": asked.rows * ROW_TOKENS,
        "seconds": {name: round(statistics.median(taken), 4) for name, taken in seconds.items()},
        **{name: ratio(*pair) for name, pair in pairs.items()},
        "processor": {name: busy(over) / busy(under) for name, (over, under) in pairs.items()},
        "peak_bytes": peaks,
        "memory": {name: peaks[over] / peaks[under] for name, (over, under) in pairs.items()},
        "losses": {name: [round(loss, 4) for loss in found] for name, found in losses.items()},
        "rounds": {name: [round(one, 3) for one in taken] for name, taken in seconds.items()},
    }


def passes(asked: argparse.Namespace) -> float:
    """Seconds of the passes over outputs of a step, each on a tensor of its own, as a step finds them."""
    import torch

    torch.set_num_threads(asked.threads)
    shapes = [(asked.rows * ROW_TOKENS, width) for _ in range(asked.layers) for width in WIDTHS]
    outputs = [torch.randn(shape).bfloat16() for shape in shapes]
    above = [torch.randn(shape).bfloat16() for shape in shapes]
    gains = [torch.rand(shape[1]).bfloat16() for shape in shapes]
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        for y, grad, gain in zip(outputs, above, gains, strict=True):
            torch.addcmul(y, y, gain, out=y)
            (grad * y).sum(0)
            torch.addcmul(grad, grad, gain, out=grad)
        taken.append(time.perf_counter() - began)
    return min(taken)


if __name__ == "__main__":
    main()
