"""A run is resumed by the configuration that it was begun with, however that was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manylora.config import load_config
from manylora.errors import CheckpointBroken
from manylora.runs.folder import RunFolder


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
