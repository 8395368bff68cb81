"""Checkpoints: what resuming needs to give the same bytes, written whole or not at all.

A checkpoint holds the factors, optimiser state and progress of each member that runs, and what the source of members
knows. It holds no random state: every draw is a pure function of (seed, step, row, site), so the step is enough.

A member that waits for a verdict has left its slot; its tensors lie in `waiting/`, written once, and every checkpoint
names the file that it means.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.errors import CheckpointBroken
from manylora.files import raise_if_full, recover, write_folder_atomic, write_json_atomic
from manylora.types import Factors


@dataclass(frozen=True, slots=True)
class Kept:
    """All tensors that a member needs to go on: its factors, the optimiser's state of them, the best so far.

    `followers` are the factors of its followers by name, `learned` is the state of its objective.
    """

    now: Mapping[str, Factors]
    moments: Mapping[str, Tensor]
    best: Mapping[str, Factors] = field(default_factory=dict)
    followers: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read: tick, progress of members that run, steps of those that wait, those that ended."""

    path: Path
    tick: int
    running: dict[str, dict[str, Any]]
    waiting: dict[str, int]
    ended: dict[str, dict[str, Any]]
    source: dict[str, Any]
    arriving: tuple[str, str, int] | None = None
    """Event, name and step of a member that the source has given and that had no room yet."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What bounds the forwards from here on: budget_tokens, checkpointing."""

    def tensors(self, member: str) -> Kept:
        """What was kept of a member that ran.

        Raises:
            CheckpointBroken: its file is missing or damaged.
        """
        return _read(self.path / f"{member}.safetensors")


class Checkpoints:
    """The `checkpoints/` folder of a run: `step-N` for the last `keep` of them, and `waiting/`, which loops share."""

    def __init__(self, folder: Path, keep: int, *, waiting: Path | None = None):
        self.folder = folder
        self.keep = keep
        self.waiting = waiting or folder / "waiting"

    def save(
        self,
        tick: int,
        running: Mapping[str, tuple[dict[str, Any], Kept]],
        waiting: Mapping[str, int],
        ended: Mapping[str, dict[str, Any]],
        source: Mapping[str, Any],
        arriving: tuple[str, str, int] | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `step-N`, then drop the oldest; the ones before stay until the new one is complete.

        Raises:
            DiskFull: no space; the checkpoints that were there still are.
        """
        path = self.folder / f"step-{tick}"
        with write_folder_atomic(path) as partial:
            for name, (_, kept) in running.items():
                save_file(flattened(kept), partial / f"{name}.safetensors")
            state = {
                "tick": tick,
                "running": {name: progress for name, (progress, _) in running.items()},
                "waiting": dict(waiting),
                "ended": dict(ended),
                "source": dict(source),
                "arriving": arriving,
                "memory": dict(memory or {}),
            }
            write_json_atomic(partial / "state.json", state)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old}")
        return path

    def steps(self) -> list[int]:
        """The ticks at which complete checkpoints lie, in order."""
        found = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in found if name.isdigit())

    def last(self) -> int | None:
        """The tick of the last complete checkpoint, None without one."""
        if self.folder.is_dir():
            recover(self.folder)
        return max(self.steps(), default=None)

    def read(self) -> Saved | None:
        """The last checkpoint, None without one.

        Raises:
            CheckpointBroken: its state is missing or damaged.
        """
        tick = self.last()
        if tick is None:
            return None
        path = self.folder / f"step-{tick}"
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            arriving = None if state["arriving"] is None else tuple(state["arriving"])
            members = state["running"], state["waiting"], state["ended"]
            return Saved(path, int(state["tick"]), *members, state["source"], arriving, state.get("memory", {}))
        except (OSError, ValueError, KeyError) as error:
            raise _broken(path, error) from error

    def park(self, member: str, progress: Mapping[str, Any], kept: Kept) -> None:
        """Write all of a member that leaves its slot and waits; files of its earlier waits go when nothing names them.

        Raises:
            DiskFull: no space.
        """
        self.waiting.mkdir(parents=True, exist_ok=True)
        path = self._parked(member, progress["step"])
        partial = path.with_suffix(".partial")
        try:
            save_file(flattened(kept), partial, metadata={"progress": json.dumps(dict(progress))})
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise_if_full(error, path)
            raise

    def unpark(self, member: str, step: int | None = None) -> tuple[dict[str, Any], Kept]:
        """Progress and tensors of a member that waits, at a step (None: its last).

        Raises:
            CheckpointBroken: the file is missing or damaged.
        """
        if step is None:
            steps = [int(path.stem.rpartition("@")[2]) for path in self.waiting.glob(f"{member}@*.safetensors")]
            step = max(steps, default=0)
        path = self._parked(member, step)
        try:
            with safe_open(path, framework="pt") as opened:
                progress = json.loads(opened.metadata()["progress"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _broken(path, error) from error
        return progress, _read(path)

    def _parked(self, member: str, step: int) -> Path:
        return self.waiting / f"{member}@{step}.safetensors"


def _read(path: Path) -> Kept:
    try:
        tensors = load_file(path)
        followers = dict.fromkeys(label.split("|")[0] for label in _part(tensors, "follower"))
        return Kept(
            now=unflatten(_part(tensors, "now")),
            moments=_part(tensors, "optimizer"),
            best=unflatten(_part(tensors, "best")),
            followers={name: unflatten(_part(tensors, f"follower|{name}")) for name in followers},
            learned=_part(tensors, "learned"),
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointBroken:
    folder = path if path.is_dir() else path.parent
    return CheckpointBroken(
        f"{path} cannot be read: {error}", next_step=f"remove {folder} to resume from the checkpoint before it"
    )


def flattened(kept: Kept) -> dict[str, Tensor]:
    """What is kept of a member as named tensors: `now|...`, `best|...`, `optimizer|...` and, where it has any,
    `follower|name|...` and `learned|...`.
    """
    parts = {"now": flatten(kept.now), "best": flatten(kept.best), "optimizer": kept.moments, "learned": kept.learned}
    parts |= {f"follower|{name}": flatten(factors) for name, factors in kept.followers.items()}
    return {f"{part}|{label}": tensor for part, tensors in parts.items() for label, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}|"
    return {label.removeprefix(prefix): tensor for label, tensor in tensors.items() if label.startswith(prefix)}


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
