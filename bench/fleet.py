"""What a fleet costs and saves: members trained together against one after another, and against PEFT's plain loop.

    python bench/fleet.py

First, on a small float32 base, each member of a fleet must have the losses and the final factors that it has alone.
Then, on a random Llama-shaped base of 135 M parameters in bfloat16, members of rank 16 on every linear site train one
row of 64 tokens a step (and four rows): the fleet, the same members one after another through our own step with a bank
of one slot, and one after another through PEFT with torch's AdamW, take turns. The memory that a further member costs
is the slope of the peak of fresh processes between two sizes of the fleet. Writes bench/results/fleet.json, and ends
with an error where a bound is not kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qlora_step import write_base
from results import ROOT, write_result
from workers import ask, ours, peers, speeds, status

RANK, ALPHA, RATE, DECAY = 16, 32.0, 1e-4, 0.01
ROW_TOKENS = 64
CHECK_STEPS = 8
TOLERANCE = 2e-3
"""Relative: the loss of a step in bfloat16 of a member alone against PEFT's."""
SOLO_STEPS = 4
"""Steps of one member that stand for those of all members: they are alike."""
BOUNDS = {"times_solo": 2.5, "times_peft": 3.0, "member_memory_ratio": 1.0}
"""The least, the least, and the most."""
FACTOR_COPIES = 4.3
"""What a member may hold, over the float32 bytes of its factors: the factors, a gradient, two states, and the rest."""
FULL = (30, 49152)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=FULL[0])
    parser.add_argument("--vocabulary", type=int, default=FULL[1])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds with one row a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=2, metavar=("BASE", "MEMBERS"), help="print the peak memory of a fleet and end")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from manylora.memory.allocator import freed_memory_kept

    if asked.peak:
        with freed_memory_kept():
            print(json.dumps(peak_of(Path(asked.peak[0]), int(asked.peak[1]))))
    else:
        compare(asked)


def compare(asked: argparse.Namespace) -> None:
    """Check, measure, write, and end with an error where a bound is not kept."""
    figures: dict[str, Any] = {"members": asked.members, "rank": RANK, "threads": asked.threads,
                               "layers": asked.layers, "vocabulary": asked.vocabulary}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_CACHE_HOME"] = place
        figures |= equal_alone(Path(place) / "small")
        folder = write_base(Path(place) / "base", asked.layers, asked.vocabulary)
        figures |= memory(folder, asked.threads)
        figures["one row"] = in_turns(folder, asked, 1, asked.rounds)
        figures["four rows"] = in_turns(folder, asked, 4, max(1, asked.rounds // 3))
    figures["bounds"] = BOUNDS
    kept = {
        "times_solo": figures["one row"]["times_solo"] >= BOUNDS["times_solo"],
        "times_peft": figures["one row"]["times_peft"] >= BOUNDS["times_peft"],
        "member_memory_ratio": figures["member_memory_ratio"] <= BOUNDS["member_memory_ratio"],
    }
    if (asked.layers, asked.vocabulary) == FULL:
        write_result("fleet", figures)
    else:
        print(json.dumps(figures, indent=1))
    broken = [name for name, good in kept.items() if not good]
    if broken:
        raise SystemExit(f"bounds that are not kept: {', '.join(broken)}")


class Fleet:
    """Members of rank 16 on every linear site of one base, each with its own seed and its own random rows."""

    def __init__(
        self, base: Any, seeds: list[int], rows: int, row_tokens: int = ROW_TOKENS, dropout: float = 0.0,
        adapter: str | None = None,
    ):  # fmt: skip
        """`adapter`: the folder from which every member starts; None: each starts afresh from its seed."""
        from manylora.adapters.adapter import Adapter
        from manylora.adapters.bank import Bank
        from manylora.data.batches import Epochs
        from manylora.objectives import OBJECTIVES
        from manylora.spec import AdapterSpec
        from manylora.training.member import Member, Recipe
        from manylora.training.optim import OPTIMIZERS
        from manylora.training.optim.stacked import OptimizerSettings, StackedOptimizer

        self.base = base
        self.bank = Bank(base, num_slots=len(seeds))
        self.members: list[Any] = []
        for slot, seed in enumerate(seeds):
            spec = AdapterSpec(rank=RANK, alpha=ALPHA, dropout=dropout)
            own = Adapter.new(base, spec, seed=seed) if adapter is None else Adapter.load(adapter)
            self.bank.put(own, slot=slot)
            recipe = Recipe(
                learning_rate=RATE * (1 + seed), schedule="constant", total_steps=1000, warmup=0, rows_per_step=rows,
                optimizer=OptimizerSettings(weight_decay=DECAY, clip_norm=1.0),
            )  # fmt: skip
            epochs = Epochs(examples(base.vocabulary, rows, row_tokens, seed), row_tokens=row_tokens, seed=seed,
                            packs=base.packs)  # fmt: skip
            self.members.append(
                Member(
                    name=f"member-{seed}",
                    slot=slot,
                    seed=seed,
                    spec=own.spec,
                    recipe=recipe,
                    epochs=epochs,
                    objective=OBJECTIVES.get("causal-lm"),
                )
            )
        self.optimizers = {"adamw": StackedOptimizer(self.bank, OPTIMIZERS.get("adamw"))}

    def step(self) -> list[float]:
        """One step of every member; their losses."""
        from manylora.training.step import train_step

        results = train_step(self.base, self.optimizers, self.members)
        if not all(result.finite for result in results.values()):
            raise SystemExit(f"losses {[result.loss for result in results.values()]}")
        for member in self.members:
            member.step += 1
        return [results[member.name].loss for member in self.members]


def examples(vocabulary: int, rows: int, row_tokens: int, seed: int) -> list[Any]:
    from manylora.data.example import Example

    draw = np.random.default_rng(seed)
    return [
        Example(
            tokens=draw.integers(0, vocabulary, row_tokens).astype(np.int32), trained=np.arange(row_tokens) > 0,
            prompt_length=1, prompt="", reference="", group=str(place), file="made", line=place + 1,
        )
        for place in range(rows * 64)
    ]  # fmt: skip


def equal_alone(folder: Path) -> dict[str, Any]:
    """The largest differences between each member of a small float32 fleet and the same member alone."""
    from manylora.base.load import load_base

    write_base(folder, 2, 512)
    worst_loss = worst_factor = 0.0
    for dropout in (0.0, 0.1):
        base = load_base(str(folder), dtype="float32", device="cpu")
        seeds = list(range(6))
        fleet = Fleet(base, seeds, rows=2, row_tokens=24, dropout=dropout)
        together = [fleet.step() for _ in range(CHECK_STEPS)]
        if len({round(losses, 6) for row in together for losses in row}) < len(seeds):
            raise SystemExit("the members of the checked fleet do not differ, so nothing is shown")
        finals = [fleet.bank.get(slot).factors for slot in range(len(seeds))]
        fleet.bank.close()
        for place, seed in enumerate(seeds):
            lone = Fleet(base, [seed], rows=2, row_tokens=24, dropout=dropout)
            for number in range(CHECK_STEPS):
                (loss,) = lone.step()
                worst_loss = max(worst_loss, abs(loss - together[number][place]) / loss)
            for name, factors in lone.bank.get(0).factors.items():
                for key, value in factors.tensors.items():
                    off = (finals[place][name].tensors[key] - value).norm() / (1 + value.norm())
                    worst_factor = max(worst_factor, float(off))
            lone.bank.close()
    if max(worst_loss, worst_factor) > 1e-4:
        raise SystemExit(f"a member of a fleet is not the member alone: {worst_loss:.1e}, {worst_factor:.1e}")
    return {"loss_difference": worst_loss, "factor_difference": worst_factor, "checked_steps": CHECK_STEPS}


def in_turns(folder: Path, asked: argparse.Namespace, rows: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of the fleet, of its members one after another, and of PEFT's plain loop, each in its process.

    The lone member and PEFT's train the same adapter on the same rows: first every loss of theirs must agree.
    """
    place = folder.parent / f"rows-{rows}"
    place.mkdir()
    told: dict[str, Any] = {
        "base": str(folder), "dtype": "bfloat16", "rank": RANK, "alpha": ALPHA, "adapter": str(place / "adapter"),
        "learning_rate": RATE, "weight_decay": DECAY, "file": str(place / "rows.npz"),
    }  # fmt: skip
    ask(peers, "adapter", told, asked.threads)
    # PEFT goes through the rows that the lone member takes: so many that none comes twice.
    write_rows(folder, rows, Path(told["file"]), steps=2 + SOLO_STEPS * rounds)
    alone = {"base": str(folder), "seeds": [0], "rows": rows, "row_tokens": ROW_TOKENS, "adapter": told["adapter"]}
    fleet = {"base": str(folder), "seeds": list(range(asked.members)), "rows": rows, "row_tokens": ROW_TOKENS}
    with (
        ours("fleet", fleet, asked.threads) as together,
        ours("fleet", alone, asked.threads) as solo,
        peers("plain", told, asked.threads) as peft,
        peers("plain", told | {"keep_freed": True}, asked.threads) as kept,
    ):
        workers = {"fleet": (together, 1), "solo": (solo, SOLO_STEPS), "peft": (peft, SOLO_STEPS),
                   "peft, freed memory kept": (kept, SOLO_STEPS)}  # fmt: skip
        answers: dict[str, list[dict[str, Any]]] = {name: [worker.steps(1)] for name, (worker, _) in workers.items()}
        for _ in range(rounds):
            for name, (worker, steps) in workers.items():
                answers[name].append(worker.steps(steps))
    losses = {
        name: [*worker.opened["losses"], *(loss for one in answers[name] for loss in one["losses"])]
        for name, (worker, _) in workers.items()
    }
    off = max(abs(mine - want) / want for mine, want in zip(losses["solo"], losses["peft"], strict=True))
    if not off <= TOLERANCE:
        raise SystemExit(f"a member alone and PEFT's have losses that differ by up to {off:.1e}")
    found = speeds({name: own[1:] for name, own in answers.items()}, "fleet")
    return {
        "tokens_a_step": asked.members * rows * ROW_TOKENS,
        "largest_loss_difference": off,
        **found,
        "times_solo": found["times"]["solo"],
        "times_peft": found["times"]["peft"],
    }


def write_rows(folder: Path, rows: int, path: Path, steps: int) -> None:
    """The tokens that the first member takes in its first steps, (steps, rows, tokens), as an npz."""
    from manylora.base.load import load_base

    member = Fleet(load_base(str(folder), device="cpu"), [0], rows).members[0]
    taken = [[row[0].tokens for row in member.rows(step)] for step in range(steps)]
    np.savez(path, tokens=np.array(taken))


def memory(folder: Path, threads: int) -> dict[str, Any]:
    """Bytes at the peak that a further member costs, over what its factors and its activations may take."""
    sizes = (4, 12)
    found = []
    for members in sizes:
        told = subprocess.run(
            [sys.executable, __file__, "--threads", str(threads), "--peak", str(folder), str(members)],
            check=True, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "MALLOC_ARENA_MAX": "1"},
        )  # fmt: skip
        found.append(json.loads(told.stdout.splitlines()[-1]))
    apart = sizes[1] - sizes[0]
    slope = (found[1]["peak"] - found[0]["peak"]) / apart
    activations = (found[1]["saved"] - found[0]["saved"]) / apart
    factors = found[0]["factors"]
    return {
        "member_bytes": round(slope),
        "member_factor_bytes": factors,
        "member_activation_bytes": round(activations),
        "factor_copies": (slope - activations) / factors,
        "member_memory_ratio": slope / (FACTOR_COPIES * factors + activations),
    }


def peak_of(folder: Path, members: int) -> dict[str, int]:
    """The peak of this process over its memory before the fleet, and the bytes that a step saves for its backward."""
    from manylora.base.load import load_base
    from manylora.memory.allocator import give_back_freed

    base = load_base(str(folder), device="cpu")
    warm = Fleet(base, [0], 1)
    warm.step()  # whatever is imported or allocated once
    warm.bank.close()
    del warm
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    fleet = Fleet(base, list(range(members)), 1)
    give_back_freed()  # as the loop does when it has admitted members
    for _ in range(3):
        fleet.step()
    peak = status("VmHWM") - before
    held = {
        tensor.data_ptr(): tensor.nbytes for stack in fleet.bank.stacks.values() for tensor in stack.tensors.values()
    }
    return {"peak": peak, "factors": sum(held.values()) // members, "saved": _saved_bytes(fleet, set(held))}


def _saved_bytes(fleet: Fleet, known: set[int]) -> int:
    """Bytes that a forward keeps for its backward, each storage once, without the base's and the bank's own."""
    known = known | {parameter.data_ptr() for parameter in fleet.base.model.parameters()}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no later tensor takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fleet.step()
    return sum(seen.values())


if __name__ == "__main__":
    main()
