"""The fingerprint of a model folder: its architecture and the bytes of every tensor, whatever files they lie in."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from manylora.base.frozen import combine_digests
from manylora.errors import BaseBroken

# Keys of config.json that say how a folder was written or is to be loaded, not what the model is.
_NOT_ARCHITECTURE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
)

_CHUNK_BYTES = 1 << 22
_QUICK_BYTES = 1 << 30
"""Bytes that are hashed within a second or two."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What transformers calls a model's weights in one file, and the list of files where there are several."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder's weights lie in, in order; what lies beside them is none of it.

    They are those of the index, the one file without an index, or the packed ones; any others only where no such is.

    Raises:
        BaseBroken: none is there, one that the index names is missing, or only pickled ones are.
    """
    files = named_weight_files(folder) or sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        raise BaseBroken(
            f"{folder} holds no weights" + (f" but pickled ones ({pickled[0]})" if pickled else ""),
            allowed="*.safetensors",
            next_step="save the model again with model.save_pretrained(folder)"
            if pickled
            else "copy the weights there",
        )
    return files


def named_weight_files(folder: Path) -> list[Path]:
    """The files of weights that go by the names which transformers and this project write; none: there are no such.

    Raises:
        BaseBroken: the index names a file that is not there, or is none.
    """
    packed = sorted(folder.glob("packed*.safetensors"))
    if packed and _packed_block(folder) is not None:
        return packed
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise BaseBroken(f"{folder / INDEX} is no index of weights: {error}") from error
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise BaseBroken(
            f"{folder} lacks {missing[0]}, one of the {len(names)} files that {INDEX} names",
            next_step="copy or download the folder again",
        )
    return sorted(folder / name for name in names)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file by tensor name, and the offset at which the tensors' bytes begin.

    Raises:
        BaseBroken: the file ends before its header says it does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
        if not 0 < length <= size - 8:
            raise BaseBroken(f"{path} is no safetensors file or is cut off within its header ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise BaseBroken(f"{path} has a header that is not JSON: {error}") from error
    header.pop("__metadata__", None)
    wanted = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != wanted:
        raise BaseBroken(
            f"{path} has {size:,} bytes and its header describes {wanted:,}",
            next_step="the file is truncated or damaged: copy or download it again",
        )
    return header, 8 + length


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 of config and tensors; of a folder packed here, that of the weights it was packed from.

    Raises:
        BaseBroken: a packed folder whose tensors or settings are not those that were written.
    """
    block = _packed_block(folder)
    found = content_digest(folder)
    if block is None:
        return found
    if block.get("content") != found:
        raise BaseBroken(
            f"{folder} is not as it was packed: its content is {found[:15]}..., "
            f"and its config.json says {str(block.get('content'))[:15]}...",
            next_step="copy or download it again, or pack the original again: manylora quantize",
        )
    # Weights that were fitted to an adapter are another base than the one they were packed from.
    return str(block["content"] if block.get("fitted") else block["original"]["fingerprint"])


def quick_fingerprint(folder: Path) -> str | None:
    """`folder_fingerprint` where it is remembered or its files are small; None: finding it would take a while."""
    files = weight_files(folder)
    for path in files:
        read_header(path)
    quick = _key(folder, files) in _cache_read() or sum(path.stat().st_size for path in files) <= _QUICK_BYTES
    return folder_fingerprint(folder) if quick else None


def _key(folder: Path, files: list[Path]) -> str:
    """What a digest is remembered by: path, size and time of change of every file."""
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in (*files, folder / "config.json")]
    return hashlib.sha256(json.dumps([str(folder.resolve()), stamps]).encode()).hexdigest()


def content_digest(folder: Path) -> str:
    """SHA-256 of config and tensors; remembered by path, size and time of change of every file."""
    files = weight_files(folder)
    key = _key(folder, files)
    remembered = _cache_read()
    if key in remembered:
        return remembered[key]
    tensors: dict[str, str] = {}
    for path in files:
        header, start = read_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {tuple(entry['shape'])}".encode())
                file.seek(start + begin)
                for place in range(begin, end, _CHUNK_BYTES):
                    digest.update(file.read(min(_CHUNK_BYTES, end - place)))
                tensors[name] = digest.hexdigest()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    block = _packed_block(folder)
    if block is not None:  # the digest of a packed folder is written into this block, so it cannot be of it
        architecture["quantization_config"] = {key: value for key, value in block.items() if key != "content"}
    result = combine_digests(architecture, tensors)
    _cache_write(remembered | {key: result})
    return result


def _packed_block(folder: Path) -> dict[str, Any] | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    block = config.get("quantization_config")
    return block if isinstance(block, dict) and block.get("quant_method") == "manylora" else None


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "manylora" / "fingerprints.json"


def _cache_read() -> dict[str, str]:
    try:
        found = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a cache: absent or damaged means that the digest is computed
    return found if isinstance(found, dict) else {}


def _cache_write(entries: dict[str, str]) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(entries), encoding="utf-8")
        partial.replace(path)
    except OSError:
        return  # a home that cannot be written costs a hash at the next load, nothing else
