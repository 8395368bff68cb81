"""Models of transformers whose checkpoint lacks their head: an encoder that is to classify, tag or measure."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from manylora.base.fingerprint import folder_fingerprint
from manylora.base.load import choose_device, choose_dtype, find_base, load_tokenizer, reading
from manylora.base.transformers_base import TransformersBase
from manylora.errors import BaseBroken

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MOST_LACKING = 0.5
"""The share of a model's numbers from which a checkpoint that lacks them is another model's, or a broken one."""


def load_headless(
    name: str,
    *,
    auto: str,
    dtype: str | torch.dtype = "bfloat16",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> TransformersBase:
    """A frozen model whose head each adapter brings: what its checkpoint lacks is `lacking`, and in no fingerprint.

    `auto` is the Auto class of transformers. One row holds one sequence.

    Raises:
        BaseNotFound: nothing is at `name`. BaseBroken: transformers cannot load it, or its files hold less than half
            of such a model.
    """
    import transformers

    folder = find_base(name)
    chosen, chosen_note = choose_device(device)
    kind, dtype_note = choose_dtype(dtype, chosen)
    with reading(folder):
        model, info = getattr(transformers, auto).from_pretrained(
            folder, dtype=kind, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True,
            local_files_only=True,
        )  # fmt: skip
    tokenizer, _ = load_tokenizer(name, trust_remote_code=trust_remote_code)
    lacks = _lacking(model, sorted(info.get("missing_keys", ())), folder, auto)

    def example(rows: int) -> Mapping[str, torch.Tensor]:
        tokens = torch.randint(1, tokenizer.vocab_size, (rows, 8), generator=torch.Generator().manual_seed(7))
        return {"input_ids": tokens.to(chosen), "attention_mask": torch.ones_like(tokens).to(chosen)}

    heads = ", ".join(lacks) or "nothing"
    return TransformersBase(
        model.to(chosen), processor=tokenizer, tokenizer=tokenizer, name=name, folder=folder, example=example,
        fingerprint=folder_fingerprint(folder), lacks=lacks,
        notes=[chosen_note, dtype_note, f"each adapter brings what the checkpoint lacks: {heads}"],
    ).probed()  # fmt: skip


def _lacking(model: Any, missing: list[str], folder: Path, auto: str) -> dict[str, dict[str, int | None]]:
    """By module, the dimension of each missing parameter that is the number of outputs, None where none is.

    Which it is, is seen from the shapes of models that differ in nothing but that number.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    absent = sum(model.get_parameter(name).numel() for name in missing)
    sites: dict[str, dict[str, int | None]] = {}
    two, three = (_shapes(model, outputs) for outputs in (2, 3))
    for name in missing:
        site, _, parameter = name.rpartition(".")
        varies = [place for place, sizes in enumerate(zip(two[name], three[name], strict=True)) if sizes[0] != sizes[1]]
        sites.setdefault(site, {})[parameter] = varies[0] if varies else None
    partly = [
        site for site, held in sites.items() if set(held) != set(dict(model.get_submodule(site).named_parameters()))
    ]
    if absent > MOST_LACKING * total or partly:
        raise BaseBroken(
            f"{folder} lacks {len(missing)} tensors of a {auto}, the first is {missing[0]!r}: more than a head",
            next_step="the folder is incomplete, or was saved from another class of model",
        )
    return sites


def _shapes(model: Any, outputs: int) -> dict[str, torch.Size]:
    """The shapes of a model's parameters if it had so many outputs; nothing is computed."""
    config = copy.deepcopy(model.config)
    config.num_labels = outputs
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in type(model)(config).named_parameters()}
