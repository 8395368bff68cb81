"""A file's bytes, unpacked as they are read."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from manylora.errors import DataError

PACKED = (".gz", ".xz", ".bz2", ".zst", ".zip")
BUFFER_BYTES = 1 << 17
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError)
"""What the unpackers of the standard library raise on a file that is cut or is none of theirs."""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """A buffered stream of the file's bytes, unpacked where its ending says that it is packed.

    Raises:
        DataError: the file may not be read, or (then, or while it is read) is not a whole file of its kind.
    """
    packed = path.suffix.lower()
    with ExitStack() as closing:
        try:
            stream: Any = closing.enter_context(io.BufferedReader(io.FileIO(path), BUFFER_BYTES))
            if packed in PACKED:
                unpacked = closing.enter_context(_unpacked(path, stream, packed))
                stream = closing.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES))
            yield stream
        except DataError:
            raise
        except PermissionError as error:
            raise DataError(f"{path} may not be read by this user ({error.strerror})") from error
        except BROKEN as error:
            if packed not in PACKED:
                raise DataError(f"{path} could not be read ({error})") from error
            raise _not_whole(path, error) from error


def _unpacked(path: Path, raw: IO[bytes], packed: str) -> Any:
    match packed:
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".xz":
            return lzma.LZMAFile(raw)
        case ".bz2":
            return bz2.BZ2File(raw)
        case ".zip":
            member = member_of(path)
            if member.flag_bits & 1:
                raise DataError(f"{path}: {member.filename} is encrypted", next_step="unpack it first")
            archive = zipfile.ZipFile(raw)  # type: ignore[arg-type]
            return archive.open(member)
        case _:
            return _zstd(path, raw)


def member_of(path: Path) -> zipfile.ZipInfo:
    """The one file inside a zip.

    Raises:
        DataError: there is none or more than one, or it is no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # macOS puts a folder of file attributes beside what was packed
            held = [info for info in archive.infolist() if not (info.is_dir() or info.filename.startswith("__MACOSX/"))]
    except PermissionError as error:
        raise DataError(f"{path} may not be read by this user ({error.strerror})") from error
    except BROKEN as error:
        raise _not_whole(path, error) from error
    if len(held) != 1:
        names = ", ".join(info.filename for info in held[:10]) + (", ..." if len(held) > 10 else "")
        raise DataError(
            f"{path} holds {len(held)} files" + (f" ({names})" if held else ""),
            allowed="a zip with one data file inside",
            next_step="unpack it and name the file or the folder",
        )
    return held[0]


def _not_whole(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is not a whole {path.suffix[1:]} file ({error})", next_step="fetch it again")


def _zstd(path: Path, raw: IO[bytes]) -> Any:
    for name in ("compression.zstd", "zstandard"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        if name == "zstandard":
            return _Frames(raw, module.ZstdDecompressor().decompressobj, module.ZstdError)
        return _Frames(raw, module.ZstdDecompressor, module.ZstdError)
    raise DataError(f"{path}: nothing is installed that unpacks .zst", next_step="pip install zstandard")


class _Frames(io.RawIOBase):
    """Unpacked zstd frames, one after the other. zstandard's own stream ends in silence where a file is cut."""

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any], broken: type[Exception]):
        self._raw = raw
        self._new_frame = new_frame
        self._broken = broken
        self._frame: Any = None
        self._packed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._raw.read(BUFFER_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(self._packed))
            except self._broken as error:
                raise OSError(str(error)) from error
            self._packed = self._frame.unused_data
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
