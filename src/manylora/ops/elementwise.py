"""The element-wise parts of a transformer in few passes over memory: rotary embedding and gated product.

Each has a plain reference that autograd differentiates, and a form in use: one `autograd.Function` of torch's own CPU
kernels, which need no compiler. For backward a rotation keeps nothing but cosines and sines, and a gated product its
two factors. Gradients can be taken once. On other devices, in other dtypes and in traced calls the form in use is the
reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
"""What the kernels take; the numbers of a row are of float32 or better."""
ELEMENTS_IN_CACHE = 1 << 19
"""Elements that are turned at one time: the second and third pass find them in the cache, which takes half off where
all are some MB; of fewer the joins of threads show. Measured: bench/elementwise.py."""

FEW = 1 << 15
"""Elements of the last tokens of rows below which calls cost more than passes over memory, while text is written."""

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


# -- rotary embedding --------------------------------------------------------------------------------------------------


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., D) turned in plain autograd by angles whose cosines and sines (..., R) broadcast to it; R is even.

    Of the first R numbers the first half is paired with the second; what is beyond R stays.

    Semantics: `[x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, rest]`.
    Source: Su et al., "RoFormer", 2021, section 3.4.2, in the pairing of GPT-NeoX.
    """
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    made = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([made, rest], dim=-1) if rest.shape[-1] else made


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotate_reference` gives, fast, where neither cosines nor sines want a gradient."""
    if few(x) or not usable(x, cos, sin) or cos.requires_grad or sin.requires_grad:
        return rotate_reference(x, cos, sin)
    result: Tensor = _Rotate.apply(x, cos, sin)
    return result


class _Rotate(torch.autograd.Function):
    """Saves cosines and sines only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = sin.shape[-1] // 2
        return _turned(x, cos, sin[..., :half], sin[..., half:], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = sin.shape[-1] // 2
        return _turned(grad_outputs[0], cos, sin[..., half:], sin[..., :half], 1), None, None


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """`[x1 * cos1 + sign * x2 * first, x2 * cos2 - sign * x1 * second, rest]`, laid out as x."""
    made = torch.empty_like(x)
    width = cos.shape[-1]
    half = width // 2
    cos, first, second = (part[(None,) * (x.ndim - part.ndim)] for part in (cos, first, second))
    for into, part, cosines, of_second, of_first in _pieces(made, x, cos, first, second):
        torch.mul(part[..., :width], cosines, out=into[..., :width])
        into[..., :half].addcmul_(part[..., half:width], of_second, value=sign)
        into[..., half:width].addcmul_(part[..., :half], of_first, value=-sign)
        if width < x.shape[-1]:
            into[..., width:] = part[..., width:]
    return made


def _pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same parts of each, as they lie in x, of about `ELEMENTS_IN_CACHE`; others broadcast."""
    if x.numel() <= ELEMENTS_IN_CACHE:
        yield x, *others
        return
    dim = next((dim for dim in memory_order(x)[:-1] if x.shape[dim] > 1), None)
    if dim is None:
        yield x, *others
        return
    size = max(1, x.shape[dim] * ELEMENTS_IN_CACHE // x.numel())
    for start in range(0, x.shape[dim], size):
        length = min(size, x.shape[dim] - start)
        yield from _pieces(
            *(part if part.shape[dim] == 1 else part.narrow(dim, start, length) for part in (x, *others))
        )


# -- gated product -----------------------------------------------------------------------------------------------------


def gated_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` in plain autograd.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, section 2.
    """
    return ACTIVATIONS[activation](gate) * up


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """What `gated_reference` gives; keeps its two factors, and computes the activation again in backward."""
    if few(gate) or not usable(gate, up) or gate.shape != up.shape:
        return gated_reference(gate, up, activation)
    result: Tensor = _Gated.apply(gate, up, activation)
    return result


def gated_halves(both: Tensor, activation: Activation, *, gate_first: bool = True) -> Tensor:
    """`gated` of the halves of (..., 2H), whose gradient comes in one piece."""
    if few(both) or not usable(both):
        return gated_reference(*_halves(both, gate_first), activation)
    result: Tensor = _GatedHalves.apply(both, activation, gate_first)
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ACTIVATIONS[activation](gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        _gated_gradients(grad_outputs[0], gate, up, ctx.activation, of_gate, of_up)
        return of_gate, of_up, None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation, gate_first: bool) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation, ctx.gate_first = activation, gate_first
        gate, up = _halves(both, gate_first)
        return ACTIVATIONS[activation](gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (both,) = ctx.saved_tensors
        of_both = torch.empty_like(both)
        pairs = _halves(both, ctx.gate_first), _halves(of_both, ctx.gate_first)
        _gated_gradients(grad_outputs[0], *pairs[0], ctx.activation, *pairs[1])
        return of_both, None, None


def _halves(both: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, activation: Activation, of_gate: Tensor, of_up: Tensor
) -> None:
    """Write the gradients of gate and up."""
    aten = torch.ops.aten
    if activation == "silu":
        aten.silu.out(gate, out=of_up).mul_(grad)
        torch.mul(grad, up, out=of_gate)
        aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
    else:
        form = "tanh" if activation == "gelu_tanh" else "none"
        aten.gelu.out(gate, approximate=form, out=of_up).mul_(grad)
        torch.mul(grad, up, out=of_gate)
        aten.gelu_backward.grad_input(of_gate, gate, approximate=form, grad_input=of_gate)


# -- where the kernels run ---------------------------------------------------------------------------------------------


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, of one known dtype, not empty, and in no traced call."""
    first = tensors[0]
    return (
        all(part.device.type == "cpu" and part.dtype == first.dtype and part.numel() > 0 for part in tensors)
        and first.dtype in DTYPES
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
    )


def few(x: Tensor) -> bool:
    """Whether it is one token a row, of few rows, without a gradient: the plain form then has fewer calls."""
    return x.dim() > 2 and x.shape[-2] == 1 and x.numel() <= FEW and not torch.is_grad_enabled()


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the last one kept last: rows may come in any order, copies cost."""
    return [*sorted(range(x.ndim - 1), key=lambda dim: -x.stride(dim)), x.ndim - 1]
