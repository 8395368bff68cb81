"""A frozen model and its sites: any `torch.nn.Module`, in evaluation mode, with no gradient for its own weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from manylora.base.sites import find_sites
from manylora.types import Site


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def combine_digests(config: Mapping[str, Any], tensors: Mapping[str, str]) -> str:
    """One fingerprint from an architecture and the digests of its tensors, whatever the order they come in."""
    text = json.dumps({"config": config, "tensors": dict(sorted(tensors.items()))}, sort_keys=True, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class FrozenModel:
    """The base: `model` in eval mode, its `sites` by name, and its `fingerprint`.

    Nobody writes to it after this. `example(rows)` gives inputs of that many rows that differ, as keyword arguments; a
    bank of several slots uses it to prove that each site sees the batch's rows in order.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str = "",
        tokenizer: Any = None,
        head: nn.Module | None = None,
        example: Callable[[int], Mapping[str, Tensor]] | None = None,
        fingerprint: str | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer
        self.example = example
        self.head = head
        self.sites: dict[str, Site] = find_sites(model, head)
        self._fingerprint = fingerprint
        self.bank: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight; the same for the same weights under another file layout."""
        if self._fingerprint is None:
            tensors = {key: tensor_digest(value) for key, value in self.model.state_dict().items()}
            self._fingerprint = combine_digests({"class": type(self.model).__name__}, tensors)
        return self._fingerprint

    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())
