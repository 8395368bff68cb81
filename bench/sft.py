"""Supervised fine-tuning on rows of real lengths against TRL's SFTTrainer, as it comes and set for speed.

    MANYLORA_TEST_DATA=folder python bench/sft.py

The rows are those of gsm8k (`gsm8k/train.jsonl` in that folder: a question, a worked answer), in the tokens of the
builtin base's tokenizer, on a random Llama of 135 M parameters in bfloat16. Both train the same adapter (rank 16 on
every linear site, written by PEFT) with AdamW, a step of about 2,048 tokens, the answer's tokens alone learned.
manylora packs. TRL runs with its own defaults (`as it comes`: rows padded, gradient checkpointing), and set for speed,
without gradient checkpointing, which on this machine would only slow it: padded (`padded`), with rows of like length
together (`grouped`), or packed (`packed`: its default strategy, with torch's attention, which alone of what it takes is
there on a CPU); with `bf16`, its default, or if asked without (`no autocast`). First both must find the same number of
targets and the same loss in the same examples, in float32 on a small base and in bfloat16. A way of TRL's that does not
is left out of the comparison and named. Then they take turns, and targets a second are compared over all timed steps,
for lengths differ. Writes bench/results/sft.json, and ends with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_step import ALPHA, DECAY, FULL, RANK, RATE, TOLERANCE, finish
from qlora_step import write_base
from workers import Worker, ask, memory, ours, peers, speeds, take_turns

SMALL = (2, 4096)
CHECKED = 8
"""Examples of the check."""
STEP_TOKENS, ROW_TOKENS = 2048, 1024
BOUNDS = {"times": 4.0, "times_as_it_comes": 4.0}
"""The least: against the fastest way of TRL's, and against its defaults."""
PADDED = {"per_device_train_batch_size": 8, "max_length": ROW_TOKENS}
PACKED = {"per_device_train_batch_size": STEP_TOKENS // ROW_TOKENS, "max_length": ROW_TOKENS, "packing": True}
TRL: dict[str, dict[str, Any]] = {
    "as it comes": {"trl": PADDED | {"gradient_checkpointing": True}},
    "padded": {"trl": PADDED},
    "grouped": {"trl": PADDED | {"train_sampling_strategy": "group_by_length"}},
    "packed": {"trl": PACKED, "packing": True},
    "grouped, no autocast": {"trl": PADDED | {"train_sampling_strategy": "group_by_length", "bf16": False}},
    "packed, no autocast": {"trl": PACKED | {"bf16": False}, "packing": True},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=os.environ.get("MANYLORA_TEST_DATA"), help="folder with gsm8k/")
    parser.add_argument("--layers", type=int, default=FULL[0])
    parser.add_argument("--vocabulary", type=int, default=FULL[1])
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="*", default=list(TRL)[:4], choices=list(TRL))
    asked = parser.parse_args()
    if asked.data is None or not (asked.data / "gsm8k" / "train.jsonl").is_file():
        raise SystemExit("set MANYLORA_TEST_DATA, or --data, to a folder with gsm8k/train.jsonl")
    lines = (asked.data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[: asked.examples]
    figures: dict[str, Any] = {"examples": len(lines)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        data.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        small = Job(Path(folder) / "small", data, *SMALL, dtype="float32", threads=asked.threads)
        figures["checks"] = {"float32": same_losses(small, asked.ways)}
        full = Job(Path(folder) / "full", data, asked.layers, asked.vocabulary, "bfloat16", asked.threads)
        figures["checks"]["bfloat16"] = same_losses(full, asked.ways)
        wrong = {way for found in figures["checks"].values() for way, one in found.items() if not one["same"]}
        if set(asked.ways) <= wrong:
            raise SystemExit(f"no way of TRL's has the loss of the same examples: {figures['checks']}")
        figures["left out"] = sorted(wrong)
        config = full.config | {"output": str(Path(folder) / "run")}
        with ours("run", {"config": config}, asked.threads) as own:
            figures["ways"] = {
                way: against(full, own, way, asked.rounds, asked.steps) for way in asked.ways if way not in wrong
            }
    fastest = min(figures["ways"], key=lambda way: figures["ways"][way]["times"])
    figures |= {"fastest": fastest, "times": figures["ways"][fastest]["times"],
                "memory_ratio": figures["ways"][fastest]["memory_ratio"]}  # fmt: skip
    if "as it comes" in figures["ways"]:
        figures["times_as_it_comes"] = figures["ways"]["as it comes"]["times"]
    finish("sft", figures, BOUNDS, asked)


class Job:
    """The same base, rows and adapter, as both sides are told of them."""

    def __init__(self, place: Path, data: Path, layers: int, vocabulary: int, dtype: str, threads: int):
        place.mkdir()
        base = write_base(place / "base", layers, vocabulary)
        self.dtype, self.threads = dtype, threads
        self.peers: dict[str, Any] = {
            "base": str(base), "dtype": dtype, "rank": RANK, "alpha": ALPHA, "adapter": str(place / "adapter"),
            "data": str(data), "learning_rate": RATE, "weight_decay": DECAY, "output": str(place / "trl"),
        }  # fmt: skip
        self.config: dict[str, Any] = {
            "base": str(base), "dtype": dtype, "device": "cpu",
            "data": {"train": str(data), "columns": {"prompt": "question", "completion": "answer"}},
            "adapter": {"from": str(place / "adapter")},
            "train": {"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant", "warmup_ratio": 0.0,
                      "row_tokens": ROW_TOKENS, "rows_per_step": STEP_TOKENS // ROW_TOKENS, "epochs": 100},
            "checkpoint": {"every_steps": None}, "evaluate": {"samples": 0}, "track": [],
        }  # fmt: skip
        self.place = place
        ask(peers, "adapter", self.peers, threads)

    def told(self, way: str) -> dict[str, Any]:
        """What TRL is told for one of its ways: in float32 never to compute in less."""
        chosen = TRL[way]
        if self.dtype == "float32":
            chosen = chosen | {"trl": chosen["trl"] | {"bf16": False}}
        return self.peers | chosen


def same_losses(job: Job, ways: list[str]) -> dict[str, Any]:
    """Both sides' loss of the first examples by way of TRL's, and whether they and their targets are the same."""
    settings = {"config": job.config | {"output": str(job.place / "checked")}, "examples": CHECKED}
    own = ask(ours, "loss", settings, job.threads)
    found: dict[str, Any] = {}
    asked: dict[tuple[object, object], dict[str, Any]] = {}  # the order of the rows has no say here
    for way in ways:
        told = job.told(way)
        key = told.get("packing"), told["trl"].get("bf16")
        if key not in asked:
            asked[key] = ask(peers, "trl loss", told | {"examples": CHECKED}, job.threads)
        other = asked[key]
        off = abs(other["loss"] - own["loss"]) / own["loss"]
        same = own["targets"] == other["targets"] and off <= TOLERANCE[job.dtype]
        found[way] = {"ours": own, "trl": other, "difference": off, "same": same}
        print(job.dtype, way, found[way], file=sys.stderr)
    return found


def against(job: Job, own: Worker, way: str, rounds: int, steps: int) -> dict[str, Any]:
    """Speed and memory of our run and one way of TRL's, in turns."""
    with peers("trl", job.told(way), job.threads) as other:
        workers = {"ours": own, "trl": other}
        take_turns(workers, 1, 1)
        answers = take_turns(workers, rounds, steps)
    rates = {
        name: sum(one["targets"] for one in found) / sum(one["seconds"] for one in found)
        for name, found in answers.items()
    }
    peaks = memory(answers, "ours")
    figures = {
        **speeds(answers, "ours"),
        "targets_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "targets": {name: sum(one["targets"] for one in found) for name, found in answers.items()},
        "times": rates["ours"] / rates["trl"],
        "peak_bytes": peaks["peak_bytes"],
        "memory_ratio": peaks["memory_ratio"]["trl"],
        "facts": {name: found[-1]["facts"] for name, found in answers.items()},
    }
    print(way, figures["targets_per_second"], figures["times"], figures["cpu_times"], file=sys.stderr)
    return figures


if __name__ == "__main__":
    main()
