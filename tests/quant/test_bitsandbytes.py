"""nf4 and fp4 beside bitsandbytes: the same bytes, and checkpoints that either writes open in the other."""

from __future__ import annotations

import importlib

import pytest
import safetensors.torch
import torch

from manylora import quant
from manylora.errors import BaseBroken
from manylora.quant import kernels, plain
from manylora.quant.bitsandbytes_names import from_bitsandbytes, packed_weights, to_bitsandbytes
from manylora.quant.codebooks import codebook, nested_values
from manylora.quant.four_bit import BLOCKS, FourBit, FourBitFormat
from manylora.quant.nested import Nested

pytest.importorskip("bitsandbytes", exc_type=ImportError)
kernels._import()
functional = importlib.import_module("bitsandbytes.functional")
modules = importlib.import_module("bitsandbytes.nn.modules")

CPU = torch.device("cpu")
NAMES = ("nf4", "fp4")
ODD_SHAPES = [(1, 1), (1, 7), (3, 5), (5, 63), (9, 65), (17, 31), (33, 129), (100, 77), (257, 255)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal to the bit, the sign of zero too, shape and dtype too."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))
    )


def pack(weight: torch.Tensor, name: str, **options: object) -> FourBit:
    return FourBitFormat(name).pack(weight, **options)


def check(weight: torch.Tensor, name: str, block: int = 64) -> None:
    """Ours and bitsandbytes' bytes of one weight, with and without double quantisation."""
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=name)
    ours = pack(weight, name, block=block, double_quant=False)
    assert same(ours.codes, codes.flatten())
    assert same(ours.scales(), state.absmax)
    codes, state = functional.quantize_4bit(weight, blocksize=block, quant_type=name, compress_statistics=True)
    ours = pack(weight, name, block=block)
    assert ours.nested is not None
    assert same(ours.codes, codes.flatten())
    assert same(ours.nested.codes, state.absmax)
    assert same(ours.nested.absmax, state.state2.absmax)
    assert ours.nested.offset == state.offset.item()


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_are_those_of_bitsandbytes(name: str) -> None:
    assert same(codebook(name, CPU).values, functional.get_4bit_type(name, device="cpu"))
    assert same(nested_values(CPU), functional.create_dynamic_map())


@pytest.mark.parametrize("name", NAMES)
def test_every_size_of_the_last_block_gives_the_same_bytes(name: str) -> None:
    for size in range(1, 131):
        check(normal(1, size, seed=size), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (600, 1024)])
@pytest.mark.parametrize("name", NAMES)
def test_every_shape_and_dtype_gives_the_same_bytes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(normal(*shape, dtype=dtype), name)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", NAMES)
def test_every_block_gives_the_same_bytes(name: str, block: int) -> None:
    check(normal(67, 129), name, block)
    check(normal(8, 8192), name, block)


@pytest.mark.parametrize("name", NAMES)
def test_values_at_and_beside_every_midpoint_give_the_same_bytes(name: str) -> None:
    ascending = codebook(name, CPU).values.sort().values
    middle = (ascending[:-1] + ascending[1:]) / 2
    above, below = (middle.nextafter(torch.tensor(edge)) for edge in (2.0, -2.0))
    grid = torch.linspace(-1, 1, 63 * 999)
    values = torch.cat([middle, above, below, ascending, torch.tensor([0.0, -0.0]), grid])
    values = torch.nn.functional.pad(values, (0, -len(values) % 63)).view(-1, 63)
    for largest in (1.0, -1.0, 3.3, 1e-3):
        weight = torch.cat([values * abs(largest), torch.full((len(values), 1), largest)], dim=1)
        check(weight, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_last_block_is_divided_and_a_whole_one_multiplied(name: str) -> None:
    ascending = codebook(name, CPU).values.sort().values
    middle = (ascending[:-1] + ascending[1:]) / 2
    for largest in normal(60).abs() + 0.1:
        rest = torch.cat([middle * largest, largest.view(1)])
        check(rest.view(1, -1), name)
        check(torch.cat([rest, rest, rest, rest]).view(1, -1), name)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_denormals_and_the_largest_numbers_give_the_same_bytes(name: str) -> None:
    weight = normal(40, 100)
    weight[3:9] = 0.0
    weight[5] = -0.0
    check(weight, name)
    for weight in (torch.zeros(4, 64), torch.zeros(3, 67), -torch.zeros(2, 33)):
        check(weight, name)
    for scale in (1e-30, 1e-37, 1e-38, 1e-39, 1e-40, 1e-44, 8e37):
        # The largest at most 4: beyond float32 nothing is packed.
        check(normal(200, 99).clamp(-4, 4) * scale, name)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-37, 1e-39, 1e-41, 1e30])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 255, 256, 257, 511, 40_000])
def test_quantised_scales_are_those_of_bitsandbytes(count: int, scale: float) -> None:
    scales = normal(count, seed=count).abs() * scale
    mean = scales.mean()
    codes, state = functional.quantize_blockwise(scales - mean, blocksize=256)
    nested = Nested.fold(scales)
    assert same(nested.codes, codes)
    assert same(nested.absmax, state.absmax)
    assert nested.offset == mean.item()
    expected = functional.dequantize_blockwise(codes, state)
    expected += mean
    assert same(nested.unfold(), expected)


def test_scales_at_the_edge_of_every_cell_are_rounded_as_in_bitsandbytes() -> None:
    edges = (torch.arange(65536).float() - 0.5) / 65535 * 2 - 1
    values = torch.cat([edges, *(edges.nextafter(torch.tensor(side)) for side in (2.0, -2.0))]).clamp(-1, 1)
    values = torch.nn.functional.pad(values, (0, -len(values) % 254)).view(-1, 254)
    # A mean of zero, so that nothing moves: every row beside its negative.
    scales = torch.cat([values, torch.ones(len(values), 1), -torch.ones(len(values), 1)], dim=1)
    scales = torch.cat([scales, -scales]).flatten()
    codes, _ = functional.quantize_blockwise(scales - scales.mean(), blocksize=256)
    assert same(Nested.fold(scales).codes, codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (3, 96), (5, 32), (6, 160), (64, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_gives_the_bits_of_the_reference(
    name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quant.backend("cpu")[0] != "bitsandbytes":
        pytest.skip(quant.backend("cpu")[1])
    for block in (32, 64, 256):
        packed = pack(normal(*shape), name, block=block)
        found = packed.dense(dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "runs", lambda *_: False)
            assert same(found, packed.dense(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_differs_from_the_reference_only_below_the_smallest_normal_number(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quant.backend("cpu")[0] != "bitsandbytes":
        pytest.skip(quant.backend("cpu")[1])
    packed = pack(normal(64, 64) * 1e-38, name, double_quant=False)
    found = {dtype: packed.dense(dtype) for dtype in kernels.KERNEL_DTYPES}
    monkeypatch.setattr(kernels, "runs", lambda *_: False)
    assert same(found[torch.float32], packed.dense(torch.float32))
    assert same(found[torch.float16], packed.dense(torch.float16))
    expected = packed.dense(torch.bfloat16)
    differs = found[torch.bfloat16] != expected
    assert (found[torch.bfloat16][differs] == 0).all()
    assert (expected[differs].abs() <= torch.finfo(torch.bfloat16).tiny).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_reads_what_we_write(name: str, double_quant: bool, dtype: torch.dtype) -> None:
    weight = normal(48, 128, dtype=dtype)
    packed = pack(weight, name, double_quant=double_quant)
    saved = safetensors.torch.load(safetensors.torch.save(to_bitsandbytes(packed, "weight")))
    codes = saved.pop("weight")
    read = modules.Params4bit.from_prequantized(codes, dict(saved), device="cpu")
    assert same(functional.dequantize_4bit(read.data, read.quant_state), packed.dense(dtype))
    state = functional.QuantState.from_dict(dict(saved), device=CPU)
    theirs = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    assert theirs.keys() == saved.keys()
    assert all(same(theirs[key], saved[key]) for key in theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_we_read_and_write_what_bitsandbytes_writes(name: str, double_quant: bool, dtype: torch.dtype) -> None:
    layer = modules.Linear4bit(128, 48, bias=True, quant_type=name, compress_statistics=double_quant)
    weight = normal(48, 128, dtype=dtype)
    layer.weight = modules.Params4bit(weight, quant_type=name, compress_statistics=double_quant, module=layer)
    layer.to("cpu")
    saved = {f"q.{key}": value.detach() for key, value in layer.state_dict().items()}
    weights = packed_weights(list(saved))
    assert weights.keys() == {"q.weight"}
    assert set(weights["q.weight"]) == saved.keys() - {"q.bias"}
    assert weights["q.weight"][0] == "q.weight"
    packed = from_bitsandbytes(saved, "q.weight")
    assert packed.shape == (48, 128)
    assert same(packed.dense(dtype), functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    ours = to_bitsandbytes(pack(weight, name, double_quant=double_quant), "q.weight")
    again = to_bitsandbytes(packed, "q.weight")
    for key in weights["q.weight"]:
        assert same(ours[key], saved[key]), key
        assert same(again[key], saved[key]), key
    assert ours.keys() == again.keys() == set(weights["q.weight"])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_under_a_wider_dtype_are_read(storage: torch.dtype) -> None:
    packed = pack(normal(16, 64), "nf4")
    saved = to_bitsandbytes(packed)
    saved["weight"] = saved["weight"].view(-1).view(storage).view(-1, 1)
    assert same(from_bitsandbytes(saved).codes, packed.codes)


def test_a_table_of_scales_that_an_older_release_wrote_is_kept() -> None:
    weight = normal(512, 64)
    weight[0] = 0.0  # furthest below the mean of all scales: its code is the first of the table
    packed = pack(weight, "nf4")
    saved = to_bitsandbytes(packed)
    older = saved["weight.nested_quant_map"].clone()
    older[0] = -1.0
    saved["weight.nested_quant_map"] = older
    read = from_bitsandbytes(saved)
    assert read.nested is not None
    assert 0 in read.nested.codes
    state = functional.QuantState.from_dict({k: v for k, v in saved.items() if k != "weight"}, device=CPU)
    assert same(read.dense(torch.float32), functional.dequantize_4bit(saved["weight"], state))
    assert same(quant.from_tensors(read.tensors(), read.settings()).tensors()["nested_quant_map"], older)
    assert read.nbytes() == packed.nbytes() + older.nbytes


def test_a_checkpoint_that_bitsandbytes_could_not_have_written_is_refused() -> None:
    saved = to_bitsandbytes(pack(normal(16, 64), "nf4"), "a.weight")
    state = "a.weight.quant_state.bitsandbytes__nf4"
    with pytest.raises(BaseBroken, match=r"'b.weight' is no weight that bitsandbytes packed"):
        from_bitsandbytes(saved, "b.weight")
    with pytest.raises(BaseBroken, match="has no tensor 'absmax'"):
        from_bitsandbytes({key: value for key, value in saved.items() if key != "a.weight.absmax"}, "a.weight")
    with pytest.raises(BaseBroken, match="tensor 'codes' of the nf4 weight is uint8"):
        from_bitsandbytes({**saved, "a.weight": saved["a.weight"][1:]}, "a.weight")
    for text, words in (
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1]", "a JSON object"),
        (bytes(saved[state].tolist()).replace(b'"nf4"', b'"fp4"'), "is stored as 'fp4', not as 'nf4'"),
        (bytes(saved[state].tolist()).replace(b'"shape"', b'"form"'), "not known here: form"),
        (bytes(saved[state].tolist()).replace(b"[16, 64]", b"null"), "setting 'shape' of the nf4 weight is None"),
        (bytes(saved[state].tolist()).replace(b'"float32"', b'"float16"'), "were not float32"),
    ):
        with pytest.raises(BaseBroken, match=words):
            from_bitsandbytes({**saved, state: torch.tensor(list(text), dtype=torch.uint8)}, "a.weight")
    assert packed_weights(["a.weight", "a.weight.absmax", "b.quant_state.bitsandbytes__int8"]) == {}


@pytest.mark.parametrize("name", NAMES)
def test_dense_weights_equal_those_of_bitsandbytes(name: str) -> None:
    # 256 columns: 0.50.2 takes wrong scales where rows are no multiple of the block.
    weight = normal(96, 256)
    codes, state = functional.quantize_4bit(weight, quant_type=name, compress_statistics=True)
    packed = pack(weight, name)
    out = torch.empty(weight.numel())
    plain.dequantise(packed.codes, packed.scales(), 64, codebook(name, CPU), out)
    assert same(out.view(96, 256), functional.dequantize_4bit(codes, state))


def test_rounding_errors_are_those_of_the_paper() -> None:
    weight = normal(2000, 640)
    for name, options, expected in (
        ("nf4", {"double_quant": False}, 0.0919),
        ("nf4", {}, 0.0920),
        ("fp4", {"double_quant": False}, 0.1219),
        ("int4", {"block": 64, "symmetric": True}, 0.1076),
    ):
        error = (quant.pack(weight, name, **options).dense(torch.float32) - weight).square().mean().sqrt()
        assert float(error) == pytest.approx(expected, abs=2e-4), (name, options)
