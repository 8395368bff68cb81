"""Text with an adapter unmerged: manylora's against PEFT's `generate` as it ships, one prompt and many.

    python bench/text.py BASE [--prompts 128] [--contexts 50,1000,4000]

BASE is a folder in Hugging Face format. Greedy, bfloat16, rank 16 on all linear sites, the same random factors on both
sides; processes take turns. First, in float32, the tokens of both must be equal on prompts of the first context. For
each context one row gets 48 tokens, with the adapter and without (transformers' `generate`); then many prompts of 20
to 60 tokens get 64 each, PEFT padding them in one batch. Writes bench/results/text.json.
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

import torch

NEW, MANY_NEW, ROUNDS = 48, 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--contexts", default="50,1000,4000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(json.loads(asked.worker))
        return
    contexts = [int(one) for one in asked.contexts.split(",")]
    with tempfile.TemporaryDirectory() as place:
        adapter = written(asked.base, Path(place) / "adapter")
        shared = {"base": str(asked.base), "adapter": adapter, "threads": asked.threads}
        same_tokens(shared, contexts[0])
        figures: dict[str, Any] = {"one row": {}, "threads": asked.threads}
        sides = ("manylora", "peft", "manylora bare", "transformers")
        for context in contexts:
            figures["one row"][str(context)] = turns(sides, {**shared, "context": context, "rows": 1, "new": NEW})
        figures["many"] = turns(sides[:2], {**shared, "context": 0, "rows": asked.prompts, "new": MANY_NEW})
    from results import write_result

    write_result("text", figures)


def written(base: Path, folder: Path) -> str:
    """An adapter with random factors, as PEFT's folder."""
    import manylora

    opened = manylora.load_base(str(base), dtype="float32")
    adapter = manylora.Adapter.new(opened, manylora.AdapterSpec(rank=16, alpha=32))
    draw = torch.Generator().manual_seed(0)
    for own in adapter.factors.values():
        own.tensors["b"].normal_(std=0.02, generator=draw)
    return str(adapter.save(folder, opened))


def same_tokens(shared: dict[str, Any], context: int) -> None:
    asked = {**shared, "context": context, "rows": 4, "new": 24, "dtype": "float32", "rounds": 1}
    tokens = {side: Worker(side, asked).answer()["tokens"] for side in ("manylora", "peft")}
    if tokens["manylora"] != tokens["peft"]:
        raise SystemExit(f"the two write other tokens: {tokens}")


def turns(sides: tuple[str, ...], asked: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of each side, median of rounds in turns, the peak of its process, and ratios within a round."""
    workers = {side: Worker(side, {**asked, "rounds": ROUNDS}) for side in sides}
    for worker in workers.values():
        worker.answer()  # warm
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side, worker in workers.items():
            taken[side].append(worker.answer())
    count = asked["rows"] * asked["new"]
    rates = {side: [count / one["seconds"] for one in found] for side, found in taken.items()}
    ratios = {
        "with the adapter": statistics.median(a / b for a, b in zip(rates["manylora"], rates["peft"], strict=True))
    }
    if "transformers" in sides:
        pairs = zip(rates["manylora bare"], rates["transformers"], strict=True)
        ratios["bare"] = statistics.median(a / b for a, b in pairs)
    return {
        "tokens_per_s": {side: round(statistics.median(found), 2) for side, found in rates.items()},
        "ratios": {name: round(value, 3) for name, value in ratios.items()},
        "peak_bytes": {side: found[-1]["peak_bytes"] for side, found in taken.items()},
    }


class Worker:
    """A process that writes its text once for each line that it is given."""

    def __init__(self, side: str, asked: dict[str, Any]):
        environment = os.environ | {"OMP_NUM_THREADS": str(asked["threads"])}
        script = [sys.executable, __file__, asked["base"], "--worker", json.dumps({**asked, "side": side})]
        self.process = subprocess.Popen(
            script, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker has died")
        return json.loads(line)

    def __del__(self) -> None:
        self.process.kill()


def work(asked: dict[str, Any]) -> None:
    run = (ours if asked["side"].startswith("manylora") else theirs)(asked, prompts(asked))
    for _ in sys.stdin:
        began = time.perf_counter()
        tokens = run()
        seconds = time.perf_counter() - began
        # Not getrusage's: a process begins with what its parent had taken.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        print(json.dumps({"seconds": seconds, "peak_bytes": peak, "tokens": tokens}), flush=True)


def prompts(asked: dict[str, Any]) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = [asked["context"] or 20 + place % 41 for place in range(asked["rows"])]
    return [torch.randint(100, 40000, (length,), generator=draw).tolist() for length in lengths]


def ours(asked: dict[str, Any], given: list[list[int]]) -> Any:
    import manylora
    from manylora.generation import generate

    base = manylora.load_base(asked["base"], dtype=asked.get("dtype", "bfloat16"))
    bank = manylora.Bank(base)
    bank.put(manylora.Adapter.load(asked["adapter"]), slot=0)
    slots = [-1 if asked["side"].endswith("bare") else 0] * len(given)

    def run() -> list[list[int]]:
        found = generate(base, given, slots=slots, max_new_tokens=asked["new"], stop_ids=())
        return [list(one.tokens) for one in found]

    return run


def theirs(asked: dict[str, Any], given: list[list[int]]) -> Any:
    import peft
    import transformers

    dtype = getattr(torch, asked.get("dtype", "bfloat16"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(asked["base"], dtype=dtype).eval()
    if asked["side"] == "peft":
        model = peft.PeftModel.from_pretrained(model, asked["adapter"]).eval()
    width = max(map(len, given))
    tokens = torch.tensor([[0] * (width - len(one)) + one for one in given])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in given])
    settings = {"max_new_tokens": asked["new"], "min_new_tokens": asked["new"], "do_sample": False, "pad_token_id": 0}

    def run() -> list[list[int]]:
        with torch.no_grad():
            made = model.generate(input_ids=tokens, attention_mask=mask, **settings)
        return made[:, width:].tolist()

    return run


if __name__ == "__main__":
    main()
