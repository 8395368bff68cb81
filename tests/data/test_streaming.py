"""Memory while rows become examples: it holds a chunk of rows, and not the data.

Each is measured in a process of its own: what tests before it gave back would be filled first, and not be seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from manylora.base.load import find_base
from manylora.data.examples import Reading, encode
from manylora.data.sources import open_source

STATUS = Path("/proc/self/status")
SENTENCE = "The river ran under the old house where seven letters lay on the table. "
ROWS, SETTLED = 24_000, 9_000
ALLOWED = 12e6

pytestmark = pytest.mark.skipif(not STATUS.is_file(), reason="the system does not say what memory a process owns")


def own_bytes() -> int:
    """The memory of this process that no file backs."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """26 MB of prompts and completions."""
    path = tmp_path_factory.mktemp("streaming") / "rows.jsonl"
    with path.open("w") as stream:
        for number in range(ROWS):
            row = {"prompt": f"{number} {SENTENCE * 4}\n", "completion": SENTENCE * (5 + number % 11)}
            stream.write(json.dumps(row) + "\n")
    return path


def growth(file: Path, folder: Path, *, hoard: bool) -> float:
    """How far the memory rises after the first third of the rows; `hoard` keeps them."""
    tokenizer = AutoTokenizer.from_pretrained(find_base("builtin:tiny-en"))
    kept, samples = [], []

    def watched():
        for place, row in enumerate(open_source(file).rows()):
            if hoard:
                kept.append((row, str(row.values)))
            if place >= SETTLED and place % 500 == 0:
                samples.append(own_bytes())
            yield row

    encoded = encode(
        watched(), tokenizer, Reading(max_length=1024), eos_id=tokenizer.eos_token_id, path=folder / "examples.arrow"
    )
    assert len(encoded.examples) == ROWS
    assert encoded.examples[-1].line == ROWS
    return max(samples) - samples[0]


def measured(file: Path, folder: Path, *, hoard: bool) -> float:
    """`growth` in a fresh process."""
    asked = [sys.executable, __file__, str(file), str(folder), *(["hoard"] if hoard else [])]
    return float(subprocess.run(asked, check=True, capture_output=True, text=True, timeout=300).stdout)


def test_memory_stays_flat_while_a_file_is_encoded(file, tmp_path):
    assert measured(file, tmp_path, hoard=False) < ALLOWED


@pytest.mark.slow
def test_rows_that_are_kept_would_be_seen(file, tmp_path):
    assert measured(file, tmp_path, hoard=True) > 2 * ALLOWED


if __name__ == "__main__":
    print(growth(Path(sys.argv[1]), Path(sys.argv[2]), hoard="hoard" in sys.argv))
