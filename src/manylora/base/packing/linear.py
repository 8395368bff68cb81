"""A linear layer whose frozen weight stays packed: it is unpacked for a product, and again for its gradient.

The packed tensors are frozen parameters of the module, so whoever spreads or counts parameters sees them. They move
between devices with it, but no `model.to(dtype)` casts them: a cast scale is another scale, and codes are no numbers.
The state dict names them as they are written to disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manylora.base.packing.held import held_tensors, with_tensors
from manylora.gathering import gathered
from manylora.types import Packed

PREFIX = "weight_"
"""What the names of the parameters begin with that hold the packed weight."""


class _PackedProduct(torch.autograd.Function):
    """x W^T + bias, with no dense W in the graph: the gradient of x unpacks it anew; W itself gets none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, module: PackedLinear) -> Tensor:
        # The module is kept and not its codes: they may be away when the backward comes, and others when they return.
        ctx.module, ctx.shape = module, x.shape
        return module.product(x, module.dense(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        flat = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        wants_x, wants_bias, _ = ctx.needs_input_grad
        grad_x = (flat @ ctx.module.dense(flat.dtype)).view(ctx.shape) if wants_x else None
        return grad_x, flat.sum(dim=0) if wants_bias else None, None


class PackedLinear(nn.Module):
    """`nn.Linear` on a packed weight (O, I).

    `compute_dtype` is that of the base: what the weight is unpacked to where no input says it. `.to(dtype)` changes it
    and leaves the packed tensors as they are.
    """

    transposed = False

    def __init__(self, packed: Packed, bias: Tensor | None, compute_dtype: torch.dtype):
        super().__init__()
        self.compute_dtype = compute_dtype
        self.out_features, self.in_features = packed.shape
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.packed_names: tuple[str, ...] = ()
        self.packed_weight = packed

    @property
    def packed_weight(self) -> Packed:
        """The weight in its storage format, made of the module's parameters as they are now."""
        held = [self._parameters[name] for name in self.packed_names]
        if any(own is not other for own, other in zip(held, self._held, strict=True)):
            self._keep(self._packed, held)
        return self._packed

    @packed_weight.setter
    def packed_weight(self, packed: Packed) -> None:
        for name in self.packed_names:
            del self._parameters[name]
        tensors = {PREFIX + name: tensor for name, tensor in held_tensors(packed).items()}
        self.packed_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
        self._keep(packed, [self._parameters[name] for name in self.packed_names])

    def _keep(self, packed: Packed, held: Sequence[Any]) -> None:
        """Have these parameters be what the packed weight consists of."""
        named = {name.removeprefix(PREFIX): own for name, own in zip(self.packed_names, held, strict=True)}
        self._held = tuple(held)
        self._packed = with_tensors(packed, named)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(O, I), new each time."""
        with gathered(self):
            return self.packed_weight.dense(dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight in the module's layout, for model code that reads it; new each time."""
        dense = self.dense(self.compute_dtype)
        return dense.t() if self.transposed else dense

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's own name: models may pass it by keyword
        bias = None if self.bias is None else self.bias.to(input.dtype)
        result: Tensor = _PackedProduct.apply(input, bias, self)
        return result

    @staticmethod
    def product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        """The product as the module's original computes it, so that it is the same to the bit."""
        return functional.linear(x, dense, bias)

    def twin(self) -> nn.Module:
        """The ordinary module of the same map, its parameters on the meta device."""
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias, device="meta", dtype=self.compute_dtype)

    def extra_repr(self) -> str:
        packed = self.packed_weight
        return f"{self.in_features}, {self.out_features}, {packed.format}, {packed.bits():.3f} bits a weight"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        packed = {name: self._parameters.pop(name) for name in self.packed_names}
        try:
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(packed)
        # What a move or cast does is seen on an empty tensor; of the packed ones it may change the device only.
        device = self.packed_weight.tensors()["codes"].device
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=device))
        self.compute_dtype = probe.dtype
        if probe.device != device:
            for name in self.packed_names:
                moved = _moved(self.get_parameter(name).detach(), probe.device)
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed_names:
            del destination[prefix + name]
        for name, tensor in self.packed_weight.tensors().items():
            destination[f"{prefix}weight.{name}"] = tensor if keep_vars else tensor.detach()


class PackedConv1D(PackedLinear):
    """transformers' `Conv1D` (GPT-2) on a packed weight: packed as (O, I), where the original holds (I, O)."""

    transposed = True

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] - Conv1D's own name of it
        self, x: Tensor
    ) -> Tensor:
        return super().forward(x)

    @staticmethod
    def product(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ dense.t() if bias is None else torch.addmm(bias, flat, dense.t())
        return y.view(*x.shape[:-1], y.shape[-1])

    def twin(self) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(self.out_features, self.in_features).to(self.compute_dtype)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # What has no numbers to be moved is given room for some (`to_empty`).
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def packable(module: nn.Module) -> bool:
    """Whether a module is the textbook linear map or Conv1D: a subclass may read its weight by other ways."""
    return type(module) is nn.Linear or _is_conv1d(module)


def pack_module(module: nn.Module, packed: Packed, compute_dtype: torch.dtype) -> PackedLinear:
    """The packed layer that takes the place of `module`, with its bias."""
    kind = PackedConv1D if _is_conv1d(module) else PackedLinear
    made = kind(packed, None, compute_dtype)
    made._parameters["bias"] = module._parameters.get("bias")
    return made.train(module.training)


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module at a dotted name of the model."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers costs seconds, and a plain torch model never needs it.
    return type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D"
