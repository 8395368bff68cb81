"""Whether the best learning rate moves with rank, and how many times full fine-tuning's it is.

    python bench/rates.py

Two findings of LoRA Without Regret (Schulman et al., 2025): the best rate of an adapter hardly depends on its rank, and
it is about ten times that of full fine-tuning. Sweeps a grid of rates for ranks 4, 16 and 64 (alpha 32)
and for full fine-tuning of every site, on the bundled E2E rows over the builtin base, all members of a grid in one
fleet. The best rate of a curve is the lowest point of a parabola in the logarithm of the rate through its three best
neighbours. Writes bench/results/rates.json; a finding that does not show is written down as such, and is no error.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from results import write_result

from manylora.config import load_config
from manylora.data.demo import demo_data_folder
from manylora.sweeps.board import Board
from manylora.sweeps.run import sweep
from manylora.training.rates import auto_rate

RANKS = (4, 16, 64)
NUM_RATES = 8
SPANS = {"lora": (3e-4, 3e-2), "full": (3e-5, 3e-3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--folder", type=Path, help="keep the runs here; sweeps that lie there are resumed or reused")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        found = [seed_of(seed, asked.epochs, folder) for seed in asked.seeds]
    ratios = [best["full_ratio"] for best in found]
    drifts = [best["rank_drift"] for best in found]
    figures: dict[str, Any] = {
        "base": "builtin:tiny-en",
        "epochs": asked.epochs,
        "seeds": found,
        "full_ratio": float(np.median(ratios)),
        "rank_drift": max(drifts),
        "published": {"full_ratio": 10.0, "rank_drift": "below 2 from rank 4 to 512"},
        "reproduced": {
            "rank hardly moves the best rate (below 2 times)": max(drifts) < 2.0,
            "an adapter's best rate is about 10 times full fine-tuning's (5 to 20)": 5
            <= float(np.median(ratios))
            <= 20,
        },
        "rule": auto_rate_of(),
    }
    write_result("rates", figures)
    print(json.dumps(figures["reproduced"], indent=1))


def seed_of(seed: int, epochs: float, folder: Path) -> dict[str, Any]:
    """The curves of one seed: eval loss by rate, for each rank and for full fine-tuning."""
    curves = {}
    for method, (low, high) in SPANS.items():
        space: dict[str, Any] = {"train.learning_rate": {"low": low, "high": high, "log": True, "num": NUM_RATES}}
        if method == "lora":
            space["adapter.rank"] = list(RANKS)
        adapter = {"method": method} if method == "lora" else {"method": method, "sites": "everything"}
        data = demo_data_folder()
        values = {
            "base": "builtin:tiny-en",
            "data": {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")},
            "adapter": adapter,
            "train": {"epochs": epochs, "row_tokens": 256, "rows_per_step": 2, "seed": seed},
            "evaluate": {"max_examples": 128, "max_new_tokens": 1, "samples": 0},
            "checkpoint": {"every_steps": 50, "keep": 1},
            "track": [],
            "output": folder / f"{method}-{seed}",
            "sweep": {"space": space, "search": "grid"},
        }
        config = load_config(values)
        sweep(config, board=Board(), resume=config.output.exists())
        told = json.loads((config.output / "sweep.json").read_text(encoding="utf-8"))
        for entry in told["entries"]:
            name = f"rank {entry['values']['adapter.rank']}" if method == "lora" else "full"
            loss = math.inf if entry["loss"] is None else entry["loss"]
            curves.setdefault(name, []).append((entry["values"]["train.learning_rate"], loss))
    best = {name: lowest(sorted(curve)) for name, curve in curves.items()}
    ranks = [best[f"rank {rank}"][0] for rank in RANKS]
    return {
        "seed": seed,
        "curves": {name: [[rate, loss] for rate, loss in sorted(curve)] for name, curve in curves.items()},
        "best": {name: {"rate": rate, "loss": loss} for name, (rate, loss) in best.items()},
        "rank_drift": max(ranks) / min(ranks),
        "full_ratio": float(np.exp(np.mean(np.log(ranks)))) / best["full"][0],
    }


def lowest(curve: list[tuple[float, float]]) -> tuple[float, float]:
    """The rate of the least loss, between the points of the grid: a parabola in log rate through the best three."""
    losses = [loss for _, loss in curve]
    place = int(np.argmin(losses))
    if place in (0, len(curve) - 1) or not all(map(math.isfinite, losses[place - 1 : place + 2])):
        return curve[place]
    x = np.log([rate for rate, _ in curve[place - 1 : place + 2]])
    a, b, _ = np.polyfit(x, losses[place - 1 : place + 2], 2)
    return float(np.exp(-b / (2 * a))), losses[place]


def auto_rate_of() -> dict[str, Any]:
    """What `train.learning_rate: auto` says for the same base."""
    from manylora.base.load import load_base

    rate, reason = auto_rate(load_base("builtin:tiny-en"), method="lora", rows_per_step=2, total_steps=163)
    return {"rate": rate, "reason": reason}


if __name__ == "__main__":
    main()
