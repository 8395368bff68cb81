"""What the loss behind a frozen head costs: our tiles against all logits at once, recomputed chunks, and torch's own.

    OMP_WAIT_POLICY=PASSIVE python bench/loss.py

Training asks for the nats of each supervised position and for their gradient with respect to the hidden states. `ours`
is the call that training makes. `naive` is `cross_entropy(linear(h, W).float(), y)`. `recomputed` computes chunks of
logits in the forward and again in the backward, under torch's checkpoint. `torch` is `linear_cross_entropy` in chunks,
as its options come. First each is compared with autograd in float64. Then they take turns, forward and backward. The
memory is the peak of a fresh process over what it holds before, so input and weight are not in it; `share` is that over
the bytes of all logits in float32. Writes bench/results/loss.json, and ends with an error where a bound is not kept.

Threads that spin at a barrier take the core from the one that they wait for, where anything else runs on the machine,
and many short products then cost more than few long ones: so they are told to sleep, for all that is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import ROOT, write_result
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Vocabulary, width, positions, dtype: the builtin base, SmolLM2, Llama 3.2.
CASES = {
    "small": (4096, 256, 1024, "float32"),
    "middle": (49152, 576, 2048, "bfloat16"),
    "middle, float32": (49152, 576, 2048, "float32"),
    "middle, 4096 positions": (49152, 576, 4096, "bfloat16"),
    "large": (128256, 2048, 2048, "bfloat16"),
}
BOUNDS = {"share": 0.05, "times_naive": 1.1}
"""The most, where the vocabulary is not small: there all logits are a few MB, and a tile is no small part of them."""
CHECKED = (4099, 96, 700)
"""Vocabulary, width and positions of the check: neither fits a tile."""
RECOMPUTED_LOGITS = 1 << 22

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "WAY"), help="print the peak memory of a loss and end")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.peak:
        print(peak_of(*asked.peak))
        return
    wait = os.environ.get("OMP_WAIT_POLICY", "as it comes")
    figures: dict[str, Any] = {"threads": asked.threads, "wait": wait, "bounds": BOUNDS, "errors": errors()}
    for name in asked.cases:
        peaks, seconds = memory(name, asked.threads), speeds(name, asked.rounds)
        sizes = dict(zip(("vocabulary", "width", "positions", "dtype"), CASES[name], strict=True))
        figures[name] = sizes | {way: peaks[way] | seconds[way] for way in WAYS}
        print(name, json.dumps(figures[name]), file=sys.stderr)
    if asked.cases == list(CASES):
        write_result("loss", figures)
    else:
        print(json.dumps(figures, indent=1))
    broken = [
        f"{name}: {bound} {figures[name]['ours'][bound]:.3f}"
        for name in asked.cases for bound, most in BOUNDS.items()
        if figures[name]["ours"][bound] > most and name != "small"
    ]  # fmt: skip
    if broken:
        raise SystemExit(f"bounds that are not kept: {', '.join(broken)}")


# -- the ways ----------------------------------------------------------------------------------------------------------


def naive(weight: Tensor) -> Loss:
    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(_wide(functional.linear(hidden, weight)), labels, reduction="sum")

    return loss


def recomputed(weight: Tensor) -> Loss:
    size = max(1, RECOMPUTED_LOGITS // len(weight))
    part = naive(weight)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for states, wanted in zip(hidden.split(size), labels.split(size), strict=True):
            total = total + checkpoint(part, states, wanted, use_reentrant=False, preserve_rng_state=False)
        return total

    return loss


def torchs_own(weight: Tensor) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, labels: functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", options=options
    )


def ours(weight: Tensor) -> Loss:
    """Through the outputs of a base whose head is the weight, in 16 rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from manylora.base.language import LanguageBase, LanguageOutputs
    from manylora.ops.positions import nats
    from manylora.types import Batch

    vocabulary, width = weight.shape
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=1, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a buffer that to_empty leaves undefined
    model.to(weight.dtype)
    model.model.embed_tokens.weight = model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    base = LanguageBase(model).probed()
    if base.post_head != "none":
        raise SystemExit(f"the probe takes this head for {base.post_head!r}, so not what is to be measured")

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        rows = next(count for count in (16, 10, 1) if len(hidden) % count == 0)
        batch = Batch(inputs={}, targets={}, slots=(-1,) * rows)
        outputs = LanguageOutputs(base, hidden.view(rows, -1, width), batch)
        return outputs.map_supervised(labels.view(rows, -1), nats)["nats"].sum()

    return loss


WAYS: dict[str, Callable[[Tensor], Loss]] = {
    "naive": naive, "ours": ours, "recomputed": recomputed, "torch": torchs_own
}  # fmt: skip


def drawn(vocabulary: int, width: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, states that give logits of about unit size, and labels."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.empty(vocabulary, width, dtype=dtype).normal_(std=1.5 / width**0.5, generator=draw)
    hidden = torch.randn(count, width, generator=draw).to(dtype)
    return weight, hidden, torch.randint(0, vocabulary, (count,), generator=draw)


def step(loss: Loss, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    hidden = hidden.detach().requires_grad_()
    total = loss(hidden, labels)
    total.backward()
    assert hidden.grad is not None
    return total.detach(), hidden.grad


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


# -- figures -----------------------------------------------------------------------------------------------------------


def errors() -> dict[str, Any]:
    """Relative errors of loss and gradient against float64; ends where ours is not exact, or further off than naive."""
    found: dict[str, Any] = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight, hidden, labels = drawn(*CHECKED, dtype)
        exact = step(naive(weight.double()), hidden.double(), labels)
        name = str(dtype).removeprefix("torch.")
        found[name] = {
            way: [float((got.double() - want).norm() / want.norm()) for got, want in
                  zip(step(make(weight), hidden, labels), exact, strict=True)]
            for way, make in WAYS.items()
        }  # fmt: skip
    if max(found["float64"]["ours"]) > 1e-12:
        raise SystemExit(f"errors of ours in float64: {found['float64']['ours']}")
    for name in ("float32", "bfloat16"):
        if any(got > 1.5 * want + 3e-7 for got, want in zip(found[name]["ours"], found[name]["naive"], strict=True)):
            raise SystemExit(f"errors of ours in {name}: {found[name]['ours']}, of naive {found[name]['naive']}")
    return found


def speeds(case: str, rounds: int) -> dict[str, Any]:
    """Seconds of each way in turn, the median over rounds of its ratios to naive and to torch's; the first warms up."""
    vocabulary, width, count, dtype = CASES[case]
    weight, hidden, labels = drawn(vocabulary, width, count, getattr(torch, dtype))
    losses = {name: make(weight) for name, make in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            gc.collect()
            begin = time.perf_counter()
            step(loss, hidden, labels)
            if turn:
                times[name].append(time.perf_counter() - begin)
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        found[name] = {"seconds": [round(value, 4) for value in seconds]}
        for other in ("naive", "torch"):
            ratios = [mine / theirs for mine, theirs in zip(seconds, times[other], strict=True)]
            found[name][f"times_{other}"] = statistics.median(ratios)
    return found


def memory(case: str, threads: int) -> dict[str, dict[str, float]]:
    """The peak of each way in a process of its own, and its share of the bytes of all logits in float32."""
    vocabulary, _, count, _ = CASES[case]
    found = {}
    for way in WAYS:
        told = subprocess.run(
            [sys.executable, __file__, "--threads", str(threads), "--peak", case, way],
            check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        peak = int(told.stdout.splitlines()[-1])
        found[way] = {"peak_bytes": peak, "share": peak / (4 * vocabulary * count)}
    return found


def peak_of(case: str, way: str) -> int:
    """The peak of this process over its memory before the step."""
    vocabulary, width, count, dtype = CASES[case]
    weight, hidden, labels = drawn(vocabulary, width, count, getattr(torch, dtype))
    loss = WAYS[way](weight)
    step(loss, hidden[:16], labels[:16])  # whatever is imported or allocated once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(loss, hidden, labels)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
