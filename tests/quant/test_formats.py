"""What every storage format keeps, whichever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manylora import quant
from manylora.errors import BaseBroken, ConfigError, UnknownName
from manylora.quant import PACKINGS, PackError, groups, kernels, plain
from manylora.types import Packed

Case = tuple[str, dict[str, Any]]
SHAPES = [(1, 1), (1, 2), (3, 5), (7, 64), (5, 96), (64, 33), (40, 256), (1, 4099)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero too, shape and dtype too."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    )


def equal(first: Packed, second: Packed) -> bool:
    a, b = first.tensors(), second.tensors()
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a) and first.settings() == second.settings()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_comes_back_from_safetensors(case: Case, shape: tuple[int, int]) -> None:
    name, options = case
    packed = quant.pack(normal(*shape), name, **options)
    tensors = safetensors.torch.load(safetensors.torch.save(packed.tensors()))
    again = quant.from_tensors(tensors, json.loads(json.dumps(packed.settings())))
    assert equal(packed, again)
    assert again.shape == shape
    assert same(again.dense(torch.float32), packed.dense(torch.float32))
    assert (again.format, again.nbytes(), again.bits()) == (packed.format, packed.nbytes(), packed.bits())


@pytest.mark.parametrize("shape", [(7, 64), (5, 96), (64, 33), (40, 256)])
def test_packing_the_dense_weight_changes_nothing(case: Case, shape: tuple[int, int]) -> None:
    name, options = case
    packed = quant.pack(normal(*shape, seed=3), name, **options)
    dense = packed.dense(torch.float32)
    again = quant.pack(dense, name, **options)
    # FP4 has two codes of zero, and only one of them is given to zero itself.
    if name != "fp4":
        assert same(again.tensors()["codes"], packed.tensors()["codes"])
    if not options.get("double_quant", name in ("nf4", "fp4")):
        torch.testing.assert_close(again.dense(torch.float32), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_dense_weight_is_rounded_once_from_float32(case: Case, shape: tuple[int, int], dtype: torch.dtype) -> None:
    name, options = case
    packed = quant.pack(normal(*shape), name, **options)
    dense = packed.dense(dtype)
    assert dense.is_contiguous()
    assert same(dense, packed.dense(torch.float32).to(dtype))
    assert dense.data_ptr() != packed.dense(dtype).data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_of_a_weight_does_not_change_its_codes(case: Case, dtype: torch.dtype) -> None:
    name, options = case
    weight = normal(24, 80, dtype=dtype)
    packed, expected = quant.pack(weight, name, **options), quant.pack(weight.float(), name, **options)
    tensors, wanted = packed.tensors(), expected.tensors()
    assert all(same(tensors[key], wanted[key]) for key in wanted)


def test_packing_reads_any_layout_and_leaves_the_weight_alone(case: Case) -> None:
    name, options = case
    weight = normal(96, 70).t().requires_grad_()
    before = weight.detach().clone()
    packed = quant.pack(weight, name, **options)
    assert equal(packed, quant.pack(before.contiguous(), name, **options))
    assert equal(packed, quant.pack(normal(96, 140)[:, ::2].copy_(before.t()).t(), name, **options))
    assert same(weight.detach(), before)
    assert not any(tensor.requires_grad for tensor in packed.tensors().values())
    assert not packed.dense(torch.float32).requires_grad


def test_every_tensor_moves_with_the_packed_weight(case: Case) -> None:
    name, options = case
    packed = quant.pack(normal(6, 128), name, **options)
    moved = packed.to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
    assert {tensor.device.type for tensor in packed.tensors().values()} == {"cpu"}
    assert (moved.settings(), moved.nbytes()) == (packed.settings(), packed.nbytes())
    assert equal(packed.to("cpu"), packed)


@pytest.mark.parametrize("kernel", [True, False])
def test_what_scratch_memory_held_before_has_no_effect(
    case: Case, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = case
    if not kernel:
        monkeypatch.setattr(kernels, "runs", lambda *_: False)
    weight = normal(9, 77)
    expected = quant.pack(weight, name, **options)
    dense = {dtype: expected.dense(dtype) for dtype in (torch.float32, torch.bfloat16)}
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan if made.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", filled)
    packed = quant.pack(weight, name, **options)
    assert equal(packed, expected)
    assert all(same(packed.dense(dtype), dense[dtype]) for dtype in dense)


def test_chunks_do_not_show(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = case
    monkeypatch.setattr(kernels, "runs", lambda *_: False)
    weight = normal(37, 161)
    packed = quant.pack(weight, name, **options)
    dense = packed.dense(torch.bfloat16)
    for module in (plain, groups):
        monkeypatch.setattr(module, "CHUNK", 700)
    assert equal(quant.pack(weight, name, **options), packed)
    assert same(packed.dense(torch.bfloat16), dense)


def test_a_context_for_making_models_does_not_reach_the_tables(case: Case) -> None:
    name, options = case
    weight = normal(5, 96)
    expected = quant.pack(weight, name, **options)
    dense = expected.dense(torch.float32)
    for module in (quant.codebooks, quant.int4):  # type: ignore[attr-defined]
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert equal(quant.pack(weight, name, **options), expected)
            again = quant.from_tensors(expected.tensors(), expected.settings())
            assert same(again.dense(torch.float32), dense)
    finally:
        torch.set_default_dtype(torch.float32)


class Largest(TorchDispatchMode):
    """The number of values of the largest float32 tensor that any operation gives."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.count = max(self.count, leaf.numel())
        return out


@pytest.mark.parametrize("kernel", [True, False])
def test_a_large_weight_is_packed_and_made_dense_in_chunks(
    case: Case, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = case
    if not kernel:
        monkeypatch.setattr(kernels, "runs", lambda *_: False)
    weight = torch.zeros(2100, 2048, dtype=torch.bfloat16)
    weight[0, 0] = 1.0
    quant.backend("cpu")
    with Largest() as largest:
        quant.pack(weight, name, **options).dense(torch.bfloat16)
    assert 0 < largest.count <= plain.CHUNK


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("nf4", {}, 4 + 8 / 64 + 32 / (64 * 256)),
        ("nf4", {"double_quant": False}, 4.5),
        ("fp4", {"block": 128}, 4 + 8 / 128 + 32 / (128 * 256)),
        ("int8", {}, 8 + 32 / 512),
        ("int8", {"block": 64}, 8.5),
        ("int4", {}, 4.5),
        ("int4", {"symmetric": True}, 4.25),
    ],
)
def test_bits_per_weight_are_exact(name: str, options: dict[str, Any], bits: float) -> None:
    packed = quant.pack(normal(64 * 3, 512), name, **options)
    assert packed.bits() == bits
    assert packed.nbytes() == bits * packed.shape[0] * packed.shape[1] / 8


def test_unfolded_scales_cost_memory_and_change_no_value(case: Case) -> None:
    name, options = case
    packed = quant.pack(normal(50, 96), name, **options)
    unfolded = quant.unfold(packed)
    blocks = -(-50 * 96 // options.get("block", 64))
    extra = 4 * blocks if packed.settings().get("double_quant") else 0
    assert unfolded.nbytes() == packed.nbytes() + extra
    assert (unfolded is packed) == (extra == 0)
    assert equal(unfolded, packed)
    assert unfolded.bits() == packed.bits()
    assert same(unfolded.dense(torch.float32), packed.dense(torch.float32))
    assert quant.unfold(unfolded) is unfolded


def test_an_unknown_format_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"no storage format is called 'nf5'\n  nearest: nf4"):
        quant.pack(normal(2, 2), "nf5")
    with pytest.raises(UnknownName, match="no storage format is called 'None'"):
        quant.from_tensors({}, {})


def test_an_unknown_option_is_refused_with_the_nearest(case: Case) -> None:
    name, _ = case
    with pytest.raises(UnknownName, match=rf"{name} has no option called 'blocks'\n  nearest: block"):
        quant.pack(normal(2, 2), name, blocks=64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nf4", {"block": 48}),
        ("nf4", {"block": True}),
        ("fp4", {"block": "64"}),
        ("nf4", {"double_quant": 1}),
        ("int8", {"block": 0}),
        ("int8", {"block": 2.0}),
        ("int4", {"block": -1}),
        ("int4", {"block": None}),
        ("int4", {"symmetric": "yes"}),
    ],
)
def test_an_option_out_of_range_is_refused(name: str, options: dict[str, Any]) -> None:
    option, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{option} of {name} is {value!r}\n  allowed: "):
        quant.pack(normal(2, 64), name, **options)


@pytest.mark.parametrize("name", list(PACKINGS))
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.zeros(4), r"a weight of shape \(4\)\n  allowed: 2-D"),
        (torch.zeros(4, 2, 2), r"a weight of shape \(4, 2, 2\)"),
        (torch.zeros(4, 0), r"shape \(4, 0\): it holds no value"),
        (torch.zeros(0, 4), r"shape \(0, 4\): it holds no value"),
        (torch.zeros(2, 2, dtype=torch.int64), "dtype int64\n  allowed: float64, float32"),
        (torch.zeros(2, 2, dtype=torch.float8_e4m3fn), "dtype float8_e4m3fn"),
        (torch.zeros(2, 2, device="meta"), "meta device"),
    ],
)
def test_a_weight_that_no_format_can_store_is_refused(name: str, weight: torch.Tensor, words: str) -> None:
    with pytest.raises(PackError, match=words):
        quant.pack(weight, name)


@pytest.mark.parametrize("place", [(0, 0), (3, 17), (8, 70)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_with_its_place(
    case: Case, place: tuple[int, int], value: float, dtype: torch.dtype
) -> None:
    name, options = case
    weight = normal(9, 71, dtype=dtype)
    weight[place] = value
    weight[8, 70] = value
    with pytest.raises(PackError, match=rf"holds {value} in row {place[0]}, column {place[1]};"):
        quant.pack(weight, name, **options)


def test_a_float64_value_that_float32_cannot_hold_is_refused(case: Case) -> None:
    name, options = case
    weight = normal(3, 64, dtype=torch.float64)
    weight[1, 2] = 1e39
    with pytest.raises(PackError, match=r"holds 1e\+39 in row 1, column 2, beyond float32's 3\.403e\+38"):
        quant.pack(weight, name, **options)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_affine_format_refuses_magnitudes_whose_range_overflows(name: str) -> None:
    assert quant.pack(torch.tensor([[2.0**126, -(2.0**126)]]), name).dense(torch.float32).isfinite().all()
    with pytest.raises(PackError, match=r"magnitude 1e\+38; int. stores magnitudes up to 8\.507e\+37"):
        quant.pack(torch.tensor([[1e38, 0.0]]), name)


def test_a_dtype_that_no_weight_is_made_dense_in_is_refused(case: Case) -> None:
    name, options = case
    with pytest.raises(ConfigError, match="cannot be made dense in int8\n  allowed: float64, float32"):
        quant.pack(normal(2, 64), name, **options).dense(torch.int8)


def test_every_tensor_and_setting_is_needed_and_no_other_is_taken(case: Case) -> None:
    name, options = case
    packed = quant.pack(normal(6, 70), name, **options)
    tensors, settings = packed.tensors(), packed.settings()
    for key, tensor in tensors.items():
        with pytest.raises(BaseBroken, match=f"has no tensor '{key}'"):
            quant.from_tensors({other: value for other, value in tensors.items() if other != key}, settings)
        with pytest.raises(BaseBroken, match=f"tensor '{key}' of the {name} weight is"):
            quant.from_tensors({**tensors, key: tensor[:-1]}, settings)
        with pytest.raises(BaseBroken, match=f"tensor '{key}' of the {name} weight is float64"):
            quant.from_tensors({**tensors, key: tensor.double()}, settings)
    for key in settings.keys() - {"format"}:
        with pytest.raises(BaseBroken, match=f"has no setting '{key}'"):
            quant.from_tensors(tensors, {other: value for other, value in settings.items() if other != key})
        with pytest.raises(BaseBroken, match=f"setting '{key}' of the {name} weight is"):
            quant.from_tensors(tensors, {**settings, key: {}})
    with pytest.raises(BaseBroken, match="holds what this format does not: tensor 'bias', setting 'scale'"):
        quant.from_tensors({**tensors, "bias": torch.zeros(1)}, {**settings, "scale": 1})
    with pytest.raises(BaseBroken, match="is stored as"):
        PACKINGS.get(name).from_tensors(tensors, {**settings, "format": "other"})


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("nf4", {"shape": [6, 71]}, "tensor 'codes' of the nf4 weight is uint8"),
        ("nf4", {"shape": [6]}, "setting 'shape' of the nf4 weight is .6."),
        ("nf4", {"shape": [0, 4]}, "setting 'shape'"),
        ("nf4", {"block": 48}, "setting 'block' of the nf4 weight is 48\n  allowed: 32, 64"),
        ("nf4", {"dtype": "float8"}, "setting 'dtype'"),
        ("nf4", {"nested_block": 64}, "setting 'nested_block'"),
        ("nf4", {"nested_offset": float("nan")}, "setting 'nested_offset'"),
        ("int8", {"block": 0}, "setting 'block' of the int8 weight is 0"),
        ("int8", {"block": True}, "setting 'block' of the int8 weight is True"),
        ("int4", {"block": 0}, "setting 'block' of the int4 weight is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name: str, change: dict[str, Any], words: str) -> None:
    packed = quant.pack(normal(6, 70), name)
    with pytest.raises(BaseBroken, match=words):
        quant.from_tensors(packed.tensors(), packed.settings() | change)


def test_scales_that_cannot_be_are_refused() -> None:
    int8, nf4, fp4 = (quant.pack(normal(6, 64), name) for name in ("int8", "nf4", "fp4"))
    for bad, words in ((0.0, "not positive"), (-1.0, "not positive"), (torch.nan, "not finite")):
        with pytest.raises(BaseBroken, match=words):
            quant.from_tensors({**int8.tensors(), "inverse_step": torch.full((6, 1), bad)}, int8.settings())
    with pytest.raises(BaseBroken, match=r"quant_map of the nf4 weight is not nf4's: 0, 0\.005208"):
        quant.from_tensors({**nf4.tensors(), "quant_map": fp4.tensors()["quant_map"]}, nf4.settings())
