"""A run is resumed by the configuration that it was begun with, however that was written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import manylora
from manylora.config import load_config
from manylora.errors import CheckpointBroken
from manylora.runs.folder import RunFolder, _git
from manylora.training.loop import Loop


def begun(tmp_path: Path, **changes: Any) -> tuple[RunFolder, dict[str, Any]]:
    """A folder in which a run was begun, and its written configuration."""
    smallest = {"base": "builtin:tiny-en", "data": {"train": "/data/train.jsonl"}, "output": str(tmp_path / "run")}
    config = load_config(smallest, changes)
    folder = RunFolder(tmp_path / "run")
    folder.begin(config)
    return folder, config.to_dict()


def test_a_key_that_has_come_since_is_its_default(tmp_path: Path) -> None:
    folder, written = begun(tmp_path, **{"train.optimizer": "sgd"})
    for key in ("decay", "rate_ratio", "rate_pattern"):
        del written["train"][key]
    (folder.path / "config.yaml").write_text(yaml.safe_dump(written))
    folder.check_resumable(load_config(written))
    with pytest.raises(CheckpointBroken, match=r"train\.decay was 'decoupled' and is 'l2'"):
        folder.check_resumable(load_config(written, {"train.decay": "l2"}))
    with pytest.raises(CheckpointBroken, match=r"train\.optimizer was 'sgd' and is 'adamw'"):
        folder.check_resumable(load_config(written, {"train.optimizer": "adamw"}))


def test_a_configuration_that_no_run_has_any_more_is_compared_as_it_lies_there(tmp_path: Path) -> None:
    folder, written = begun(tmp_path)
    (folder.path / "config.yaml").write_text(yaml.safe_dump(written | {"gone": 1}))
    with pytest.raises(CheckpointBroken, match="gone was 1 and is None"):
        folder.check_resumable(load_config(written))


def test_a_run_is_not_resumed_on_other_rows_or_another_base(tmp_path, tiny_base_folder, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(tiny_base_folder, base)
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{n} + 1 =", "completion": f" {n + 1}"}) for n in range(8)]
    rows.write_text("\n".join(lines))
    config = {
        "base": str(base), "dtype": "float32", "data": {"train": str(rows)}, "adapter": {"rank": 2}, "track": [],
        "train": {"steps": 4, "row_tokens": 64, "learning_rate": 1e-3}, "output": str(tmp_path / "run"),
    }  # fmt: skip

    def stopping(self, *given):
        self.save()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_after_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            manylora.train(config)
    held = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    rows.write_text("\n".join(lines[::-1]))
    with pytest.raises(CheckpointBroken, match=r"train data 1 was sha256:\w+ and is sha256:\w+"):
        manylora.train(config, resume=True)
    rows.write_text("\n".join(lines))
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-2}))
    with pytest.raises(CheckpointBroken, match=r"the base was sha256:\w+ and is"):
        manylora.train(config, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == held
    (base / "config.json").write_text(json.dumps(settings))
    assert manylora.train(config, resume=True).summary["steps"] == 4


def test_git_is_asked_without_what_a_folder_names(tmp_path, monkeypatch):
    """One may stand in a folder that somebody else has made."""
    for command in (["init", "-q"], ["config", "core.fsmonitor", f"touch {tmp_path / 'ran'}; false"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    _git()
    assert not (tmp_path / "ran").exists()
