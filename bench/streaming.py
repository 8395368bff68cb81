"""Memory while a file of a gigabyte becomes examples.

    python bench/streaming.py --gigabytes 1

Writes a JSONL file of so many bytes from a seed, encodes it, and samples the process's own memory (RssAnon: what no
file backs) after every chunk. The examples must be those of the file. Writes bench/results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from results import write_result

WORDS = [
    "the", "of", "river", "house", "morning", "seven", "walked", "under", "light", "answer", "question", "because",
    "letter", "garden", "winter", "said", "old", "table", "between", "stone", "number", "heard", "never", "again",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the file is written; on a disk, not in memory")
    asked = parser.parse_args()
    from transformers import AutoTokenizer

    from manylora.base.load import find_base
    from manylora.data.batches import Epochs
    from manylora.data.examples import Reading, encode
    from manylora.data.rows import Row
    from manylora.data.sources import open_source

    tokenizer = AutoTokenizer.from_pretrained(find_base("builtin:tiny-en"))
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        file = Path(folder) / "rows.jsonl"
        num_rows = write_rows(file, int(asked.gigabytes * 1e9))
        size = file.stat().st_size
        samples: list[tuple[int, int]] = []
        every = max(1, num_rows // 200)

        def watched() -> Iterator[Row]:
            for place, row in enumerate(open_source(file).rows()):
                if place % every == 0:
                    samples.append((place, own_bytes()))
                yield row

        started = time.perf_counter()
        encoded = encode(
            watched(), tokenizer, Reading(max_length=1024), eos_id=tokenizer.eos_token_id,
            path=Path(folder) / "examples.arrow",
        )  # fmt: skip
        seconds = time.perf_counter() - started
        check(encoded.examples, file, tokenizer, num_rows)
        before_plan = own_bytes()
        Epochs(encoded.examples, row_tokens=1024, seed=0, packs=True).rows(0)
        planned = own_bytes()
    settled = [held for place, held in samples if place >= num_rows // 20]
    tenths = [held for _, held in samples[:: max(1, len(samples) // 10)]]
    grown = settled[-1] - settled[0]
    if max(settled) - settled[0] > 128e6:
        raise SystemExit(f"memory grew by {max(settled) - settled[0]:,} bytes")
    write_result(
        "streaming",
        {
            "file_bytes": size,
            "rows": num_rows,
            "tokens": int(encoded.examples.lengths.sum()),
            "seconds": round(seconds, 1),
            "own_bytes_at_each_tenth": tenths,
            "own_bytes_after_a_twentieth": settled[0],
            "own_bytes_at_the_end": settled[-1],
            "largest_growth_after_a_twentieth": max(settled) - settled[0],
            "growth_from_a_twentieth_to_the_end": grown,
            "bytes_of_an_epochs_plan": planned - before_plan,
        },
    )


def write_rows(file: Path, num_bytes: int) -> int:
    """Write prompts and completions of varied length until the file has so many bytes; how many rows it has."""
    draw, written, rows = random.Random(0), 0, 0
    with file.open("w", encoding="utf-8") as stream:
        while written < num_bytes:
            prompt = " ".join(draw.choices(WORDS, k=draw.randint(20, 160)))
            completion = " ".join(draw.choices(WORDS, k=draw.randint(10, 240)))
            written += stream.write(json.dumps({"prompt": f"{rows} {prompt}\n", "completion": completion}) + "\n")
            rows += 1
    return rows


def check(examples, file: Path, tokenizer, num_rows: int) -> None:
    """Stop unless every row is there, and a hundred of them, from first to last, have the tokens of their text."""
    if len(examples) != num_rows:
        raise SystemExit(f"{num_rows} rows became {len(examples)} examples")
    looked_at = set(range(0, num_rows, max(1, num_rows // 100))) | {num_rows - 1}
    with file.open(encoding="utf-8") as stream:
        for place, line in enumerate(stream):
            if place in looked_at:
                row = json.loads(line)
                parts = tokenizer([row["prompt"], row["completion"]], add_special_tokens=False)["input_ids"]
                if examples[place].tokens.tolist() != [*parts[0], *parts[1], tokenizer.eos_token_id]:
                    raise SystemExit(f"row {place + 1} has other tokens than its text")


def own_bytes() -> int:
    """The memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not say RssAnon")


if __name__ == "__main__":
    main()
