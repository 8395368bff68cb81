"""What packing the base costs: its perplexity in each format, and the loss that LoRA reaches on it.

    python bench/qlora.py --text valid.txt.xz
    python bench/qlora.py --e2e dev.txt

The first gives the perplexity of the builtin base on plain text that it has not seen, dense and stored in each format;
a base that differs from the dense one by more than its format may is an error. The second trains on the E2E development
set, split by attribute set as in bench/e2e.py: LoRA on the dense base and QLoRA on an nf4 base, the same recipe, three
seeds each. Writes bench/results/qlora-text.json and qlora-e2e.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

from results import ROOT, write_result

STORED = {
    "bfloat16": None,
    "int8, a row": ("int8", {}),
    "nf4, double quantisation": ("nf4", {"double_quant": True}),
    "nf4": ("nf4", {"double_quant": False}),
    "fp4": ("fp4", {"double_quant": False}),
    "int4, block 64, asymmetric": ("int4", {"block": 64}),
    "int4, block 64, symmetric": ("int4", {"block": 64, "symmetric": True}),
    "int4, a row, symmetric": ("int4", {"block": 8192, "symmetric": True}),
}
LARGEST_ERROR = 0.35  # of a weight's norm: four bits for a whole row are the coarsest that is tried
PARAGRAPHS = 800
RECIPE = {
    "adapter": {"rank": 8, "alpha": 16, "sites": ["all-linear"]},
    "train": {"learning_rate": 4e-3, "row_tokens": 256, "rows_per_step": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path, help="plain text that the base was not trained on")
    parser.add_argument("--e2e", type=Path, help="dev.txt of the E2E NLG data")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    if asked.text is not None:
        write_result("qlora-text", {"paragraphs": PARAGRAPHS, "perplexity": perplexities(asked.text)})
    if asked.e2e is not None:
        with tempfile.TemporaryDirectory() as folder:
            losses = trained(asked.e2e, Path(folder), asked.epochs, asked.seeds)
        write_result("qlora-e2e", {"epochs": asked.epochs, "recipe": RECIPE, **losses})


def perplexities(text: Path) -> dict[str, dict[str, float]]:
    """Perplexity a token of the builtin base, stored in each way, on the first paragraphs of a text."""
    import torch

    import manylora
    from manylora.data.examples import Reading, encode
    from manylora.data.sources import open_source
    from manylora.evaluation.evaluate import evaluate_loss
    from manylora.objectives import OBJECTIVES

    found = {}
    for name, how in STORED.items():
        base = manylora.load_base("builtin:tiny-en")
        rows = islice(open_source(text).rows(), PARAGRAPHS)
        examples = encode(rows, base.tokenizer, Reading(max_length=256, format="text"), eos_id=base.eos_ids).examples
        error = 0.0
        if how is not None:
            changed = norm = 0.0
            for site in base.sites.values():
                if site.kind != "linear" or site.is_head:
                    continue
                weight = site.module.get_parameter("weight")
                dense = manylora.pack(weight, how[0], **how[1]).dense(weight.dtype)
                changed += (dense.double() - weight.double()).square().sum().item()
                norm += weight.double().square().sum().item()
                with torch.no_grad():
                    weight.copy_(dense)
            error = math.sqrt(changed / norm)
            if error > LARGEST_ERROR:
                raise SystemExit(f"{name} changes the weights by {error:.2f} of their norm")
        loss = evaluate_loss(base, examples, slot=-1, row_tokens=256, objective=OBJECTIVES.get("causal-lm"))
        found[name] = {"perplexity": round(loss["perplexity"], 4), "relative error of the weights": round(error, 5)}
        print(name, found[name], flush=True)
    return found


def trained(source: Path, folder: Path, epochs: float, seeds: int) -> dict[str, object]:
    """The eval loss at the end, of LoRA and QLoRA, seed by seed."""
    import manylora

    tool = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), str(source), "--full", str(folder / "data")]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    losses: dict[str, list[float]] = {"LoRA, bfloat16 base": [], "QLoRA, nf4 base": []}
    for seed in range(seeds):
        for name, quantize in zip(losses, (None, "nf4"), strict=True):
            result = manylora.train(
                {
                    "base": "builtin:tiny-en", "quantize": quantize, "track": [],
                    "data": {"train": str(folder / "data/train.jsonl"), "eval": str(folder / "data/eval.jsonl")},
                    "evaluate": {"max_new_tokens": 1, "max_examples": 452, "every_steps": 10_000},
                    "output": str(folder / f"{quantize}-{seed}"), **RECIPE,
                },
                overrides={"train.epochs": epochs, "train.seed": seed},
            )  # fmt: skip
            losses[name].append(result.summary["eval"]["loss"])
            print(name, seed, losses[name][-1], flush=True)
    lora, qlora = losses.values()
    return {
        "by seed": losses,
        "mean": {name: statistics.mean(values) for name, values in losses.items()},
        "QLoRA over LoRA": statistics.mean(qlora) / statistics.mean(lora) - 1,
    }


if __name__ == "__main__":
    main()
