"""A frozen model and its sites: any `torch.nn.Module`, in evaluation mode, with no gradient for its own weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from manylora.base.sites import find_sites
from manylora.gathering import gathered, is_gathered
from manylora.types import IGNORED, Batch, Outputs, Site, dense_parameters, dtype_of, take_rows


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

    Nobody writes to it after this, but for `bank`, the one that it carries at present. `example(rows)` gives inputs of
    that many rows that differ, as keyword arguments; a bank of several slots uses it to prove that each site sees the
    batch's rows in order. `lacks`: by name of a module, what
    `types.Site.lacks` says of it; these are the `lacking` sites, every adapter brings its own, and slot -1 gives no
    answers. `reads_along`: by site, the sites that read the same input after it, where that is known.
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
        lacks: Mapping[str, Mapping[str, int | None]] | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer
        self.example = example
        self.head = head
        self.sites: dict[str, Site] = find_sites(model, head, lacks)
        self.lacking: tuple[Site, ...] = tuple(site for site in self.sites.values() if site.lacks is not None)
        self._fingerprint = fingerprint
        self.bank: Any = None
        self.reads_along: Mapping[str, tuple[str, ...]] = {}
        self.notes: list[str] = []

    def probed(self) -> Self:
        """This base, ready for use; of a plain module nothing is left to be found."""
        return self

    @property
    def packs(self) -> bool:
        """Whether a row may hold several sequences."""
        return False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating parameter."""
        return dtype_of(self.model) or torch.float32

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight; the same for the same weights under another file layout."""
        if self._fingerprint is None:
            absent = {f"{site.name}.{name}" for site in self.lacking for name in site.shapes()}
            tensors = {
                key: self._digest(key, value) for key, value in self.model.state_dict().items() if key not in absent
            }
            self._fingerprint = combine_digests({"class": type(self.model).__name__}, tensors)
        return self._fingerprint

    def _digest(self, key: str, value: Tensor) -> str:
        """The digest of a tensor of the state, which is brought where it is away."""
        owner, rest = self.model, key.split(".")
        while rest[0] in owner._modules:
            owner, rest = owner.get_submodule(rest[0]), rest[1:]
        if not is_gathered(owner):
            return tensor_digest(value)
        own: dict[str, Tensor] = {}
        with gathered(owner):
            owner._save_to_state_dict(own, "", keep_vars=False)
            return tensor_digest(own[".".join(rest)].clone())

    @property
    def storage(self) -> str | None:
        """The format that the linear weights are packed in; None where they are dense, several with + between them."""
        found = sorted({site.packed.format for site in self.sites.values() if site.packed is not None})
        return "+".join(found) or None

    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once; a packed weight counts its numbers, not its bytes."""
        packed = sum(math.prod(site.packed.shape) for site in self.sites.values() if site.packed is not None)
        dense = {id(own): own.numel() for module in self.model.modules() for own in dense_parameters(module).values()}
        return packed + sum(dense.values())

    def outputs(self, batch: Batch) -> Outputs:
        """The module's own outputs of a batch, floating inputs in the dtype of its weights."""
        given = {name: value.to(self.dtype) if value.is_floating_point() else value
                 for name, value in batch.inputs.items()}  # fmt: skip
        made = self.model(**given)
        return ModuleOutputs(made if isinstance(made, Tensor) else made.logits)


class ModuleOutputs:
    """Scores (rows, classes), or (rows, ..., classes) with one label for each of their places."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def map_supervised(
        self,
        labels: Tensor,
        fn: Callable[..., Mapping[str, Tensor]],
        *,
        beside: ModuleOutputs | None = None,
        sequences: Tensor | None = None,
    ) -> Mapping[str, Tensor]:
        """Sums by row of `fn(logits (n, C), labels (n,)) -> {name: (n,)}` over places whose label is not IGNORED.

        `beside` and `sequences` are those of `types.Outputs`.
        """
        chosen = labels.ne(IGNORED)
        others = () if beside is None else (_wide(beside.logits)[chosen],)
        values = fn(_wide(self.logits)[chosen], labels[chosen], *others)
        rows = chosen.nonzero()[:, 0]
        return summed_by_row(values, rows, len(labels), None if sequences is None else sequences[chosen])

    def whole_rows(self) -> Tensor:
        """What the module gave, in float32 or better."""
        return _wide(self.logits)

    def take(self, rows: Sequence[int]) -> ModuleOutputs:
        """The outputs of these rows, in this order."""
        return ModuleOutputs(take_rows(self.logits, rows))


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def summed_by_row(
    values: Mapping[str, Tensor], rows: Tensor, num_rows: int, sequences: Tensor | None = None
) -> dict[str, Tensor]:
    """Values (n,) of places added up by row (rows,), or by sequence of each row (rows, sequences).

    `rows` (n,) is the row of each place, `sequences` (n,) its sequence in that row, counted from 0.
    """
    if sequences is None:
        return {
            name: torch.zeros(num_rows, dtype=value.dtype, device=value.device).index_add(0, rows, value)
            for name, value in values.items()
        }
    most = int(sequences.max()) + 1 if len(sequences) else 0
    places = rows * most + sequences
    return {
        name: torch.zeros(num_rows * most, dtype=value.dtype, device=value.device)
        .index_add(0, places, value)
        .view(num_rows, most)
        for name, value in values.items()
    }
