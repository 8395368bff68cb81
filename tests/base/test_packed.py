"""The packed linear layer: the products of the dense one to the bit, and no dense weight that outlives them."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.base.frozen import FrozenModel
from manylora.base.packing.held import held_tensors
from manylora.base.packing.linear import PackedLinear, pack_module, put_module
from manylora.quant import PACKINGS
from manylora.types import dense_parameters

ROWS, COLUMNS = 96, 64
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(COLUMNS, ROWS),
    "linear without bias": lambda: nn.Linear(COLUMNS, ROWS, bias=False),
    "conv1d": lambda: Conv1D(ROWS, COLUMNS),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def pair(kind: str, name: str, dtype: torch.dtype) -> tuple[PackedLinear, nn.Module]:
    """A packed module, and the ordinary one with the dense weight of its codes."""
    torch.manual_seed(2)
    plain = MODULES[kind]().to(dtype).requires_grad_(False)
    if kind == "conv1d":
        nn.init.normal_(plain.bias)
    weight = plain.weight.t().contiguous() if kind == "conv1d" else plain.weight
    packed = PACKINGS.get(name).pack(weight.detach())
    module = pack_module(plain, packed, dtype)
    dense = packed.dense(dtype)
    plain.weight = nn.Parameter(dense.t() if kind == "conv1d" else dense, requires_grad=False)
    return module, plain


def product(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for a fixed random direction."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(y.dtype)
    y.backward(direction)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", list(MODULES))
@pytest.mark.parametrize("name", list(PACKINGS))
def test_output_and_gradient_are_those_of_the_dense_weight_to_the_bit(name: str, kind: str, dtype: torch.dtype) -> None:
    module, plain = pair(kind, name, dtype)
    x = torch.randn(3, 5, COLUMNS, dtype=dtype)
    (y, grad), (want, want_grad) = product(module, x), product(plain, x)
    assert torch.equal(y, want)
    assert torch.equal(grad, want_grad)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(y.dtype)
    dense = module.packed_weight.dense(dtype)
    assert torch.equal(grad, (direction.reshape(-1, ROWS) @ dense).view(x.shape))


@pytest.mark.parametrize("kind", list(MODULES))
def test_the_bias_gets_its_gradient_where_it_is_trained(kind: str) -> None:
    module, plain = pair(kind, "int8", torch.float64)
    if module.bias is None:
        return
    x = torch.randn(4, COLUMNS, dtype=torch.float64)
    for one in (module, plain):
        one.bias.requires_grad_()
        product(one, x)
    torch.testing.assert_close(module.bias.grad, plain.bias.grad)


def saved_shapes(module: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes that the graph keeps for its backward."""
    seen: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x.clone().requires_grad_())
    return seen


@pytest.mark.parametrize("name", list(PACKINGS))
def test_no_dense_weight_outlives_a_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, plain = pair("linear", name, torch.float32)
    x = torch.randn(4, COLUMNS)
    big = {(ROWS, COLUMNS), (COLUMNS, ROWS)}
    assert big & set(saved_shapes(plain, x)), "the dense layer keeps its weight, or this test sees nothing"
    assert not big & set(saved_shapes(module, x))

    made: list[weakref.ref[Tensor]] = []
    unpack = type(module.packed_weight).dense

    def watched(self: object, dtype: torch.dtype) -> Tensor:
        dense = unpack(self, dtype)  # pyright: ignore[reportArgumentType]
        made.append(weakref.ref(dense))
        return dense

    monkeypatch.setattr(type(module.packed_weight), "dense", watched)
    y = module(x.requires_grad_())
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None, "a dense weight lives on after the forward"
    y.sum().backward()
    del y
    gc.collect()
    assert len(made) == 2
    assert made[1]() is None, "a dense weight lives on after the backward"


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
@pytest.mark.parametrize("name", list(PACKINGS))
def test_a_cast_of_the_model_changes_no_packed_tensor(name: str, cast: Callable[[nn.Module], nn.Module]) -> None:
    module, _ = pair("linear", name, torch.float32)
    before = {key: value.clone() for key, value in module.packed_weight.tensors().items()}
    cast(nn.Sequential(module))
    after = module.packed_weight.tensors()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)
    assert module.compute_dtype == module.bias.dtype != torch.float32
    assert module.weight.dtype == module.compute_dtype


@pytest.mark.parametrize("name", list(PACKINGS))
def test_packed_tensors_are_frozen_parameters_that_a_move_takes_along_as_they_are(name: str) -> None:
    module, _ = pair("linear", name, torch.float32)
    own = dict(module.named_parameters())
    assert {"bias", "weight_codes"} < own.keys()
    assert own["weight_codes"].dtype in (torch.uint8, torch.int8)
    assert not any(parameter.requires_grad for parameter in own.values())
    assert "weight_codes" not in dense_parameters(module)
    for key, tensor in held_tensors(module.packed_weight).items():
        assert tensor is own[f"weight_{key}"]
    module.to(torch.float64)
    assert all(value is own[key] for key, value in module.named_parameters())
    module.to("meta", torch.bfloat16)
    assert all(value.is_meta for value in module.parameters())
    assert module.packed_weight.tensors()["codes"].is_meta
    dtypes = {key: value.dtype for key, value in own.items()}
    assert {key: value.dtype for key, value in module.named_parameters()} == {**dtypes, "bias": torch.bfloat16}
    module.to_empty(device="cpu")
    assert {key: value.shape for key, value in module.named_parameters()} == {k: v.shape for k, v in own.items()}


def test_a_product_is_that_of_the_parameters_that_stand_there_now() -> None:
    """Whoever spreads the codes over devices puts other parameters in their place, also between the two passes."""
    module, _ = pair("linear", "int8", torch.float32)
    other, _ = pair("linear", "int8", torch.float32)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    y = module(x)
    held = module.packed_weight.tensors()["codes"]
    module._parameters["weight_codes"] = nn.Parameter(held.clone(), requires_grad=False)
    held.zero_()
    y.sum().backward()
    want = x.detach().clone().requires_grad_()
    other(want).sum().backward()
    assert torch.equal(x.grad, want.grad)
    assert torch.equal(module(x), other(x))


def test_a_copy_of_the_model_is_its_own() -> None:
    module, _ = pair("linear", "int8", torch.float32)
    other = copy.deepcopy(module)
    x = torch.randn(2, COLUMNS)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("kind", list(MODULES))
def test_a_packed_site_says_what_the_dense_one_would(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, plain = pair(kind, "int8", torch.float32)
    packed = FrozenModel(nn.Sequential(module)).sites["0"]
    dense = FrozenModel(nn.Sequential(plain)).sites["0"]
    assert packed.plain
    assert dense.plain
    assert packed.kind == dense.kind
    assert torch.equal(packed.weight(), dense.weight())
    assert packed.weight(torch.float64).dtype == torch.float64
    assert packed.parameters().keys() == dense.parameters().keys()
    for name, value in dense.parameters().items():
        assert torch.equal(packed.parameters()[name], value)
    assert packed.num_parameters() == dense.num_parameters()
    assert FrozenModel(nn.Sequential(module)).num_parameters() == dense.num_parameters()

    def refuse(*_: object) -> Tensor:
        raise AssertionError("unpacked")

    monkeypatch.setattr(type(module.packed_weight), "dense", refuse)
    assert packed.out_in == dense.out_in == (ROWS, COLUMNS)
    assert packed.shapes() == dense.shapes()
    assert packed.num_parameters() == ROWS * COLUMNS + (ROWS if module.bias is not None else 0)


def test_the_state_dict_names_the_packed_tensors_and_the_fingerprint_counts_them() -> None:
    module, _ = pair("linear", "int8", torch.float32)
    model = nn.Sequential(module)
    names = list(model.state_dict())
    assert names[0] == "0.bias"
    assert set(names[1:]) == {f"0.weight.{part}" for part in module.packed_weight.tensors()}
    first = FrozenModel(model).fingerprint
    assert FrozenModel(copy.deepcopy(model)).fingerprint == first
    codes = module.packed_weight.tensors()["codes"]
    codes.view(-1)[0] ^= 1
    assert FrozenModel(model).fingerprint != first


def test_a_module_is_put_at_its_name() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))})
    made = nn.Identity()
    put_module(model, "a.1", made)
    assert model["a"][1] is made
