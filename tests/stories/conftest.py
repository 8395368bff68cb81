"""Commands as a user types them, run in this process, on the tiny random base."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manylora.cli.app import run


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        return json.loads(self.out.splitlines()[-1])

    def refused(self, *words: str) -> None:
        """Check that it was the user's mistake, told in one block that holds the words."""
        assert self.code == 2, self.err
        assert [line.startswith("Error: ") for line in self.err.splitlines()].count(True) == 1
        assert "Traceback" not in self.err
        block = self.err[("\n" + self.err).index("\nError: ") :]
        for word in words:
            assert word in block, block


Command = Callable[..., Outcome]


@pytest.fixture
def manylora(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run one command line."""

    def command(*words: object) -> Outcome:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return command


def write_rows(path: Path, count: int = 8) -> Path:
    rows = [{"prompt": f"name : place {place}\n", "completion": f"the dog {place}"} for place in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, base: Path, **further: Any) -> Path:
    """A configuration of four quick steps beside its data."""
    write_rows(folder / "train.jsonl")
    write_rows(folder / "eval.jsonl", 3)
    values = {
        "base": str(base),
        "dtype": "float32",
        "device": "cpu",
        "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
        "adapter": {"rank": 2},
        "train": {"steps": 4, "row_tokens": 64, "rows_per_step": 2, "learning_rate": 1e-2},
        "evaluate": {"max_new_tokens": 4, "samples": 2},
        "checkpoint": {"every_steps": 2},
        "track": [],
        "output": "run",
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(values | further), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture
def config(tmp_path: Path, tiny_base_folder: Path) -> Path:
    return write_config(tmp_path, tiny_base_folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Path:
    """The folder of a finished run; tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(["train", str(write_config(folder, tiny_base_folder))]) == 0
    return folder / "run"
