"""Attributes to a sentence on the whole E2E development set: a LoRA adapter against every weight trained.

    python bench/e2e.py ../data/e2e/dev.txt --only lora
    python bench/e2e.py ../data/e2e/dev.txt --only full

The file (`attributes||sentence` a line, E2E NLG Challenge, CC BY-SA 4.0) is split by attribute set, 90 to 10. BLEU is
sacrebleu's corpus score of greedy answers to unseen attribute sets, every reference counted. Correctness first: the
adapter must load again from its folder and give the same eval loss, or nothing is written. Results go to
bench/results/e2e-NAME.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results import ROOT, write_result

RECIPES = {
    "lora": {
        "adapter": {"rank": 8, "alpha": 16, "sites": ["all-linear"]},
        "train": {"learning_rate": 4e-3, "epochs": 8, "row_tokens": 256, "rows_per_step": 8, "weight_decay": 0.0},
    },
    "full": {
        "adapter": {"method": "full", "sites": ["everything"]},
        "train": {"learning_rate": 4e-4, "epochs": 8, "row_tokens": 256, "rows_per_step": 8, "weight_decay": 0.0},
    },
}


def measure(name: str, source: Path, folder: Path, changes: dict[str, object]) -> dict[str, object]:
    """The figures of one recipe, from reading the data to the finished report."""
    import manylora
    from manylora.adapters.bank import Bank
    from manylora.data.examples import Reading, encode
    from manylora.data.readers import read_rows
    from manylora.evaluation.evaluate import evaluate_loss
    from manylora.objectives import OBJECTIVES

    tool = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), str(source), "--full", str(folder / "data")]
    subprocess.run(tool, check=True, stdout=subprocess.DEVNULL)
    config = {
        "base": "builtin:tiny-en",
        "data": {"train": str(folder / "data" / "train.jsonl"), "eval": str(folder / "data" / "eval.jsonl")},
        "evaluate": {"max_new_tokens": 80},
        "output": str(folder / "run"),
        **RECIPES[name],
    }
    started = time.perf_counter()
    result = manylora.train(config, overrides=changes)
    wall = time.perf_counter() - started

    base = manylora.load_base("builtin:tiny-en")
    examples = encode(
        read_rows([folder / "data" / "eval.jsonl"]), base.tokenizer, Reading(max_length=512), eos_id=base.eos_ids
    ).examples
    with Bank(base) as bank:
        bank.put(manylora.Adapter.load(result.summary["adapters"]["main"]), slot=0)
        again = evaluate_loss(base, examples, slot=0, row_tokens=256, objective=OBJECTIVES.get("causal-lm"))
    # bfloat16 sums depend on how rows fall together; a wrong adapter is off by far more than this.
    if abs(again["loss"] - result.summary["eval"]["loss"]) > 5e-3:
        raise SystemExit(f"the saved adapter gives {again['loss']}, the run said {result.summary['eval']['loss']}")
    summary = {key: value for key, value in result.summary.items() if key not in ("run", "adapters")}
    share = summary["trainable_parameters"] / summary["base_parameters"]
    return {
        "recipe": RECIPES[name],
        "changes": changes,
        "whole_s": round(wall, 1),
        "trained_share": round(share, 4),
        **summary,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the development file of the E2E NLG Challenge")
    parser.add_argument("--only", choices=RECIPES, required=True)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe; not written"
    )
    args = parser.parse_args()
    changes = dict(item.split("=", 1) for item in args.set)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(args.only, args.source, Path(folder), changes)
    if changes or os.environ.get("MANYLORA_TRY"):
        print(figures)
    else:
        write_result(f"e2e-{args.only}", figures)


if __name__ == "__main__":
    main()
