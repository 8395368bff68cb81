"""Low-rank changes of convolutions: exact gradients, rows of several slots, merging, and PEFT's folder both ways."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.combine.combined import combine
from manylora.adapters.export.exported import export
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, RouteError, SiteNotFound
from manylora.methods import METHODS
from manylora.methods.inits import INITS
from manylora.spec import AdapterSpec

SPEC = AdapterSpec(rank=3, alpha=6.0, sites=("conv*", "head"))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, (3, 2), stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(6, 5, 3, padding="same")
        self.grouped = nn.Conv2d(5, 5, 1, groups=5)
        self.wide = nn.Conv2d(5, 5, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(5, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.wide(self.grouped(self.conv2(self.conv1(x).relu_()).relu_())))
        return self.head(x.mean((2, 3)))


class Sounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 6, 5, stride=2)
        self.conv2 = nn.Conv1d(6, 4, 3, padding=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x).relu()).mean(2))


MODELS = {"pictures": (Pictures, (2, 9, 8)), "sounds": (Sounds, (2, 21))}


def made(name: str, dtype: torch.dtype = torch.float64) -> FrozenModel:
    torch.manual_seed(1)
    model, _ = MODELS[name]
    return FrozenModel(model().to(dtype), example=lambda rows: {"x": inputs(name, rows, dtype)}, name=name)


def inputs(name: str, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, *MODELS[name][1], generator=torch.Generator().manual_seed(2)).to(dtype)


def moved(adapter: Adapter, seed: int = 3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: replace(
            own,
            tensors={
                k: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
                for k, t in own.tensors.items()
            },
        )
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def merged(base: FrozenModel, adapter: Adapter) -> nn.Module:
    model = copy.deepcopy(base.model)
    for name, own in adapter.factors.items():
        for key, change in METHODS.get(own.method).delta(base.sites[name], own, adapter.spec).items():
            parameter = model.get_submodule(name).get_parameter(key)
            parameter.data += change.to(parameter)
    return model


@pytest.mark.parametrize(
    "init", [name for name in INITS if not INITS.get(name).needs_packed and INITS.get(name).reads is None]
)
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_several_slots_are_each_the_merged_model(name: str, init: str) -> None:
    base = made(name)
    specs = [replace(SPEC, init=init), replace(SPEC, rank=2, sites=("conv2",)), replace(SPEC, rank=5)]
    adapters = [moved(Adapter.new(base, spec, seed=n), n) for n, spec in enumerate(specs)]
    rows = (2, 0, -1, 1, 0, 2)
    x = inputs(name, len(rows))
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        for slot, adapter in enumerate(adapters):
            bank.put(adapter, slot=slot)
        with bank.route(rows):
            y = base.model(x)
        kept = [bank.get(slot) for slot in range(3)]
    for row, slot in enumerate(rows):
        model = base.model if slot == -1 else merged(base, kept[slot])
        torch.testing.assert_close(y[row : row + 1], model(x[row : row + 1]), rtol=1e-10, atol=1e-10)
    for adapter, again in zip(adapters, kept, strict=True):
        assert all(
            torch.equal(t.double(), again.factors[n].tensors[k])
            for n, own in adapter.factors.items()
            for k, t in own.tensors.items()
        )


@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_changes_nothing_and_dropout_is_the_rows_own(name: str) -> None:
    base = made(name, torch.float32)
    x = inputs(name, 4, torch.float32)
    want = base.model(x)
    with Bank(base, num_slots=2) as bank, torch.no_grad():
        for slot in range(2):
            bank.put(Adapter.new(base, replace(SPEC, dropout=0.5), seed=slot), slot=slot)
        with bank.route((0, 1, -1, 0), range(4)):
            assert torch.equal(base.model(x), want)
        for slot in range(2):
            bank.put(moved(bank.get(slot), slot), slot=slot)
        with bank.route((0, 1, -1, 0), (5, 6, 7, 8)):
            together = base.model(x)
        with bank.route((0,), (8,)):
            torch.testing.assert_close(base.model(x[3:]), together[3:])
        with bank.route((0,), (9,)):
            assert not torch.allclose(base.model(x[3:]), together[3:])


@pytest.mark.parametrize("name", [pytest.param("pictures", marks=pytest.mark.slow), "sounds"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    base = made(name)
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        for slot in range(2):
            bank.put(moved(Adapter.new(base, replace(SPEC, dropout=0.1), seed=slot), slot), slot=slot)
        leaves = [tensor for stack in bank.stacks.values() for tensor in stack.tensors.values()]
        x = inputs(name, 3).requires_grad_()

        def run(*_: Tensor) -> Tensor:
            with bank.route((1, -1, 0), (4, 5, 6)):
                return base.model(x)

        assert torch.autograd.gradcheck(run, (x, *leaves), atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_pefts_folder_both_ways(name: str, use_rslora: bool, tmp_path) -> None:
    base = made(name, torch.float32)
    x = inputs(name, 4, torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["conv1", "conv2", "head"], rank_pattern={"conv2": 2}, use_rslora=use_rslora,
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = wrapped(x)
    adapter = Adapter.load(tmp_path / "theirs")
    with Bank(base) as bank, torch.no_grad():
        bank.put(adapter, slot=0)
        with bank.route((0,) * 4):
            found = base.model(x)
    assert (want - base.model(x)).abs().max() > 0.05
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    again = adapter.save(tmp_path / "ours", base)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), again).eval()
    torch.testing.assert_close(opened(x), want, rtol=1e-5, atol=1e-5)
    read = Adapter.load(again)
    assert read.kinds["conv1"] == ("convolution2d" if name == "pictures" else "convolution1d")


def test_merging_compressing_combining_and_exporting(tmp_path) -> None:
    base = made("pictures", torch.float32)
    adapter = moved(Adapter.new(base, SPEC))
    report = manylora.merge(base, adapter, "fp32", output=tmp_path / "merged")
    assert report.passed
    assert report.losses.median_error < 1e-5
    small = manylora.compress(adapter, bits=8, base=base, output=tmp_path / "small")
    assert small.error < 0.02
    read = Adapter.load(tmp_path / "small")
    assert read.factors["conv1"].tensors["a"].shape == adapter.factors["conv1"].tensors["a"].shape
    twice = combine([adapter, adapter]).adapter
    site = base.sites["conv2"]
    one, two = (
        METHODS.get("lora").delta(site, each.factors["conv2"], each.spec)["weight"] for each in (adapter, twice)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterBroken, match="on a convolution2d, which an adapter of MLX has no place for"):
        export(adapter, "mlx", tmp_path / "mlx")


@pytest.mark.parametrize(
    ("site", "says"), [("grouped", "groups=5"), ("up", "ConvTranspose2d"), ("wide", r"dilation=\(2, 2\)")]
)
def test_convolutions_that_are_not_adapted_are_refused_by_name(site: str, says: str) -> None:
    with pytest.raises(SiteNotFound, match=says) as caught:
        Adapter.new(made("pictures"), replace(SPEC, sites=(site,)))
    assert "convolution2d" in str(caught.value.allowed)


def test_a_picture_without_rows_is_refused() -> None:
    base = FrozenModel(nn.Sequential(nn.Conv2d(2, 3, 1)))
    with Bank(base) as bank:
        bank.put(Adapter.new(base, replace(SPEC, rank=2, sites=("0",))), slot=0)
        with bank.route((0,)), pytest.raises(RouteError, match="given 3 dimensions"):
            base.model(torch.randn(2, 4, 4))
