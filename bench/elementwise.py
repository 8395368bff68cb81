"""What RMS norm, rotary embedding and gated product cost, forward and backward, against transformers' own code.

    OMP_WAIT_POLICY=PASSIVE python bench/elementwise.py

First the values and gradients of each case must be those of the plain reference: in float64 to rounding, and in
bfloat16 no farther from it than transformers' own. Then, in bfloat16, the modules of a transformers model as they come
and the same modules switched to our ops take turns, on inputs that are not in the cache; a ratio is the median over
rounds of theirs to ours within a round. The bytes are those that a forward keeps for its backward, each storage once,
with the inputs that it keeps and without weights and cosines. Writes bench/results/elementwise.json, and ends with an
error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from results import write_result
from torch import Tensor

from manylora.memory.allocator import freed_memory_kept
from manylora.ops.elementwise import (
    gated,
    gated_halves,
    gated_reference,
    rotate,
    rotate_reference,
)
from manylora.ops.elementwise_norm import rms_norm, rms_norm_reference

COPIES = 8
"""Inputs of each case, used one after another, as layers are."""
EPS = 1e-5

Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """An op on tensors that want a gradient and on others; `times`: how many times transformers' speed is claimed."""

    name: str
    ours: Form
    theirs: Form
    reference: Form
    inputs: Callable[[int, torch.dtype], list[Tensor]]
    others: Callable[[torch.dtype], list[Tensor]]
    times: float
    bytes_ratio: float

    def drawn(self, seed: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Numbers that bfloat16 holds, in that dtype."""
        return [part.requires_grad_() for part in self.inputs(seed, dtype)], self.others(dtype)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    figures: dict[str, Any] = {"threads": asked.threads, "rounds": asked.rounds}
    with freed_memory_kept():
        chosen = cases()
        for case in chosen:
            figures[case.name] = {"errors": errors(case)}
        for case in chosen:
            figures[case.name] |= measured(case, asked.rounds) | kept(case)
    write_result("elementwise", figures)
    broken = [
        case.name for case in chosen
        if figures[case.name]["times_transformers"] < case.times
        or figures[case.name]["kept_ratio"] > case.bytes_ratio
    ]  # fmt: skip
    if broken:
        sys.exit(f"bounds that are not kept: {'; '.join(broken)}")


def cases() -> list[Case]:
    found = [
        *(norm_case(rows, width, "llama", 2.0, 0.51) for rows, width in ((2048, 576), (1024, 576), (512, 4096))),
        norm_case(4096, 128, "llama", 1.5, 0.51),
        norm_case(2048, 640, "gemma3", 1.3, 0.51),
    ]
    for rows, tokens, heads, width in ((4, 512, 12, 64), (16, 64, 12, 64), (1, 512, 40, 128)):
        found.append(rotation_case(rows, tokens, heads, width))
    return [*found, *(gated_case(rows, width) for rows, width in ((2048, 1536), (1024, 1536))), halves_case(1024, 1536)]


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def norm_case(rows: int, width: int, family: str, times: float, bytes_ratio: float) -> Case:
    add_one = family == "gemma3"
    if add_one:
        from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Norm
    else:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm

    module = Norm(width, eps=EPS)

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        result: Tensor = module(x)
        return result

    return Case(
        f"RMS norm of {rows} x {width}, {family}",
        lambda x, weight: rms_norm(x, weight, EPS, add_one=add_one),
        theirs,
        lambda x, weight: rms_norm_reference(x, weight, EPS, add_one=add_one),
        lambda seed, dtype: [normal(seed, dtype, rows, width)],
        lambda dtype: [(0.1 * normal(99, dtype, width) + (not add_one)).bfloat16().to(dtype)],
        times,
        bytes_ratio,
    )


def rotation_case(rows: int, tokens: int, heads: int, width: int) -> Case:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def others(dtype: torch.dtype) -> list[Tensor]:
        rates = 10000.0 ** (-torch.arange(0, width, 2) / width)
        angles = (torch.arange(tokens)[:, None] * rates).repeat(1, 2).expand(rows, tokens, width)
        return [angles.cos().bfloat16().to(dtype).unsqueeze(1), angles.sin().bfloat16().to(dtype).unsqueeze(1)]

    return Case(
        f"rotation of {rows} x {tokens}, {heads} heads x {width}",
        rotate,
        # Of the pair that it returns, the keys are those of no head.
        lambda x, cos, sin: apply_rotary_pos_emb(x, x[:, :0], cos.squeeze(1), sin.squeeze(1))[0],
        rotate_reference,
        lambda seed, dtype: [normal(seed, dtype, rows, tokens, heads, width).transpose(1, 2)],
        others,
        1.3,
        1.0,
    )


def gated_case(rows: int, width: int) -> Case:
    return Case(
        f"silu(gate) * up of {rows} x {width}",
        lambda gate, up: gated(gate, up, "silu"),
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        lambda gate, up: gated_reference(gate, up, "silu"),
        lambda seed, dtype: [normal(seed, dtype, rows, width), normal(seed + 50, dtype, rows, width)],
        lambda _: [],
        0.7,  # the activation is computed twice, so that it is not kept
        0.67,
    )


def halves_case(rows: int, width: int) -> Case:
    def theirs(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return up * torch.nn.functional.silu(gate)

    return Case(
        f"silu(gate) * up of halves of {rows} x {2 * width}",
        lambda both: gated_halves(both, "silu"),
        theirs,
        theirs,
        lambda seed, dtype: [normal(seed, dtype, rows, 2 * width)],
        lambda _: [],
        0.7,
        0.67,
    )


def results(form: Form, inputs: list[Tensor], others: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    out = form(*inputs, *others)
    grad = normal(7, dtype, *out.shape)
    return [part.double() for part in (out.detach(), *torch.autograd.grad(out, inputs, grad))]


def errors(case: Case) -> dict[str, float]:
    """The largest distances of a value or gradient from the reference's in float64; ends where ours are too large."""
    truth = results(case.reference, *case.drawn(0, torch.float64), torch.float64)
    found = {}
    for name, form, dtype in (
        ("float64", case.ours, torch.float64),
        ("bfloat16", case.ours, torch.bfloat16),
        ("transformers' in bfloat16", case.theirs, torch.bfloat16),
    ):
        own = results(form, *case.drawn(0, dtype), dtype)
        found[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(own, truth, strict=True))
    if found["float64"] > 1e-13 or found["bfloat16"] > 1.02 * found["transformers' in bfloat16"]:
        sys.exit(f"{case.name} is wrong: {found}")
    return found


def measured(case: Case, rounds: int) -> dict[str, float]:
    """Milliseconds of a forward and backward, ours and transformers' in turns, and the ratios."""
    drawn = [case.drawn(seed, torch.bfloat16) for seed in range(COPIES)]
    grad = torch.randn_like(case.ours(*drawn[0][0], *drawn[0][1]))
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours forward": [], "theirs forward": []}
    for turn in range(rounds + 2):
        for name, form in (("ours", case.ours), ("theirs", case.theirs)):
            start = time.perf_counter()
            made = [form(*inputs, *others) for inputs, others in drawn]
            middle = time.perf_counter()
            while made:  # a layer's result is not there any more when the backward has passed it
                inputs, _ = drawn[len(made) - 1]
                torch.autograd.grad(made.pop(), inputs, grad)
            if turn > 1:  # the first ones allocate
                times[name].append((time.perf_counter() - start) / COPIES)
                times[f"{name} forward"].append((middle - start) / COPIES)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["theirs"], strict=True)]
    forward = [theirs / ours for ours, theirs in zip(times["ours forward"], times["theirs forward"], strict=True)]
    return {
        "ours_ms": 1e3 * statistics.median(times["ours"]),
        "transformers_ms": 1e3 * statistics.median(times["theirs"]),
        "times_transformers": statistics.median(ratios),
        "times_transformers_forward": statistics.median(forward),
    }


def kept(case: Case) -> dict[str, float]:
    """Bytes that a forward keeps, weights and cosines left out."""
    found = {}
    for name, form in (("ours", case.ours), ("theirs", case.theirs)):
        inputs, others = case.drawn(0, torch.bfloat16)
        known = {tensor.untyped_storage().data_ptr() for tensor in others}
        seen: dict[int, Tensor] = {}

        def pack(tensor: Tensor, known: set[int] = known, seen: dict[int, Tensor] = seen) -> Tensor:
            place = tensor.untyped_storage().data_ptr()
            if place not in known:
                seen[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = form(*inputs, *others)
        found[name] = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
        del out
    return {
        "kept_bytes": found["ours"],
        "transformers_kept_bytes": found["theirs"],
        "kept_ratio": found["ours"] / max(1, found["theirs"]),
    }


if __name__ == "__main__":
    main()
