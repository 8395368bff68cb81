"""Checkpoints: what resuming needs to give the same bytes, written whole or not at all.

A checkpoint holds each member's factors, optimiser state and progress. It holds no random state: every draw is a pure
function of (seed, step, row, site), so the step is enough.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.adapters.bank import Bank
from manylora.errors import CheckpointBroken
from manylora.files import recover, write_folder_atomic, write_json_atomic
from manylora.training.member import Member
from manylora.training.optim.stacked import StackedOptimizer
from manylora.types import Factors


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-N` for the last `keep` of them."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def save(
        self,
        step: int,
        bank: Bank,
        optimizers: Mapping[str, StackedOptimizer],
        members: Sequence[Member],
        best: Mapping[str, Mapping[str, Factors]],
    ) -> Path:
        """Write `step-N`, then drop the oldest; the ones before stay until the new one is complete.

        Raises:
            DiskFull: no space; the checkpoints that were there still are.
        """
        path = self.folder / f"step-{step}"
        with write_folder_atomic(path) as partial:
            for member in members:
                tensors = flatten(bank.get(member.slot).factors)
                state = optimizers[member.recipe.optimizer].slot_state(member.slot)
                save_file({**tensors, **{f"optimizer|{key}": value for key, value in state.items()}},
                          partial / f"{member.name}.safetensors")  # fmt: skip
                if member.name in best:
                    save_file(flatten(best[member.name]), partial / f"{member.name}.best.safetensors")
            progress = {member.name: member.progress() for member in members}
            write_json_atomic(partial / "state.json", {"step": step, "members": progress})
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old}")
        return path

    def steps(self) -> list[int]:
        """The steps at which complete checkpoints lie, in order."""
        found = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in found if name.isdigit())

    def last(self) -> int | None:
        """The step of the last complete checkpoint, None without one."""
        if self.folder.is_dir():
            recover(self.folder)
        return max(self.steps(), default=None)

    def restore(
        self, bank: Bank, optimizers: Mapping[str, StackedOptimizer], members: Sequence[Member]
    ) -> tuple[int, dict[str, dict[str, Factors]]] | None:
        """Put the last checkpoint into bank, optimisers and members; its step and the best factors, None without one.

        Raises:
            CheckpointBroken: a file is missing or damaged, or the members are not those of this run.
        """
        step = self.last()
        if step is None:
            return None
        path = self.folder / f"step-{step}"
        best: dict[str, dict[str, Factors]] = {}
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if set(state["members"]) != {member.name for member in members}:
                raise CheckpointBroken(
                    f"{path} holds the members {', '.join(state['members'])}",
                    allowed=", ".join(member.name for member in members),
                    next_step="resume with the configuration that began the run",
                )
            for member in members:
                member.restore(state["members"][member.name])
                tensors = load_file(path / f"{member.name}.safetensors")
                own = {key: value for key, value in tensors.items() if not key.startswith("optimizer|")}
                _put(bank, member, unflatten(own))
                moments = {k.removeprefix("optimizer|"): v for k, v in tensors.items() if k.startswith("optimizer|")}
                optimizers[member.recipe.optimizer].load_slot_state(member.slot, moments)
                if (path / f"{member.name}.best.safetensors").is_file():
                    best[member.name] = unflatten(load_file(path / f"{member.name}.best.safetensors"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, CheckpointBroken):
                raise
            raise CheckpointBroken(
                f"{path} cannot be read: {error}", next_step=f"remove {path} to resume from the checkpoint before it"
            ) from error
        return int(state["step"]), best


def _put(bank: Bank, member: Member, factors: Mapping[str, Factors]) -> None:
    bank.put(replace(bank.get(member.slot), factors=factors), slot=member.slot)


def flatten(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as named tensors: `site|method|tensor`, and `site|method|tensor|anchor` where they have anchors."""
    return {
        f"{site}|{held.method}|{name}{ending}": tensor.contiguous()
        for site, held in factors.items()
        for ending, tensors in (("", held.tensors), ("|anchor", held.anchors))
        for name, tensor in tensors.items()
    }


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of `flatten`."""
    grouped: dict[tuple[str, str], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
    for label, tensor in tensors.items():
        site, method, name, *ending = label.split("|")
        held, anchors = grouped.setdefault((site, method), ({}, {}))
        (anchors if ending == ["anchor"] else held)[name] = tensor
    return {site: Factors(method, *both) for (site, method), both in grouped.items()}
