"""Files and folders that appear whole or not at all, whenever the process dies and however full the disk is.

Everything is written beside its target under `.partial-...`, forced to disk, then renamed. A folder that takes the
place of another first moves it to `.replaced-...`; `recover` brings it back should the process die between the renames.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.errors import DiskFull, OutputExists

if TYPE_CHECKING:
    from collections.abc import Iterator

PARTIAL = ".partial-"
REPLACED = ".replaced-"


def refuse_occupied(folder: Path) -> None:
    """Pass a folder that is not there or is empty.

    Raises:
        OutputExists: names what it holds.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExists(f"{folder} is a file", next_step="name another folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held:
        raise OutputExists(f"{folder} already holds {held[0]}", next_step="name another folder, or move that one away")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Put a text (UTF-8) at `path`, whole; missing parent folders are made.

    Raises:
        DiskFull: no space; what was at `path` before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, PARTIAL)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        raise_if_full(error, path)
        raise


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Put a value at `path` as indented JSON, whole.

    Raises:
        DiskFull: no space; what was at `path` before is still there. ValueError: a NaN, which JSON cannot hold.
    """
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def write_folder_atomic(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `path` when the block ends, and vanishes when the block raises.

    A folder that was at `path` before is replaced only once the new one is complete.

    Raises:
        DiskFull: no space; what was at `path` before is still there.
    """
    path = Path(path)
    partial = _beside(path, PARTIAL)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _share(partial)
        _sync_tree(partial)
        _swap_in(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise_if_full(error, path)
        raise


def _share(folder: Path) -> None:
    """Give all files the rights that the process gives to new ones: safetensors keeps its own to their owner."""
    if os.name == "posix":
        rights = folder.stat().st_mode & 0o666
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(rights)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recover(folder: str | Path) -> list[str]:
    """Clear what a killed process left in `folder`; returns the names that were removed or brought back.

    Call it when a run starts, before anything is written there: half-written files of a live process would go too.
    """
    folder = Path(folder)
    touched = []
    for left in sorted(folder.glob(f"{REPLACED}*")):
        target = folder / left.name.removeprefix(REPLACED).rpartition("-")[0]
        if not target.exists():
            left.replace(target)
        touched.append(left.name)
    for left in [*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{REPLACED}*")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
        touched.append(left.name)
    return sorted(set(touched))


def raise_if_full(error: BaseException, path: Path) -> None:
    """Turn an error that means a full disk into one that says so; return for every other error.

    Raises:
        DiskFull: names the path and the bytes that are free.
    """
    # safetensors reports a full disk as an error class of its own that carries only the system's text
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not (full or isinstance(error, DiskFull) or os.strerror(errno.ENOSPC) in str(error)):
        return
    free = shutil.disk_usage(_existing(path)).free
    raise DiskFull(
        f"no space left to write {path} ({free:,} bytes free)",
        next_step="free some space and go on with --resume; all that was complete before is untouched",
    ) from error


def _beside(path: Path, prefix: str) -> Path:
    # the process id keeps two processes that write the same file (a shared cache) out of each other's way
    return path.with_name(f"{prefix}{path.name}-{os.getpid()}")


def _existing(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.exists())


def _swap_in(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.replace(path)
        _sync_folder(path.parent)
        return
    # a folder cannot be renamed over one that has content
    replaced = _beside(path, REPLACED)
    path.replace(replaced)
    try:
        partial.replace(path)
    except BaseException:
        replaced.replace(path)
        raise
    _sync_folder(path.parent)
    shutil.rmtree(replaced)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            # Windows flushes only handles that may write
            with (Path(parent) / name).open("r+b") as stream:
                os.fsync(stream.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
