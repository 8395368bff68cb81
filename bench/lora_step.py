"""A LoRA run's step against PEFT in a plain loop as its guide writes it: speed and memory.

    python bench/lora_step.py

Both train the same adapter (rank 16 on every linear site, written by PEFT and read by manylora) on the same rows of 512
tokens, in the same order, with AdamW, each in a process and an environment of its own. manylora's side is `manylora
train` on a configuration, all that a run writes included, stopped between steps; a second one has its layers compiled
(`train.compile: layers`). First, in float32 on a small base,
loss and the gradient of every factor must agree; then, in bfloat16 on a random Llama of 135 M parameters, the loss of
every step that is timed. The two take turns. Memory is the peak over what the process holds after its imports. Writes
bench/results/lora_step.json, and ends with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from qlora_step import write_base
from results import write_result
from workers import ask, memory, ours, peers, speeds, take_turns

ROW_TOKENS = 512
RATE, DECAY, RANK, ALPHA = 1e-4, 0.01, 16, 32.0
SMALL, FULL = (2, 512), (30, 49152)
"""Layers and vocabulary of the base of the check, and of the one that is measured."""
BOUNDS = {"times": 2.5, "memory_ratio": 0.45}
"""The least and the most."""
TOLERANCE = {"float32": 2e-5, "gradients": 2e-4, "bfloat16": 2e-3}
"""Relative differences of the loss by dtype, and of a factor's gradient in float32."""


def main() -> None:
    asked = arguments().parse_args()
    with tempfile.TemporaryDirectory() as place:
        figures = same_gradients(Path(place) / "small", asked.rows)
        figures |= against_peft(Path(place) / "full", asked, compiles=True)
    finish("lora_step", figures, BOUNDS, asked)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=FULL[0])
    parser.add_argument("--vocabulary", type=int, default=FULL[1])
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {ROW_TOKENS} tokens a step")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    return parser


def finish(name: str, figures: dict[str, Any], bounds: dict[str, float], asked: argparse.Namespace) -> None:
    """Write the figures of a run at full size, print those of another, and end with an error below a bound."""
    sizes = {"layers": asked.layers, "vocabulary": asked.vocabulary, "threads": asked.threads}
    figures = sizes | figures | {"bounds": bounds}
    if (asked.layers, asked.vocabulary) != FULL:
        print(json.dumps(figures, indent=1))
        return
    write_result(name, figures)
    asked_of = {key: bound for key, bound in bounds.items() if key in figures}
    kept = {
        key: figures[key] >= bound if key.startswith("times") else figures[key] <= bound
        for key, bound in asked_of.items()
    }
    broken = [f"{key} {figures[key]:.2f}, bound {bounds[key]}" for key, good in kept.items() if not good]
    if broken:
        raise SystemExit(f"bounds that are not kept: {', '.join(broken)}")


def write_texts(folder: Path, path: Path, vocabulary: int, count: int) -> None:
    """Texts of random words of one token each, so that every row holds exactly one text and no padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [tokenizer.decode([token]) for token in range(min(vocabulary, len(tokenizer)))]
    words = [word for word in words if word.startswith(" ") and word[1:].isalpha() and word.isascii()]
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            text = "".join(words[place] for place in draw.integers(0, len(words), ROW_TOKENS - 1))
            if len(tokenizer(text).input_ids) != ROW_TOKENS - 1:
                raise SystemExit("a text of as many words is not of as many tokens")
            file.write(json.dumps({"text": text}) + "\n")


class Job:
    """One adapter, one file of rows and one base in a folder, as both sides are told of them."""

    def __init__(
        self, place: Path, *, layers: int, vocabulary: int, dtype: str, rows: int, steps: int,
        quantize: str | None = None, double: bool = True, threads: int = 2, alone: bool = False, method: str = "lora",
    ):  # fmt: skip
        """`alone`: no peer takes part, so the adapter is a fresh one and nothing is written for them."""
        place.mkdir(parents=True)
        self.place = place
        base = write_base(place / "base", layers, vocabulary)
        write_texts(base, place / "texts.jsonl", vocabulary, rows * (steps + 1))
        self.peers: dict[str, Any] = {
            "base": str(base), "dtype": dtype, "quantize": quantize, "double": double, "rank": RANK, "alpha": ALPHA,
            "adapter": str(place / "adapter"), "file": str(place / "rows.npz"), "learning_rate": RATE,
            "weight_decay": DECAY, "gradients": str(place / "theirs.safetensors"), "method": method,
        }  # fmt: skip
        self.config: dict[str, Any] = {
            "base": str(base), "dtype": dtype, "quantize": quantize, "device": "cpu",
            "data": {"train": str(place / "texts.jsonl"), "format": "text"},
            "adapter": {"rank": RANK, "alpha": ALPHA} if alone else {"from": str(place / "adapter")},
            "train": {"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant", "warmup_ratio": 0.0,
                      "row_tokens": ROW_TOKENS, "rows_per_step": rows, "epochs": 100},
            "checkpoint": {"every_steps": None}, "evaluate": {"samples": 0}, "track": [],
            "output": str(place / "run"),
        }  # fmt: skip
        self.threads = threads
        if alone:
            return
        ask(peers, "adapter", self.peers, threads)
        ask(ours, "rows", {"config": self.config, "file": self.peers["file"], "steps": steps}, threads)


def same_gradients(
    place: Path, rows: int, *, layers: int = SMALL[0], vocabulary: int = SMALL[1], **settings: Any
) -> dict[str, Any]:
    """The largest relative differences of the first step in float32; ends where they are more than rounding."""
    from safetensors.torch import load_file

    job = Job(place, layers=layers, vocabulary=vocabulary, dtype="float32", rows=rows, steps=1, **settings)
    own = ask(ours, "gradients", {"config": job.config, "file": str(place / "ours.safetensors")})
    other = ask(peers, "gradients", job.peers)
    mine, theirs = load_file(place / "ours.safetensors"), load_file(job.peers["gradients"])
    if set(mine) != set(theirs):
        raise SystemExit(f"factors that only one side has: {sorted(set(mine) ^ set(theirs))[:4]}")
    if not all(float(want.norm()) for want in theirs.values()):
        raise SystemExit("a gradient is zero, so nothing is shown")
    loss = abs(own["loss"] - other["loss"]) / other["loss"]
    worst = max(float((mine[name] - want).norm() / want.norm()) for name, want in theirs.items())
    if not (loss <= TOLERANCE["float32"] and worst <= TOLERANCE["gradients"]):
        raise SystemExit(f"the two compute different things: loss off by {loss:.1e}, a gradient by {worst:.1e}")
    return {"loss_difference": loss, "gradient_difference": worst, "factors_compared": len(mine)}


def against_peft(place: Path, asked: argparse.Namespace, *, compiles: bool = False, **settings: Any) -> dict[str, Any]:
    """Speed and memory on the large base, once every step had the same loss; `compiles`: also with compiled layers."""
    steps = asked.rounds + 2
    job = Job(place, layers=asked.layers, vocabulary=asked.vocabulary, dtype="bfloat16", rows=asked.rows, steps=steps,
              threads=asked.threads, **settings)  # fmt: skip
    configs = {"ours": {**job.config, "train": {**job.config["train"], "compile": "off"}}}
    if compiles:
        train = {**job.config["train"], "compile": "layers"}
        configs["compiled"] = {**job.config, "train": train, "output": str(place / "run-compiled")}
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(ours("run", {"config": config}, asked.threads))
            for name, config in configs.items()
        }
        workers["peft"] = stack.enter_context(peers("plain", job.peers, asked.threads))
        warm = take_turns(workers, 1, 1)
        answers = take_turns(workers, asked.rounds, 1)
    losses = {
        name: [*worker.opened["losses"], *(loss for one in warm[name] + answers[name] for loss in one["losses"])]
        for name, worker in workers.items()
    }
    off = max(
        abs(mine - want) / want for name in configs for mine, want in zip(losses[name], losses["peft"], strict=True)
    )
    if not off <= TOLERANCE["bfloat16"]:
        raise SystemExit(f"the losses of the timed steps differ by up to {off:.1e}: {losses}")
    found = speeds(answers, "ours") | memory(answers, "ours")
    if compiles:
        found["times_compiled"] = speeds(answers, "compiled")["times"]["peft"]
        found["memory_ratio_compiled"] = memory(answers, "compiled")["memory_ratio"]["peft"]
    return {
        "tokens_a_step": asked.rows * ROW_TOKENS,
        **found,
        "times": found["times"]["peft"],
        "memory_ratio": found["memory_ratio"]["peft"],
        "losses": {name: [round(loss, 4) for loss in found] for name, found in losses.items()},
        "largest_loss_difference": off,
        "facts": {name: found[-1]["facts"] for name, found in answers.items()},
    }


if __name__ == "__main__":
    main()
