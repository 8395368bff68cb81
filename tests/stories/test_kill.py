"""A run that is killed at a random step, by the signal that no process can handle, resumes to the same adapter."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from manylora.cli.app import run

STEPS, EVERY = 60, 7


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "manylora", *map(str, words)]


def step_of(run: Path) -> int:
    events = run / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    return sum('"event": "step"' in line for line in lines)


def adapter_of(run: Path) -> bytes:
    return (run / "adapters" / "main" / "adapter_model.safetensors").read_bytes()


def test_a_run_killed_at_a_random_step_resumes_to_the_same_adapter_bytes(
    tiny_base_folder: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"name : place {n}\n", "completion": f"the quick dog {n}"} for n in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "base": str(tiny_base_folder),
        "data": {"train": "train.jsonl", "eval_fraction": 0.2},
        "adapter": {"rank": 4, "dropout": 0.1},
        "train": {"learning_rate": 1e-2, "steps": STEPS, "row_tokens": 32, "rows_per_step": 4},
        "evaluate": {"every_steps": 10, "max_new_tokens": 4},
        "checkpoint": {"every_steps": EVERY},
        "output": "whole",
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert run(["train", str(file)]) == 0  # the undisturbed side may run in this process

    killed = tmp_path / "killed"
    seed = random.randrange(1 << 30)
    target = random.Random(seed).randrange(2, STEPS - 2)
    child = subprocess.Popen(command("train", file, "--set", f"output={killed}"), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while step_of(killed) < target and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, f"the run ended before step {target} (seed {seed})"

    resumed = subprocess.run(
        command("train", file, "--set", f"output={killed}", "--resume"), check=True, capture_output=True, text=True
    )
    assert "step" in resumed.stderr
    assert adapter_of(killed) == adapter_of(tmp_path / "whole"), f"seed {seed}"
    steps = [json.loads(line) for line in (killed / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == list(range(1, STEPS + 1))
