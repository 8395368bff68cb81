"""What a compressed adapter costs: bytes, error of the delta, KL and loss, of an adapter that was trained here.

    .venv/bin/python bench/compress.py [--adapter DIR]

Trains an adapter on the builtin base and the bundled data (a few minutes on two cores), or takes one that is there, and
compresses it in every scheme. Nothing is written unless each folder reads back, to the bit, as what was measured.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import write_result

BASE = "builtin:tiny-en"
STEPS = 120
ASKED: tuple[dict[str, Any], ...] = (
    {"bits": 8},
    {"bits": 4},
    {"bits": 2, "rho": 0.95},
    {"bits": 2, "rho": 0.8},
    {"energy": 0.99},
    {"energy": 0.99, "bits": 8},
    {"energy": 0.9, "bits": 4},
    {"rank": 4, "bits": 8},
    {"rank": 4, "bits": 4},
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", type=Path, default=None)
    asked = parser.parse_args()
    import manylora
    from manylora.adapters.bank import Bank
    from manylora.adapters.compress.compressed import compress
    from manylora.adapters.compress.reduce import Recipe, reduced
    from manylora.evaluation.evaluate import evaluate_loss
    from manylora.objectives import OBJECTIVES

    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.adapter or train(Path(scratch) / "run")
        base = manylora.load_base(BASE, dtype="float32")
        original, rows = manylora.Adapter.load(folder), eval_examples(base)

        def loss(adapter: Any, slot: int = 0) -> float:
            with Bank(base) as bank:
                bank.put(adapter, slot=0)
                objective = OBJECTIVES.get("causal-lm")
                return evaluate_loss(base, rows, slot=slot, row_tokens=256, objective=objective)["loss"]

        bare, before, figures = loss(original, -1), loss(original), {}
        for number, one in enumerate(ASKED):
            place = Path(scratch) / str(number)
            report = compress(folder, base=base, output=place, **one)
            read = manylora.Adapter.load(place)
            check(read, reduced(original, report.recipe).adapter)
            name = " ".join(f"--{key} {value}" for key, value in one.items())
            figures[name] = {
                "bits": round(report.bits, 3), "bytes": report.bytes_after, "of_bf16": share(report),
                "delta_error": round(report.error or 0.0, 5), "kl": report.kl, "max_kl": report.logits.max_kl,
                "top1": round(report.logits.top1, 4), "loss": round(loss(read), 5),
            }  # fmt: skip
        eight = figures["--bits 8"]
        if eight["kl"] > 1e-4 or eight["of_bf16"] > 0.51:
            raise SystemExit(f"int8 takes {eight['of_bf16']} of bf16 and moves the logits by {eight['kl']} nats")
        parameters = reduced(original, Recipe(scheme="int8")).num_parameters
    write_result(
        "compress",
        {
            "adapter": f"rank {original.spec.rank} on all linear sites of {BASE}, {parameters:,} numbers",
            "trained_steps": STEPS if asked.adapter is None else None,
            "loss": {"base": round(bare, 5), "adapter": round(before, 5)},
            "base_kl": report.base_logits.kl,
            "bytes_bf16": report.bytes_bf16,
            "compressed": figures,
        },
    )


def train(run: Path) -> Path:
    """The folder of an adapter that was trained on the bundled data."""
    import manylora
    from manylora.cli.demo import RECIPE
    from manylora.data.demo import demo_data_folder

    data = demo_data_folder()
    files = {"train": str(data / "train.jsonl"), "eval": str(data / "eval.jsonl")}
    settings = RECIPE | {"base": BASE, "data": files, "output": str(run)}
    manylora.train(settings, overrides={"train.steps": STEPS, "evaluate.samples": 0})
    return next((run / "adapters").iterdir())


def eval_examples(base: Any) -> Any:
    """The held-out rows of the bundled data, as the base is shown them."""
    from manylora.data.demo import demo_data_folder
    from manylora.data.examples import Reading
    from manylora.data.load import load_examples
    from manylora.data.sources import open_source

    source = open_source(demo_data_folder() / "eval.jsonl")
    return load_examples([(source, 1.0)], base.tokenizer, Reading(max_length=256), eos_ids=base.eos_ids).examples


def check(read: Any, measured: Any) -> None:
    """Stop unless a folder holds exactly the factors that were measured."""
    for site, own in measured.factors.items():
        for name, value in own.tensors.items():
            if not torch.equal(value, read.factors[site].tensors[name]):
                raise SystemExit(f"{name} of {site} is read back as something else")


def share(report: Any) -> float:
    return round(report.bytes_after / report.bytes_bf16, 4)


if __name__ == "__main__":
    main()
