"""What merging costs, by where the weights end up: the held-out loss, beside the error that `manylora merge` measures.

    python bench/merge.py --steps 60

Trains an adapter on the builtin base as it is, and one on the same base packed as nf4; merges each into every storage;
loads every folder again and evaluates it. `loss_kept` is the share of what the adapter gained that the merged model
still has: 1 is all, 0 the bare base. `distance` is the error by which the command judges. Then the trained change made
small (1/1000 of the weight), where the trap is. No figure is written before the float32 merge has given the unmerged
loss to 1e-3. Writes bench/results/merge.json.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import write_result

BASE = "builtin:tiny-en"
DENSE = [("fp32", "original"), ("bf16", "original"), ("int8", "original"), ("nf4", "original")]
PACKED = [("fp32", "dequantised"), ("bf16", "dequantised"), ("bf16", "original"), ("int8", "dequantised"),
          ("nf4", "dequantised")]  # fmt: skip
SMALL = 1e-3
ANY = 1e9
"""A bound that nothing reaches: here the loss is measured, not refused."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows that are evaluated")
    asked = parser.parse_args()
    figures: dict[str, Any] = {"steps": asked.steps}
    with tempfile.TemporaryDirectory() as folder:
        for quantize, targets in ((None, DENSE), ("nf4", PACKED)):
            name = quantize or "dense"
            run = trained(Path(folder) / name, quantize, asked.steps)
            figures[f"trained on {name}"] = measured(run, quantize, targets, asked.rows)
        figures[f"delta of {SMALL:g} of the weight"] = small(run_adapter(Path(folder) / "dense"))
    write_result("merge", figures)


def trained(folder: Path, quantize: str | None, steps: int) -> Path:
    import manylora
    from manylora.cli.demo import RECIPE
    from manylora.data.demo import demo_data_folder

    held_out = (demo_data_folder() / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few = folder.with_suffix(".jsonl")
    few.write_text("".join(held_out[:32]), encoding="utf-8")
    files = {"train": demo_data_folder() / "train.jsonl", "eval": few}
    config = RECIPE | {"base": BASE, "dtype": "float32", "quantize": quantize, "data": files, "output": folder,
                       "evaluate": {"samples": 0}}  # fmt: skip
    manylora.train(config, overrides={"train.steps": steps})
    return run_adapter(folder)


def run_adapter(folder: Path) -> Path:
    return next(path.parent for path in (folder / "adapters").glob("*/adapter_config.json"))


def measured(folder: Path, quantize: str | None, targets: list[tuple[str, str]], rows: int) -> dict[str, Any]:
    import manylora

    adapter = manylora.Adapter.load(folder)
    base = manylora.load_base(BASE, dtype="float32", device="cpu", quantize=quantize)
    bare = loss(base, -1, rows)
    with manylora.Bank(base) as bank:
        bank.put(adapter, slot=0)
        unmerged = loss(base, 0, rows)
    figures: dict[str, Any] = {"base_loss": round(bare, 4), "unmerged_loss": round(unmerged, 4)}
    for into, onto in targets:
        with tempfile.TemporaryDirectory() as written:
            report = manylora.merge(base, adapter, into, onto=onto, output=Path(written) / "m", max_error=ANY)
            merged = manylora.load_base(str(Path(written) / "m"), dtype="float32", device="cpu")
        found = loss(merged, -1, rows)
        kept = (bare - found) / (bare - unmerged)
        if into == "fp32" and abs(found - unmerged) > 1e-3:
            raise SystemExit(f"merged in float32 the loss is {found}, and {unmerged} unmerged")
        figures[f"into {into} onto {onto}"] = {"loss": round(found, 4), "loss_kept": round(kept, 3)} | numbers(report)
    return figures


def small(folder: Path) -> dict[str, Any]:
    """The trained change, made so small that it is lost between the steps of a grid."""
    import manylora

    adapter = manylora.Adapter.load(folder)
    size = manylora.merge(manylora.load_base(BASE, dtype="float32", device="cpu"), adapter, "fp32").sites
    middle = sorted(site.size or 0.0 for site in size)[len(size) // 2]
    spec = replace(adapter.spec, alpha=adapter.spec.alpha * SMALL / middle)
    adapter = replace(adapter, spec=spec)
    figures = {}
    for quantize, into in ((None, "bf16"), (None, "int8"), (None, "nf4"), ("nf4", "nf4"), ("int8", "int8")):
        base = manylora.load_base(BASE, dtype="float32", device="cpu", quantize=quantize)
        report = manylora.merge(base, adapter, into, max_error=ANY)
        try:
            manylora.merge(base, adapter, into)
            refused = False
        except manylora.UserError:
            refused = True
        figures[f"into {into} onto {report.onto}"] = numbers(report) | {"refused_by_default": refused}
    return figures


def numbers(report: Any) -> dict[str, Any]:
    survives = report.losses.median_survival
    return {
        "median_error_of_delta": float(f"{report.median_error:.3g}"),
        "median_delta_kept": float(f"{survives:.3g}"),
        "kl": float(f"{report.kl:.3g}"),
        "distance": float(f"{report.distance:.3g}"),
        "kl_of_bare_base": float(f"{report.base_logits.kl:.3g}"),
        "max_abs_logit": float(f"{report.max_abs_error:.3g}"),
    }


def loss(base: Any, slot: int, rows: int) -> float:
    from manylora.data.demo import demo_data_folder
    from manylora.data.examples import Reading
    from manylora.data.load import load_examples
    from manylora.data.sources import open_source
    from manylora.evaluation.evaluate import evaluate_loss
    from manylora.objectives import OBJECTIVES
    from manylora.tasks import TASKS

    source = open_source(demo_data_folder() / "eval.jsonl")
    loaded = load_examples([(source, 1.0)], base.tokenizer, Reading(max_length=256), eos_ids=base.eos_ids)
    examples = list(loaded.examples)[:rows]
    objective = OBJECTIVES.get(TASKS.get("sft").objective)
    return float(evaluate_loss(base, examples, slot=slot, row_tokens=256, objective=objective)["loss"])


if __name__ == "__main__":
    main()
