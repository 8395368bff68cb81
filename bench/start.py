"""How long it takes until something happens: imports, help, and a run's first step, beside the peers'.

    python bench/start.py

Each is a fresh process, in turns: `import manylora`, `manylora --help`, and what a script of the peers imports first;
then the whole of a run up to its first step on the builtin base and the bundled rows, `manylora train` beside TRL's
SFTTrainer with PEFT. First each must do what it is timed for: the help names its verbs, the imports give their classes,
both runs have the same loss to start from. Writes bench/results/start.json, and ends with an error where a bound is not
kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results import ROOT, write_result
from workers import PEERS, ask, ours, peers

REPORT = "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
COMMANDS = {
    "python": [sys.executable, "-c", "pass" + REPORT],
    "import manylora": [sys.executable, "-c", "import manylora; manylora.__version__" + REPORT],
    "manylora's train and bank": [sys.executable, "-c", "import manylora; manylora.train, manylora.Bank" + REPORT],
    "manylora --help": [sys.executable, "-m", "manylora", "--help"],
    "import torch, transformers": [str(PEERS), "-c", "import torch, transformers" + REPORT],
    "import peft": [str(PEERS), "-c", "from peft import LoraConfig, get_peft_model" + REPORT],
    "import peft, trl": [
        str(PEERS), "-c", "from peft import LoraConfig; from trl import SFTConfig, SFTTrainer" + REPORT
    ],
}  # fmt: skip
BOUNDS = {"manylora --help": 0.3, "import manylora": 0.5, "first step": 1.0}
"""The most: seconds, seconds, and the share of TRL's time."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-steps", type=int, default=3, help="rounds of whole runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--print", action="store_true", help="write no file and hold no bound")
    asked = parser.parse_args()
    figures: dict[str, Any] = commands(asked.rounds)
    with tempfile.TemporaryDirectory() as place:
        figures["first step"] = first_steps(Path(place), asked.first_steps, asked.threads)
    figures["bounds"] = BOUNDS
    if asked.print:
        print(json.dumps(figures, indent=1))
        return
    write_result("start", figures)
    found = {name: figures["seconds"].get(name, figures["first step"]["share"]) for name in BOUNDS}
    broken = [f"{name}: {found[name]:.2f}" for name, most in BOUNDS.items() if found[name] > most]
    if broken:
        raise SystemExit(f"bounds that are not kept: {', '.join(broken)}")


def commands(rounds: int) -> dict[str, Any]:
    """Seconds of each command by median, and the peak of its memory where it is a process of Python's own."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    peaks: dict[str, int] = {}
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    for turn in range(rounds + 1):  # the first fills the system's caches
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            if turn:
                times[name].append(time.perf_counter() - begun)
            if name == "manylora --help":
                if "train" not in done.stdout or "evaluate" not in done.stdout:
                    raise SystemExit(f"the help names no verbs: {done.stdout[:200]}")
            else:
                peaks[name] = int(done.stdout.splitlines()[-1]) * 1024
    return {"seconds": {name: statistics.median(found) for name, found in times.items()}, "peak_bytes": peaks}


def first_steps(place: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first training step, on the same base and rows."""
    from manylora.base.load import find_base

    base = find_base("builtin:tiny-en")
    rows = [json.loads(line) for line in
            (ROOT / "src/manylora/data/demo/e2e/train.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    data = place / "rows.jsonl"
    renamed = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in renamed), encoding="utf-8")
    told: dict[str, Any] = {
        "base": str(base), "dtype": "bfloat16", "rank": 16, "alpha": 32.0, "adapter": str(place / "adapter"),
        "data": str(data), "learning_rate": 1e-4, "weight_decay": 0.0, "output": str(place / "trl"),
        "trl": {"per_device_train_batch_size": 16, "max_length": 512},
    }  # fmt: skip
    config: dict[str, Any] = {
        "base": str(base), "device": "cpu", "adapter": {"from": str(place / "adapter")},
        "data": {"train": str(data), "columns": {"prompt": "question", "completion": "answer"}}, "track": [],
        "train": {"learning_rate": 1e-4, "schedule": "constant", "warmup_ratio": 0.0},
    }  # fmt: skip
    ask(peers, "adapter", told, threads)
    own = ask(ours, "loss", {"config": config | {"output": str(place / "checked")}, "examples": 16}, threads)
    other = ask(peers, "trl loss", told | {"examples": 16}, threads)
    if own["targets"] != other["targets"] or abs(own["loss"] / other["loss"] - 1) > 5e-3:
        raise SystemExit(f"the two runs do not start alike: {own}, {other}")
    times: dict[str, list[float]] = {"manylora train": [], "trl": []}
    for turn in range(rounds):
        begun = time.perf_counter()
        with ours("run", {"config": config | {"output": str(place / f"run-{turn}")}}, threads):
            times["manylora train"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with peers("trl", told, threads):
            times["trl"].append(time.perf_counter() - begun)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {"seconds": middle, "share": middle["manylora train"] / middle["trl"]}


if __name__ == "__main__":
    main()
