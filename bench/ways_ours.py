"""What the benchmarks let manylora do, each in a worker of its own (see workers.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workers import Gate, Way, serve

IMPORTS = (
    "manylora.config",
    "manylora.training.run",
    "manylora.base.packing.quantise",
    "manylora.quant.four_bit",
    "manylora.quant.kernels",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "pyarrow",
    "optuna",
)


def run(settings: dict[str, Any], gate: Gate) -> None:
    """`manylora train` on a configuration, stopped between steps."""
    from manylora.config import load_config
    from manylora.runs.console import Progress
    from manylora.training.run import train

    config = load_config(settings["config"])
    events = Path(config.output) / "events.jsonl"

    class Stopped(Progress):
        learned = 0

        def step(self, step: int, **numbers: Any) -> None:
            last = json.loads(events.read_text(encoding="utf-8").splitlines()[-1])
            learned, self.learned = last["tokens"] - self.learned, last["tokens"]
            gate.step(last["loss"], learned)

        def note(self, text: str) -> None:
            gate.facts.setdefault("notes", []).append(text)

    train(config, console=Stopped(quiet=True), use_cache=False)


def rows(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Write the tokens of the first steps of a run, as it will take them, to an npz: (steps, rows, tokens)."""
    import numpy as np

    from manylora.config import load_config
    from manylora.training.prepare import Stock

    config = load_config(settings["config"])
    member, _ = Stock(config, use_cache=False).member(config, "main")
    steps = [member.rows(step) for step in range(settings["steps"])]
    if any(len(row) != 1 for step in steps for row in step):
        raise SystemExit("a row holds more than one example, which the plain loop would not keep apart")
    tokens = np.array([[row[0].tokens for row in step] for step in steps])
    trained = np.array([[row[0].trained for row in step] for step in steps])
    if not (trained[..., 1:].all() and not trained[..., 0].any()):
        raise SystemExit("not every token but the first is learned from, as the plain loop would")
    np.savez(settings["file"], tokens=tokens)
    return {"shape": list(tokens.shape)}


def gradients(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """The loss of a run's first step; the gradient of each factor goes to a safetensors file by site."""
    from safetensors.torch import save_file

    from manylora.adapters.bank import Bank
    from manylora.config import load_config
    from manylora.training.prepare import Stock
    from manylora.training.step import backward, micro_batches

    config = load_config(settings["config"])
    stock = Stock(config, use_cache=False)
    member, adapter = stock.member(config, "main")
    member.slot = 0
    with Bank(stock.base, num_slots=1) as bank:
        bank.put(adapter, slot=0)
        losses = backward(stock.base, {0: member.aim()}, micro_batches([member], stock.base)).losses()
        found = {
            f"{stack.site.name}.{name}": tensor.grad[0].float().contiguous()
            for stack in bank.stacks.values()
            for name, tensor in stack.tensors.items()
            if tensor.grad is not None
        }
    save_file(found, settings["file"])
    return {"loss": losses[0]}


def loss(settings: dict[str, Any], gate: Gate) -> dict[str, Any]:
    """Nats a learned token, and how many there are, of the first examples in the order of the file."""
    from manylora.adapters.bank import Bank
    from manylora.config import load_config
    from manylora.evaluation.evaluate import evaluate_loss
    from manylora.objectives import OBJECTIVES
    from manylora.training.prepare import Stock

    config = load_config(settings["config"])
    stock = Stock(config, use_cache=False)
    _, adapter = stock.member(config, "main")
    examples = list(stock.data(config).train)[: settings["examples"]]
    with Bank(stock.base, num_slots=1) as bank:
        bank.put(adapter, slot=0)
        found = evaluate_loss(
            stock.base, examples, slot=0, row_tokens=config.train.row_tokens, objective=OBJECTIVES.get("causal-lm")
        )
    return {"loss": found["loss"], "targets": int(found["tokens"])}


def fleet(settings: dict[str, Any], gate: Gate) -> None:
    """Steps of the members that bench/fleet.py describes, all in one forward; the losses are those of the first."""
    from fleet import Fleet

    from manylora.base.load import load_base
    from manylora.memory.allocator import freed_memory_kept

    base = load_base(settings["base"], device="cpu")
    members = Fleet(base, settings["seeds"], settings["rows"], adapter=settings.get("adapter"))
    targets = len(members.members) * settings["rows"] * (settings["row_tokens"] - 1)
    with freed_memory_kept():  # as the training loop does
        while True:
            gate.step(members.step()[0], targets)


WAYS = {
    "fleet": Way(IMPORTS, fleet),
    "run": Way(IMPORTS, run),
    "rows": Way(IMPORTS, rows),
    "gradients": Way(IMPORTS, gradients),
    "loss": Way(IMPORTS, loss),
}

if __name__ == "__main__":
    serve(WAYS)
