"""The merged model folder: weights written tensor by tensor, and all else that the base's folder has."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.adapters.merge.report import MergeReport
from manylora.adapters.merge.storage import FLOATS, Storage
from manylora.adapters.merge.weights import Weights
from manylora.base.fingerprint import content_digest
from manylora.base.packing.folder import copy_rest, quantise_folder
from manylora.errors import ConfigError
from manylora.files import PARTIAL

SHARD_BYTES = 2 << 30
"""Bytes of a file of weights: what writing holds in memory beside the base."""

REPORT_FILE = "merge_report.json"


def write_model(folder: Path, weights: Weights, storage: Storage) -> None:
    """Fill an empty folder with the merged model: weights, configuration, tokenizer and what else the base has.

    Raises:
        ConfigError: a packed folder is asked for, and the base is no transformers model.
    """
    config = _config(weights, storage)
    if storage.packing is not None and config is None:
        raise ConfigError(
            f"a folder packed as {storage.name} needs a transformers model, and this base is a "
            f"{type(weights.base.model).__name__}",
            allowed=", ".join(FLOATS),
        )
    if storage.packing is None:
        _write_dense(folder, weights, storage, config)
        return
    # The packed weights are made from a dense folder, as those of any base are: by the one writer of their format.
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder.parent) as dense:
        _write_dense(Path(dense), weights, storage, config)
        quantise_folder(dense, folder, storage.name)
    _rename_original(folder, f"merged from {weights.base.name or 'an unnamed base'}")


def _write_dense(folder: Path, weights: Weights, storage: Storage, config: Mapping[str, Any] | None) -> None:
    write_weights(folder, merged_tensors(weights, storage))
    if config is not None:
        _write_json(folder / "config.json", config)
    _write_rest(folder, weights)


def _rename_original(folder: Path, name: str) -> None:
    """Say in a packed folder what it was made from, which is no folder that is still there."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    block = config["quantization_config"]
    block["original"]["name"] = name
    block.pop("content")
    _write_json(path, config)
    block["content"] = content_digest(folder)
    _write_json(path, config)


def merged_tensors(weights: Weights, storage: Storage) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the merged folder by key, one at a time, each in the dtype that it is written in."""
    source = weights.source
    for place in source.places:
        dtype = storage.dtype_for(place.dtype, source.main_dtype)
        if place.site is None:
            yield place.key, source.read(place).to(dtype)
        elif storage.packing and place.parameter == "weight" and weights.packs(weights.base.sites[place.site]):
            yield place.key, _value(weights, place.site, place.parameter, torch.float32)  # what is packed
        else:
            yield place.key, _value(weights, place.site, place.parameter, dtype)
    for name in weights.untied:
        site = weights.base.sites[name]
        owned = {place.parameter for place in source.places if place.site == name}
        for parameter in site.shapes():
            place = weights.place(site, parameter)
            if parameter not in owned and place is not None:
                dtype = storage.dtype_for(place.dtype, source.main_dtype)
                yield source.key_of(f"{name}.{parameter}"), _value(weights, name, parameter, dtype)


def _value(weights: Weights, name: str, parameter: str, dtype: torch.dtype) -> Tensor:
    site = weights.base.sites[name]
    value, change = weights.before(site, parameter), weights.change(site).get(parameter)
    return (value if change is None else value + change.to(value.dtype)).to(dtype)


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write safetensors of at most `SHARD_BYTES` each, with transformers' names, and their index where there are
    several."""
    held: dict[str, Tensor] = {}
    held_bytes, total = 0, 0
    shards: list[dict[str, Tensor] | list[str]] = []

    def close() -> None:
        save_file(held, folder / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > SHARD_BYTES:
            close()
            held_bytes = 0
        held[key] = tensor.contiguous().clone() if tensor.is_contiguous() else tensor.contiguous()
        held_bytes, total = held_bytes + size, total + size
    close()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    index = {}
    for number, keys in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        index |= dict.fromkeys(keys, name)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))},
    )


def _config(weights: Weights, storage: Storage) -> dict[str, Any] | None:
    """The base's configuration with the new weights' dtype, and untied where they are; None: it has none."""
    folder = getattr(weights.base, "folder", None)
    if folder is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    elif hasattr(weights.base.model, "config"):
        own: Any = copy.deepcopy(weights.base.model.config)
        config = own.to_dict() | {"architectures": [type(weights.base.model).__name__]}
    else:
        return None
    config.pop("quantization_config", None)
    dtype = storage.dtype_for(weights.source.main_dtype, weights.source.main_dtype)
    inner = [part for part in config.values() if isinstance(part, dict)]
    for part in (config, *inner):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = str(dtype).removeprefix("torch.")
        if weights.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    config.pop("torch_dtype", None)
    return config | {"dtype": str(dtype).removeprefix("torch.")}


def _write_rest(folder: Path, weights: Weights) -> None:
    """Tokenizer, chat template, generation configuration, licence and the base's own code."""
    base = weights.base
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(folder)
    origin = getattr(base, "folder", None)
    generation = getattr(base.model, "generation_config", None)
    if origin is not None:
        copy_rest(origin, folder)
        (folder / REPORT_FILE).unlink(missing_ok=True)  # that of the base, if it is a merged one
    elif generation is not None:
        generation.save_pretrained(folder)


def write_report(folder: Path, weights: Weights, report: MergeReport) -> None:
    """Put the report and the model card beside the model."""
    _write_json(folder / REPORT_FILE, report.to_dict())
    (folder / "README.md").write_text(_card(weights, report), encoding="utf-8")


def _card(weights: Weights, report: MergeReport) -> str:
    base_name = weights.base.name or "unknown"
    line = f"base_model: {json.dumps(base_name)}\n" if weights.base.name else ""
    error = "" if report.median_error is None else f", median site error {report.median_error:.3g} of the change"
    return (
        f"---\n{line}library_name: transformers\ntags:\n- manylora\n- merged\n---\n\n"
        f"# {base_name} with an adapter merged into it\n\n"
        f"- stored as {report.into}, merged onto the {report.onto} weights\n"
        f"- measured against base and adapter apart: KL {report.kl if report.kl is not None else 'not measured'}"
        f"{error}; all numbers are in `{REPORT_FILE}`\n"
        f"- fingerprint of the base: `{weights.base.fingerprint}`\n"
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
