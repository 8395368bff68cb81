"""The run folder: who may write to it, what it must hold, and where each thing lies."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.base.tokenizer import template_digest, tokenizer_digest
from manylora.errors import CheckpointBroken, OutputExists
from manylora.files import recover, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel
    from manylora.config import Config

GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
"""git, which runs nothing that the folder's own settings name: one may stand in a folder that one has not made."""
PACKAGES = ("manylora", "torch", "transformers", "tokenizers", "datasets", "safetensors", "numpy")


class RunFolder:
    """The folder of one run; nothing is written to it before `begin`."""

    def __init__(self, path: Path):
        self.path = path

    def open(self, config: Config, resume: bool) -> dict[str, Any] | None:
        """Pass where a run may begin or go on; the summary of one that is finished.

        Raises:
            OutputExists: the folder holds something. CheckpointBroken: `resume`, and it holds a run of other settings.
        """
        if not resume:
            self.check_free()
            return None
        self.check_resumable(config)
        return self.finished()

    def check_free(self) -> None:
        """Pass where a new run may begin.

        Raises:
            OutputExists: the folder holds something.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            holds = "another run" if (self.path / "config.yaml").is_file() else "something else"
            raise OutputExists(
                f"{self.path} already holds {holds}",
                next_step="continue it with --resume, or name another folder with --set output=DIR",
            )

    def check_resumable(self, config: Config) -> None:
        """Pass where the folder is new or holds a run of the same configuration.

        Raises:
            OutputExists: it holds something that is no run. CheckpointBroken: it holds a run of other settings.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        held_file = self.path / "config.yaml"
        if not held_file.is_file():
            self.check_free()
        import yaml

        held, asked = _as_now(yaml.safe_load(held_file.read_text(encoding="utf-8")), config), config.to_dict()
        changed = [
            f"{key} was {before!r} and is {after!r}"
            for key, before, after in _differences(held, asked)
            if key != "output"
        ]
        if changed:
            raise CheckpointBroken(
                f"{self.path} was begun with another configuration: {'; '.join(changed[:4])}",
                next_step=f"resume it with {held_file}, or begin a new run with --set output=DIR",
            )

    def begin(self, config: Config) -> None:
        """Make the folder and write the resolved configuration into it."""
        self.path.mkdir(parents=True, exist_ok=True)
        recover(self.path)
        write_text_atomic(self.path / "config.yaml", config.to_yaml())

    def check_ground(self, base: FrozenModel, data: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Pass where a run stands on what it was begun on, or was begun before there was a manifest.

        `data` is what `write_manifest` is given.

        Raises:
            CheckpointBroken: its base, tokenizer, chat template or data are others now; nothing has been written.
        """
        path = self.path / "manifest.json"
        if not path.is_file():
            return
        held = json.loads(path.read_text(encoding="utf-8"))
        before, now = _ground(held["base"], held["data"]), _ground(_about(base), data)
        changed = [
            f"{what} was {before.get(what, 'not there')} and is {now.get(what, 'not there')}"
            for what in dict.fromkeys([*before, *now])
            if before.get(what) != now.get(what)
        ]
        if changed:
            raise CheckpointBroken(
                f"{self.path} was begun on something else: {'; '.join(changed[:4])}",
                next_step="put back what it was begun on, or begin a new run with --set output=DIR",
            )

    def write_manifest(self, base: FrozenModel, data: dict[str, Any]) -> None:
        """What the run stood on: versions, machine, base, data, and the state of the code if it is under git."""
        manifest = {
            "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "machine": {
                "system": platform.platform(),
                "processor": _processor(),
                "cores": os.cpu_count(),
                "device": str(base.device),
                "dtype": str(base.dtype).removeprefix("torch."),
            },
            "base": {"name": base.name, **_about(base)},
            "data": data,
            "git": _git(),
            "command": sys.argv,
        }
        write_json_atomic(self.path / "manifest.json", manifest)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that ended, None of one that did not."""
        path = self.path / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def adapter(self, member: str) -> Path:
        return self.path / "adapters" / member


def _about(base: FrozenModel) -> dict[str, Any]:
    return {
        "fingerprint": base.fingerprint,
        "tokenizer": tokenizer_digest(base.tokenizer),
        "chat_template": template_digest(base.tokenizer),
    }


def _ground(base: Mapping[str, Any], data: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What decides what is trained, by words for it; what has no digest is told apart by nothing."""
    of_base = {"the base": "fingerprint", "the tokenizer": "tokenizer", "the chat template": "chat_template"}
    found = {words: base.get(key) for words, key in of_base.items()}
    for side, parts in data.items():
        for number, part in enumerate(parts, start=1):
            found[f"{side} data {number}"] = part.get("content")
    return {words: value for words, value in found.items() if value is not None}


def _as_now(held: Any, config: Config) -> Any:
    """A written configuration with the keys that have come since, whose defaults are what was done before them."""
    try:
        return type(config).model_validate(held).to_dict()
    except ValueError:  # it is of another kind, or of a version whose keys have gone: compared as it lies there
        return held


def _differences(held: Any, asked: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(held, dict) and isinstance(asked, dict):
        keys = dict.fromkeys([*held, *asked])
        return [found for key in keys for found in _differences(held.get(key), asked.get(key), f"{prefix}{key}.")]
    return [] if held == asked else [(prefix.removesuffix("."), held, asked)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git() -> dict[str, Any] | None:
    """Commit of the folder the command was run in, and whether it had changes; None outside a repository."""
    try:
        commit, status = (
            subprocess.run([*GIT, *asked], capture_output=True, text=True, timeout=5, check=True)
            for asked in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}
