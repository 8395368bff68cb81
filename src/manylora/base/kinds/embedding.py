"""A table of rows that tokens look up: as a map of (out, in) it is (D, V), the transpose of how it lies."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional


class Embedding:
    """`nn.Embedding`: weight (V, D). Dropout does not apply to its low-rank branch, as in PEFT."""

    name = "embedding"
    maps = True
    product = False
    transposed = True
    drops_input = False
    zero_factor = "a"
    stored: Mapping[str, str] = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    stored_dims = 2

    def recognises(self, module: nn.Module) -> bool | None:
        return type(module).forward is nn.Embedding.forward if isinstance(module, nn.Embedding) else None

    def as_map(self, weight: Tensor) -> Tensor:
        return weight.t()

    def as_own(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.t()

    def out_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape
        return columns, rows

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> Mapping[str, tuple[int, ...]]:
        rows, columns = self.out_in(shape)
        return {"a": (rank, columns), "b": (rows, rank)}

    def items(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def num_items(self, x: Tensor) -> int:
        return x.numel()

    def low_rank(self, items: Tensor, a: Tensor, b: Tensor, scale: float, module: nn.Module) -> Tensor:
        """Rows of A^T looked up by token, then B; scaled as the module scales its own rows."""
        update = scale * (functional.embedding(items, a.t()) @ b.t())
        own_scale = getattr(module, "embed_scale", None)
        return update if own_scale is None else update * own_scale


EMBEDDING = Embedding()
