"""Loss curves that no change of shape may move: what each case trains, and the numbers that its run writes.

As a program it writes the curves of the checkout that PYTHONPATH names, and compares them to the bit with others of the
same machine:

    PYTHONPATH=src python tests/golden/golden_curves.py --output new.json --against old.json

`curves.json` beside this file holds the curves in float32 on one thread as they were when this check was made; on
another machine they agree within 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import manylora

Curve = dict[str, list[float]]
"""By member and kind of number, one value a step: `main.loss`, `main.gradient_norm`, `main.eval_loss`."""

RECORDED = Path(__file__).with_name("curves.json")

_NAMES = (
    "Aromi",
    "Blue Spice",
    "Clowns",
    "The Mill",
    "Zizzi",
    "Strada",
    "Alimentum",
    "Fitzbillies",
    "Cotto",
    "Giraffe",
)
_FOODS = ("Italian", "French", "Japanese", "Indian")
_PLACES = ("by the river", "in the city centre", "near the park")
ROWS = [
    {
        "prompt": f"name: {name}, food: {_FOODS[place % 4]}\n",
        "completion": f"{name} serves {_FOODS[place % 4]} food {_PLACES[place % 3]}"
        + ", and children like it." * (place % 2),
    }
    for place, name in enumerate(_NAMES * 4)
]

_TRAIN = {
    "learning_rate": 2e-3, "steps": 8, "row_tokens": 96, "rows_per_step": 2, "compile": "off", "checkpointing": "none",
    "weight_decay": 0.01,
}  # fmt: skip
_LAST_LAYERS = {"rank": 4, "layers": [5, 6]}

CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 8}},
    "lora_plus_norm_and_head": {"adapter": {**_LAST_LAYERS, "full_sites": ["model.norm", "lm_head"]}},
    "full": {"adapter": {"method": "full", "sites": ["down_proj"], "layers": [6]}, "train": {"learning_rate": 2e-4}},
    "pissa": {"adapter": {**_LAST_LAYERS, "init": "pissa"}},
    "nf4": {"quantize": "nf4", "adapter": _LAST_LAYERS},
    "int8_loftq": {"quantize": "int8", "adapter": {**_LAST_LAYERS, "init": "loftq"}},
    "dropout": {"adapter": {**_LAST_LAYERS, "dropout": 0.1}},
    "accumulated": {"adapter": {"rank": 4, "dropout": 0.1}, "train": {"rows_per_step": 5, "accumulate": 3}},
    "selective": {"adapter": {"rank": 4, "dropout": 0.1}, "train": {"checkpointing": "selective"}},
    "recomputed": {"adapter": {"rank": 4, "dropout": 0.1}, "train": {"checkpointing": "full"}},
    "sgd_clipped": {"adapter": _LAST_LAYERS, "train": {"optimizer": "sgd", "learning_rate": 0.1, "clip_norm": 0.5}},
    "rounded_factors": {"adapter": {**_LAST_LAYERS, "quantize": "int8"}},
    "fleet": {
        "adapter": {"layers": [5, 6], "dropout": 0.1},
        "sweep": {"space": {"adapter.rank": [2, 8, 64]}, "search": "grid"},
    },
    "fleet_of_methods": {
        "adapter": {"layers": [6]},
        "sweep": {
            "space": {"adapter.method": ["lora", "full"], "train.learning_rate": [1e-3, 1e-4]}, "search": "grid",
            "folds": 2,
        },
    },
    "halving": {
        "adapter": {"layers": [6], "rank": 2},
        "sweep": {
            "space": {"train.learning_rate": [1e-4, 1e-3, 5e-3, 2e-2]}, "search": "grid", "stop": "successive-halving",
            "concurrent": 2,
        },
    },
    "module": {"task": "module"},
}  # fmt: skip
"""Keys that each case lays over the common ones."""

EXACT_ONLY: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "adapter": {"rank": 8, "dropout": 0.1}},
    "bfloat16_fleet": {
        "dtype": "bfloat16", "adapter": {"layers": [5, 6], "dropout": 0.1},
        "sweep": {"space": {"adapter.rank": [2, 8, 64]}, "search": "grid"},
    },
}  # fmt: skip
"""Cases that another kind of processor rounds differently: compared on one machine only."""


def config_of(case: str) -> dict[str, Any]:
    """The configuration of a case, without data and output."""
    changes = {**CASES, **EXACT_ONLY}[case]
    sections = {
        "dtype": "float32",
        "device": "cpu",
        "data": {"eval_fraction": 0.2},
        "train": _TRAIN | changes.get("train", {}),
        "evaluate": {"every_steps": 4, "samples": 0, "max_new_tokens": 4},
        "checkpoint": {"every_steps": None},
        "track": [],
    }
    if "folds" in changes.get("sweep", {}):
        sections["data"] = {}
    return {**sections, **{key: value for key, value in changes.items() if key != "train"}}


def curve_of(case: str, folder: Path) -> Curve:
    """Train a case on one thread and read its numbers from the run's events."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config = {**config_of(case), "output": str(folder / case)}
        handed = _module() if case == "module" else {"base": _base(config["dtype"], config.get("quantize"))}
        handed.setdefault("train_data", ROWS)
        run: Callable[..., Any] = manylora.sweep if "sweep" in config else manylora.train
        run(config, **handed)
    finally:
        torch.set_num_threads(threads)
    return read_curve(folder / case)


def read_curve(run: Path, after_step: int = 0) -> Curve:
    """Losses, norms and held-out losses of a run folder, by member, of the steps after `after_step`."""
    curve: Curve = {}
    for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event["event"] == "step" and event["step"] > after_step:
            for name in ("loss", "gradient_norm"):
                curve.setdefault(f"{event['member']}.{name}", []).append(event[name])
        elif event["event"] == "eval" and event["step"] > after_step:
            curve.setdefault(f"{event['member']}.eval_loss", []).append(event["loss"])
    return curve


@cache
def _base(dtype: str, quantize: str | None) -> Any:
    return manylora.load_base("builtin:tiny-en", dtype=dtype, device="cpu", quantize=quantize)


def _module() -> dict[str, Any]:
    """A base with a convolution, batch statistics and a table, and rows of tensors for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(40, 16), nn.Tanh(),
            nn.Linear(16, 3),
        ).eval()  # fmt: skip
        inputs = torch.randn(60, 12)
    base = manylora.FrozenModel(net, example=lambda rows: {"input": torch.ones(rows, 12) * torch.arange(rows)[:, None]})
    return {"base": base, "train_data": TensorDataset(inputs, inputs[:, :3].argmax(dim=1))}


def main() -> int:
    """Write the curves of all cases, or of those that are named; 1 where they differ from those to compare with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[*CASES, *EXACT_ONLY])
    parser.add_argument("--output", type=Path, required=True, help="where the curves are written, as JSON")
    parser.add_argument("--against", type=Path, help="curves of another checkout on this machine: equal to the bit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {case: curve_of(case, Path(folder)) for case in options.cases}
    options.output.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    print(f"{len(curves)} curves of {manylora.__file__}")
    if options.against is None:
        return 0
    known = json.loads(options.against.read_text(encoding="utf-8"))
    moved = [case for case in curves if curves[case] != known.get(case)]
    print(f"moved: {', '.join(moved)}" if moved else "all equal to the bit")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
