"""How far `manylora plan` is from what a run holds: planned peak over measured peak, each run in a fresh process.

    python bench/plan.py [NAME ...]

What is measured is the growth of the process's resident memory over the process that has imported everything and has
opened neither base nor data: the kernel's own peak (VmHWM), reset before. The run is `manylora train` whole, evaluation
and generation too, cut to three steps (once to sixty). Its losses must be finite. Writes bench/results/plan.json, and
ends with an error where a plan is off by more than the bound.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_step import write_base
from results import ROOT, write_result

BOUND = 0.15
STEPS = 3
E2E = ROOT / "src" / "manylora" / "data" / "demo" / "e2e"
TINY = "builtin:tiny-en"
COMMON: dict[str, Any] = {
    "data": {"train": str(E2E), "on_bad_row": "skip"}, "track": [],
    "train": {"steps": STEPS, "checkpointing": "none"}, "evaluate": {"max_examples": 8, "max_new_tokens": 8},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "tiny": {"base": TINY},
    "tiny, 60 steps": {"base": TINY, "train.steps": 60},
    "tiny, float32, 1024": {"base": TINY, "dtype": "float32", "train.row_tokens": 1024},
    "tiny, rank 64, dropout": {"base": TINY, "adapter.rank": 64, "adapter.dropout": 0.1},
    "tiny, head trained": {"base": TINY, "adapter.full_sites": ["lm_head"]},
    "tiny, 16 rows in 4": {"base": TINY, "train.rows_per_step": 16, "train.accumulate": 4},
    "135M, 64": {"base": "large", "train.row_tokens": 64},
    "135M, 256": {"base": "large", "train.row_tokens": 256},
    "135M, 512": {"base": "large", "train.rows_per_step": 2},
    "135M, float32": {"base": "large", "dtype": "float32", "train.row_tokens": 256, "train.rows_per_step": 2},
    "135M, nf4, 256": {"base": "large", "quantize": "nf4", "train.row_tokens": 256},
    "135M, rank 64, sgd": {"base": "large", "adapter.rank": 64, "train.optimizer": "sgd", "train.row_tokens": 256,
                           "train.accumulate": 4},
    "135M, dropout": {"base": "large", "adapter.dropout": 0.1, "adapter.rank": 4, "train.row_tokens": 256},
    "135M, full": {"base": "large", "train.row_tokens": 256, "train.checkpointing": "full"},
    "135M, selective": {"base": "large", "train.row_tokens": 256, "train.checkpointing": "selective"},
    "wide": {"base": "wide", "train.row_tokens": 256},
    "wide, head trained": {"base": "wide", "adapter.full_sites": ["lm_head"], "train.row_tokens": 256},
    "classification": {"base": "python:base", "task": "module"},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="cases; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", choices=("run", "plan"))
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    if asked.child:
        values = json.loads(asked.names[0])
        print(json.dumps(held(values) if asked.child == "run" else plan(values)))
        return
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {"large": write_base(Path(place) / "large", 30, 49152),
                   "wide": write_base(Path(place) / "wide", 4, 131072)}  # fmt: skip
        environment = os.environ | {
            "XDG_CACHE_HOME": place, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": str(asked.threads)
        }  # fmt: skip
        for name, case in CASES.items():
            if asked.names and name not in asked.names:
                continue
            base = str(folders.get(case["base"], case["base"]))
            values = {"given": {**COMMON, "base": base, "output": f"{place}/{len(rows)}"},
                      "set": {key: value for key, value in case.items() if key != "base"}}  # fmt: skip
            found = {}
            for child in ("plan", "run"):
                command = [sys.executable, __file__, json.dumps(values), "--child", child,
                           "--threads", str(asked.threads)]  # fmt: skip
                told = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
                if told.returncode:
                    raise SystemExit(f"{name}: {child} failed\n{told.stderr}")
                found |= json.loads(told.stdout.splitlines()[-1])
            found["ratio"] = found["planned_bytes"] / found["measured_bytes"]
            found["seconds_ratio"] = found["planned_seconds"] / found["measured_seconds"]
            rows[name] = found
            print(f"{name:26} planned {found['planned_bytes'] / 2**20:7.0f} MiB  measured "
                  f"{found['measured_bytes'] / 2**20:7.0f} MiB  ratio {found['ratio']:.3f}  step "
                  f"{found['planned_seconds']:.2f} s, {found['measured_seconds']:.2f} s", flush=True)  # fmt: skip
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    figures = {"threads": asked.threads, "steps": STEPS, "bound": BOUND, "worst": worst, "cases": rows}
    if not asked.names:
        write_result("plan", figures)
    else:
        print(json.dumps(figures, indent=1))
    if worst > BOUND:
        raise SystemExit(f"a plan is off by {worst:.0%}")


def made(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration of a case, and the objects that it names."""
    from manylora.config import load_config

    given = values["given"]
    objects: dict[str, Any] = {}
    if given["base"].startswith("python:"):
        given = {**given, "data": {"train": "python:train_data"}}
        objects = classifier()
    config = load_config({**given, "base": TINY}, values["set"])
    return config.model_copy(update={"base": given["base"]}), objects


def classifier() -> dict[str, Any]:
    """A module of classes and random rows for it."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from manylora.base.frozen import FrozenModel

    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(2048, 2048), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(2048, 100))
    data = TensorDataset(torch.randn(256, 2048), torch.randint(0, 100, (256,)))
    return {"python:base": FrozenModel(model), "python:train_data": data}


def plan(values: dict[str, Any]) -> dict[str, Any]:
    """The plan."""
    from manylora.planning.planner import planned

    config, objects = made(values)
    began = time.perf_counter()
    found = planned(config, objects=objects)
    return {"planned_bytes": found.total_bytes, "phase": found.phase, "categories": dict(found.categories),
            "planned_seconds": found.seconds_per_step, "planning_seconds": time.perf_counter() - began}  # fmt: skip


def held(values: dict[str, Any]) -> dict[str, Any]:
    """The growth of this process's resident memory in a run."""
    import sacrebleu  # noqa: F401 - what a run imports is no part of what it holds
    import transformers
    import transformers.models.llama.modeling_llama

    import manylora.base.packing.quantise
    import manylora.sweeps.run
    import manylora.training.optim.elementwise  # noqa: F401
    from manylora.training.run import train

    _ = transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.GenerationConfig
    config, objects = made(values)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    own = sum(p.nbytes for p in objects["python:base"].model.parameters()) if objects else 0
    result = train(config, objects=objects)
    lines = (result.run / "events.jsonl").read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    if len(steps) != config.train.steps or not all(math.isfinite(event["loss"]) for event in steps):
        raise SystemExit(f"losses are not finite: {steps}")
    return {
        "measured_bytes": status("VmHWM") - before + own,
        "measured_seconds": steps[-1]["time"] - steps[-2]["time"],
        "losses": [round(event["loss"], 4) for event in steps[-3:]],
    }


def status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
