"""Ctrl-C in the middle of a run: a checkpoint is written, the exit code is 130, and the run can be resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def steps_so_far(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_text(encoding="utf-8").count('"event": "step"') if events.is_file() else 0


def test_ctrl_c_writes_a_checkpoint_exits_130_and_leaves_a_run_to_resume(manylora, config):
    run = config.parent / "run"
    words = [sys.executable, "-m", "manylora", "train", config, "--set", "train.steps=100000"]
    words += ["--set", "checkpoint.every_steps=null", "--set", "evaluate.every_steps=100000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            deadline = time.monotonic() + 120
            while steps_so_far(run) < 3 and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            _, error = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 130, error
    assert "Traceback" not in error
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    reached = int(checkpoint.name.removeprefix("step-"))
    assert reached >= 3
    unfinished = manylora("inspect", run, "--json")
    assert unfinished.result["state"].startswith("unfinished; resume")
    assert json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["tick"] == reached
