"""What a module computes, found by what it gives: RMS norms, gated products and rotations, whatever their class.

A form is taken for a module's if, on random input, it is as near to the exact value as the module itself, which must be
near too. So a form that rounds more often than the module does is refused, and one that rounds less is not. Each form
counts in `taken` how often it was used.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manylora.ops.elementwise import (
    ACTIVATIONS,
    DTYPES,
    Activation,
    gated,
    gated_halves,
    gated_reference,
    rotate,
    rotate_reference,
)
from manylora.ops.elementwise_norm import rms_norm, rms_norm_reference
from manylora.types import dtype_of

NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-6}
"""How far a module may be from the exact value, as a share of its norm; in float64 many narrow to float32."""
FARTHER = 1.1
"""How many times farther from the exact value than the module a form may be, beyond `ROUNDING`."""
ROUNDING = {torch.bfloat16: 1e-4, torch.float32: 1e-6, torch.float64: 1e-12}
REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, NotImplementedError)
"""What a module may raise that takes other inputs than are tried."""


@dataclass(slots=True)
class NormForm:
    """How a module normalises rows: the arguments of `rms_norm`, and whether it has a weight."""

    kind: ClassVar = "norm"
    dtype: torch.dtype
    eps: float
    weighted: bool
    add_one: bool
    round_once: bool
    taken: int = 0

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        weight = module.weight if self.weighted else None
        if x.dtype != self.dtype or (weight is not None and weight.dtype != self.dtype):
            return None
        self.taken += 1
        return rms_norm(x, weight, self.eps, add_one=self.add_one, round_once=self.round_once)


@dataclass(slots=True)
class GateForm:
    """The names of a gated product's maps; `up` None: the first map gives both halves."""

    kind: ClassVar = "gated product"
    dtype: torch.dtype
    activation: Activation
    gate: str
    up: str | None
    down: str
    gate_first: bool = True
    taken: int = 0

    def __call__(self, module: Any, x: Tensor) -> Tensor | None:
        if x.dtype != self.dtype or module.training:
            return None
        self.taken += 1
        first = getattr(module, self.gate)(x)
        if self.up is None:
            middle = gated_halves(first, self.activation, gate_first=self.gate_first)
        else:
            middle = gated(first, getattr(module, self.up)(x), self.activation)
        return getattr(module, self.down)(middle)


@dataclass(slots=True, eq=False)
class Rotation:
    """A rotation of `count` tensors in place of `own`; `proven`: (all of a head turns, the dimension of heads)."""

    kind: ClassVar = "rotation"
    own: Callable[..., Any]
    dtype: torch.dtype
    count: int
    default_dim: Any
    proven: frozenset[tuple[bool, Any]]
    taken: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != self.count + 2 or set(kwargs) - {"unsqueeze_dim"} or torch.compiler.is_compiling():
            return self.own(*args, **kwargs)
        *parts, cos, sin = args
        dim = kwargs.get("unsqueeze_dim", self.default_dim)
        fits = cos.ndim == 3 and all(part.dtype == self.dtype for part in args)
        fits = fits and all(part.ndim == 4 and (part.shape[-1] == cos.shape[-1], dim) in self.proven for part in parts)
        if not fits:
            return self.own(*args, **kwargs)
        self.taken += 1
        turned = tuple(rotate(part, cos.unsqueeze(dim), sin.unsqueeze(dim)) for part in parts)
        return turned if self.count == 2 else turned[0]


@torch.no_grad()
def find_norm(module: nn.Module) -> NormForm | None:
    """The form of a module that owns no more than a weight (W,), and gives rows over their root mean square."""
    own = dict(module.named_parameters())
    plain = not any(True for _ in module.children()) and not any(True for _ in module.buffers())
    weight = own.get("weight")
    if not plain or set(own) - {"weight"} or not _takes_one(module):
        return None
    numbers = [value for value in vars(module).values() if isinstance(value, float) and 0 < value < 0.1]
    if not numbers or (weight is not None and weight.ndim != 1):
        return None
    width = 32 if weight is None else len(weight)
    for dtype in DTYPES if weight is None else (weight.dtype,):
        if dtype not in DTYPES:
            continue
        # Small rows tell the eps, large ones that nothing else is added.
        x = _draw((6, width), dtype) * torch.tensor([1e-3, 1e-2, 0.1, 1, 1, 30], dtype=dtype)[:, None]
        made = _tried(module, x)
        for eps, add_one, once in itertools.product(numbers, (False, True), (False, True)):
            form = NormForm(dtype, eps, weight is not None, add_one, once)
            exact = rms_norm_reference(x.double(), None if weight is None else weight.double(), eps, add_one=add_one)
            if _is(made, exact, lambda form=form, x=x: form(module, x)):
                return form
    return None


@torch.no_grad()
def find_gate(module: nn.Module) -> GateForm | None:
    """The form of a module of two or three linear maps that multiplies an activated half by the other."""
    maps = {name: child for name, child in module.named_children() if _sizes(child) is not None}
    others = [child for name, child in module.named_children() if name not in maps]
    if len(maps) not in (2, 3) or any(True for child in others for _ in child.parameters()) or not _takes_one(module):
        return None
    dtype = dtype_of(module) or next((getattr(child, "compute_dtype", None) for child in maps.values()), None)
    if dtype not in DTYPES or module.training:
        return None
    made: Tensor | None = None
    for names in _roles(maps):
        x = _draw((4, _sizes(maps[names[0]])[0]), dtype)  # pyright: ignore[reportOptionalSubscript] - chosen for it
        made = _tried(module, x) if made is None else made
        given = _tried(lambda x, names=names: [maps[name](x) for name in names[:-1]], x)
        if made is None or given is None:
            return None
        for activation in ACTIVATIONS:
            for gate_first in (True, False) if len(names) == 2 else (True,):
                gate, up = given if len(names) == 3 else _split(given[0], gate_first)
                middle = gated_reference(gate.double(), up.double(), activation).to(dtype)
                form = GateForm(
                    dtype, activation, names[0], names[1] if len(names) == 3 else None, names[-1], gate_first
                )
                exact = _tried(maps[names[-1]], middle)
                if exact is not None and _is(made, exact.double(), lambda form=form, x=x: form(module, x)):
                    return form
    return None


@torch.no_grad()
def find_rotation(own: Callable[..., Any], dtype: torch.dtype) -> Rotation | None:
    """What rotates in place of transformers' `apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)`, or of one tensor's.

    It calls `own` for what it has not been shown to do.
    """
    try:
        taken = inspect.signature(own).parameters
    except (TypeError, ValueError):
        return None
    count = next((count for count in (1, 2) if list(taken)[count : count + 2] == ["cos", "sin"]), None)
    if count is None or "unsqueeze_dim" not in taken or dtype not in DTYPES:
        return None
    ways = itertools.product((True, False), (1, 2))
    proven = frozenset((whole, dim) for whole, dim in ways if _rotates(own, count, whole, dim, dtype))
    return Rotation(own, dtype, count, taken["unsqueeze_dim"].default, proven) if proven else None


def _rotates(own: Callable[..., Any], count: int, whole: bool, dim: int, dtype: torch.dtype) -> bool:
    shapes = [(2, 3, 5, 16), (2, 1, 5, 16)] if dim == 1 else [(2, 5, 3, 16), (2, 5, 1, 16)]
    parts = [_draw(shape, dtype, seed) for seed, shape in enumerate(shapes[:count])]
    angles = _draw((2, 5, 8 if whole else 4), torch.float64, 9)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    made = _tried(lambda *_: own(*parts, cos, sin, unsqueeze_dim=dim), cos)
    made = (made,) if count == 1 else made
    if not isinstance(made, tuple) or len(made) != count:
        return False
    near = []
    for part, found in zip(parts, made, strict=True):
        given = part, cos.unsqueeze(dim), sin.unsqueeze(dim)
        exact = rotate_reference(*(tensor.double() for tensor in given))
        near.append(_is(found, exact, lambda given=given: rotate(*given)))
    return all(near)


def _is(made: Any, exact: Tensor, form: Callable[[], Tensor | None]) -> bool:
    """Whether a form is as near to the exact value as what a module made, and that is near."""
    if not isinstance(made, Tensor) or made.shape != exact.shape or made.dtype not in NEAR:
        return False
    own = _distance(made, exact)
    if not own <= NEAR[made.dtype]:
        return False
    ours = form()
    if ours is None or ours.dtype != made.dtype or ours.shape != made.shape:
        return False
    return _distance(ours, exact) <= FARTHER * own + ROUNDING[made.dtype]


def _distance(made: Tensor, exact: Tensor) -> float:
    """The largest over rows: a row of another size hides in the norm of all."""
    apart = (made.double() - exact).flatten(0, -2).norm(dim=-1)
    return float((apart / exact.flatten(0, -2).norm(dim=-1).clamp_min(1e-300)).max())


def _tried(call: Callable[..., Any], x: Tensor) -> Any:
    """What it gives; None where it wants something else."""
    try:
        return call(x)
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return None


def _takes_one(module: nn.Module) -> bool:
    """Whether a forward can be called with one tensor and with nothing else."""
    given = [
        part
        for part in inspect.signature(type(module).forward).parameters.values()
        if part.kind not in (part.VAR_KEYWORD, part.VAR_POSITIONAL)
    ]
    return len(given) == 2 and "forward" not in vars(module)  # with self


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear map, however it stores its weight."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # pyright: ignore[reportReturnType]


def _roles(maps: dict[str, nn.Module]) -> Iterator[Sequence[str]]:
    """Which map may be the gate (and the other factor's), and which the one behind them."""
    for names in itertools.permutations(maps):
        sizes = [_sizes(maps[name]) for name in names]
        (inputs, outputs), (behind, back) = sizes[0], sizes[-1]  # pyright: ignore[reportGeneralTypeIssues]
        if len(names) == 3 and sizes[1] == (inputs, outputs) and (behind, back) == (outputs, inputs):
            yield names
        if len(names) == 2 and outputs == 2 * behind and back == inputs:
            yield names


def _split(both: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
