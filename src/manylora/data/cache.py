"""Encoded examples kept between runs, by what they were made from: nothing stale can be found, for it has another key.

A key is a digest of the rows' content, the tokenizer, the chat template, how rows are read, and the code that reads
them. Two processes may write the same entry at once: each writes a file of its own and renames it, and both hold the
same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.data.examples import Encoded
from manylora.data.faults import Reason
from manylora.data.store import Examples, Scratch
from manylora.files import file_digest, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator

STALE_S = 24 * 3600.0  # a temporary folder this old was left by a process that died
LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow")

Make = Callable[[Path], Encoded]
"""Encodes into a file and returns what was encoded."""


def cache_folder() -> Path:
    """Where encoded examples are kept: $MANYLORA_CACHE, else manylora in the user's cache folder."""
    named = os.environ.get("MANYLORA_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "manylora"


def key_of(facts: Mapping[str, Any]) -> str:
    """The key of examples that were made from these facts by the code as it is now."""
    versions = {name: metadata.version(name) for name in LIBRARIES}
    text = json.dumps({"facts": facts, "code": code_digest(), "versions": versions}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def code_files() -> list[Path]:
    """The source files of all that turns rows into examples."""
    return sorted(Path(__file__).parent.rglob("*.py"))


@cache
def code_digest() -> str:
    """SHA-256 of the source of all that turns rows into examples."""
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cached(key: str | None, make: Make) -> tuple[Encoded, bool]:
    """What `make` makes, and whether it was found made before; without a key it is made and forgotten.

    A cache that cannot be written to is no fault: the examples then lie in a temporary folder.
    """
    root = cache_folder() / "data"
    if key is not None and (found := _find(root, key)) is not None:
        return found, True
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        scratch = Scratch(root)
    except OSError:
        scratch, key = Scratch(), None
    made = make(scratch.path / f"{key or 'examples'}.arrow")
    if key is not None:
        try:
            return _keep(root, key, made, scratch.path), False
        except OSError:
            pass  # the examples lie where they were made, or under their name without what says of them
    return _held(made, scratch), False


def entries(root: Path | None = None) -> Iterator[tuple[Path, int]]:
    """The files of the cache and their bytes."""
    root = root or cache_folder() / "data"
    if root.is_dir():
        for path in sorted(root.glob("*.arrow")):
            yield path, path.stat().st_size


def _held(made: Encoded, scratch: Scratch) -> Encoded:
    """The same, with a folder that goes when the examples do."""
    made.examples.keep_alive(scratch)
    return made


def _keep(root: Path, key: str, made: Encoded, scratch: Path) -> Encoded:
    file = scratch / f"{key}.arrow"
    digest = file_digest(file)
    # The mapping of the examples stays valid: a renamed file is the same file.
    file.replace(root / file.name)
    facts = {name: getattr(made, name) for name in ("format", "notes", "num_rows")}
    facts |= {"skipped": [asdict(reason) for reason in made.skipped], "sha256": digest}
    text = json.dumps(facts)
    write_text_atomic(root / f"{key}.json", f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}\n")
    scratch.rmdir()
    return made


def _find(root: Path, key: str) -> Encoded | None:
    """The entry of a key; None where there is none, or not every byte is as it was written."""
    import pyarrow as pa

    file = root / f"{key}.arrow"
    try:
        text, digest = (root / f"{key}.json").read_text(encoding="utf-8").splitlines()
        facts = json.loads(text)
        if hashlib.sha256(text.encode()).hexdigest() != digest or file_digest(file) != facts.pop("sha256"):
            return None
        skipped = [Reason(**reason) for reason in facts.pop("skipped")]
        found = Encoded(examples=Examples.open(file), skipped=skipped, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException):
        return None
    return found


def _sweep(root: Path) -> None:
    """Remove what processes left that died while they wrote."""
    for folder in root.glob("manylora-*"):
        try:
            old = time.time() - folder.stat().st_mtime > STALE_S
        except OSError:
            continue
        if old:
            shutil.rmtree(folder, ignore_errors=True)
