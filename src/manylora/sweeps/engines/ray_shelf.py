"""The states of members on disk that any worker of a sweep can take up."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from manylora.sweeps.engines.ray_hub import State
from manylora.training.checkpoint import Checkpoints


class DiskShelf:
    """`checkpoints/` of a run: `waiting/` is shared, and each worker has a folder with its own checkpoints.

    All states of a member lie on the one way that it takes, so the one with the most steps is the best to go on from.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder = folder
        self._keep = keep

    def add(self) -> str:
        """A folder for a new worker, and its name; no name is given twice, not even after a driver has died."""
        number = 1 + max((int(name.rpartition("-")[2]) for name in self._workers()), default=-1)
        name = f"worker-{number}"
        (self._folder / name).mkdir(parents=True)
        return name

    def rescue(self, member: str, workers: Sequence[str] | None) -> State | None:
        """The last state of a member; one that lies in a worker's checkpoint is put where members wait.

        Raises:
            CheckpointBroken: a file is missing or damaged.
        """
        best = None
        shared = self._checkpoints("waiting")
        if self._files(member):
            progress, _ = shared.unpark(member)
            best = State(progress["step"], progress["level"])
        for worker in self._workers() if workers is None else workers:
            saved = self._checkpoints(worker).read()
            progress = None if saved is None else saved.running.get(member)
            if saved is None or progress is None or (best is not None and progress["step"] <= best.step):
                continue
            shared.park(member, progress, saved.tensors(member))
            best = State(progress["step"], progress["level"])
        return best

    def drop(self, member: str) -> None:
        """Remove what lies of a member that has ended."""
        for path in self._files(member):
            path.unlink(missing_ok=True)

    def clear(self, workers: Sequence[str] | None = None) -> None:
        """Remove the checkpoints of dead workers (None: of all), once their members were rescued; names stay taken."""
        for worker in self._workers() if workers is None else workers:
            for path in (self._folder / worker).iterdir():
                shutil.rmtree(path, ignore_errors=True)

    def _workers(self) -> list[str]:
        return [path.name for path in self._folder.glob("worker-*") if path.name.rpartition("-")[2].isdigit()]

    def _files(self, member: str) -> list[Path]:
        return list((self._folder / "waiting").glob(f"{member}@*.safetensors"))

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self._folder / name, self._keep, waiting=self._folder / "waiting")
