"""DoRA: its norm, its start on every base and init, its merge, its neighbours, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from starts import new_adapter
from torch import nn

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.combine.combined import combine
from manylora.adapters.export.exported import export
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, BaseMismatch, SpecError
from manylora.methods import METHODS, dora
from manylora.methods.inits import INITS
from manylora.ops import gain
from manylora.spec import AdapterSpec
from manylora.types import Factors, Runs, Segment

SPEC = AdapterSpec(method="dora", rank=4, alpha=12.0)


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return manylora.load_base(str(tiny_base_folder), dtype="float32")


def moved(adapter: Adapter, seed: int = 3, size: float = 0.05) -> Adapter:
    """The same adapter as training would leave it: every factor a little away from its start."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: replace(
            own, tensors={k: t + size * torch.randn(t.shape, generator=generator) for k, t in own.tensors.items()}
        )
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


@pytest.mark.parametrize("ranks", [1, 5])
def test_the_norm_by_the_identity_is_that_of_the_dense_matrix(ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((7, 11), (3, ranks, 11), (3, 7, ranks))
    )
    scales = torch.tensor([0.5, 2.0, 7.0])
    found = gain.row_norms(weight, gain.row_squares(weight), a, b, scales)
    want = (weight + scales[:, None, None] * (b @ a)).norm(dim=2)
    torch.testing.assert_close(found, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_gain_and_its_gradients_agree_with_finite_differences(in_place: bool) -> None:
    base = FrozenModel(
        nn.Sequential(nn.Linear(6, 5)).double(), example=lambda rows: {"input": torch.randn(rows, 6).double()}
    )
    bank = Bank(base, num_slots=2, dtype=torch.float64)
    site = base.sites["0"]
    for slot in range(2):
        bank.put(moved(Adapter.new(base, replace(SPEC, rank=2, sites=("0",)), seed=slot), slot), slot=slot)
    x = torch.randn(5, 6, dtype=torch.float64)
    with bank.route((1, -1, 0, 0, 1)):
        (use,) = [use for _, uses in bank.uses(site, x) for use in uses]
    y = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    magnitude = use.stack.tensors["magnitude"]
    gains = [gain.Gain(magnitude, torch.rand(2, 5, dtype=torch.float64) + 1, use.runs, in_place)]
    bias = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(gain.gained(1 * y, gains, lambda: bias), gain.reference(y, gains, bias))
    assert torch.autograd.gradcheck(lambda *_: gain.gained(1 * y, gains, lambda: bias), (y, magnitude))


def test_a_row_of_no_length_still_gets_its_gradient() -> None:
    """What a gain of zero has multiplied cannot be found again: then the input is kept."""
    runs = Runs((Segment(0, 0, 4, ((0, 4, None),)),), covers_all=True)
    magnitude = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    norms = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    assert not gain.recovers(magnitude, norms)
    assert gain.recovers(magnitude[:, ::2], norms[:, ::2])
    y = torch.randn(4, 3, dtype=torch.float64)
    gains = [gain.Gain(magnitude, norms, runs, gain.recovers(magnitude, norms))]
    (found,) = torch.autograd.grad(gain.gained(1 * y, gains, None).sum(), magnitude)
    torch.testing.assert_close(found, y.sum(0, keepdim=True) / norms)


def test_norms_are_found_once_for_every_change_of_the_factors(base, monkeypatch) -> None:
    found: list[tuple[int, ...]] = []
    monkeypatch.setattr(dora, "row_norms", lambda *given: found.append(given[2].shape) or gain.row_norms(*given))
    adapter = moved(Adapter.new(base, replace(SPEC, sites=("q_proj",))))
    count = len(adapter.factors)
    inputs = base.example(2)
    with Bank(base, num_slots=2) as bank:
        bank.put(adapter, slot=0)
        bank.put(moved(adapter, 5), slot=1)
        found.clear()
        with bank.route((0, 1)):
            for _ in range(3):
                base.model(**inputs)
        assert len(found) == count
        with torch.no_grad():
            for stack in bank.stacks.values():
                stack.tensors["b"][0].mul_(2.0)  # through a view, as the optimisers do
        with bank.route((0, 1)):
            changed = base.model(**inputs).logits
        assert len(found) == 2 * count
        again = bank.get(0)
    with Bank(base) as bank:
        bank.put(again, slot=0)
        with bank.route((0,)):
            alone = base.model(**{name: value[:1] for name, value in inputs.items()}).logits
    torch.testing.assert_close(alone, changed[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("init", list(INITS))
def test_every_start_works_on_dense_and_packed_bases_or_is_refused_by_name(
    init: str, quantize: str | None, tiny_base_folder, tmp_path
) -> None:
    base = manylora.load_base(str(tiny_base_folder), dtype="float32", quantize=quantize)
    spec = replace(SPEC, init=init)
    if INITS.get(init).needs_packed and quantize is None:
        with pytest.raises(SpecError, match=f"init '{init}' starts from what packing has lost"):
            Adapter.new(base, spec)
        return
    adapter = new_adapter(base, spec)
    inputs = base.example(2)
    with torch.no_grad():
        bare = base.model(**inputs).logits

    def logits(one: Adapter) -> torch.Tensor:
        with Bank(base) as bank, torch.no_grad():
            bank.put(one, slot=0)
            with bank.route((0, 0)):
                return base.model(**inputs).logits

    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        for stack in bank.stacks.values():
            norms = dora._norms_of(stack.site, stack).norms
            torch.testing.assert_close(norms, stack.tensors["magnitude"].detach(), rtol=1e-6, atol=0)
    if INITS.get(init).starts_at_base:
        assert torch.equal(logits(adapter), bare)
    trained = moved(adapter)
    want = logits(trained)
    assert (want - bare).abs().max() > 1e-2
    # As any other tool reads it: without anchors, of twice the rank where it had any.
    folder = trained.save(tmp_path / "adapter", base)
    torch.testing.assert_close(logits(Adapter.load(folder)), want, rtol=1e-4, atol=1e-4)


def test_a_batch_of_dora_lora_full_and_the_bare_base_is_each_row_alone(base) -> None:
    specs = [
        replace(SPEC, rank=2),
        replace(SPEC, rank=8, dropout=0.1),
        AdapterSpec(rank=3),
        AdapterSpec(method="full", sites=("q_proj", "down_proj")),
    ]
    inputs = base.example(3)
    rows = (3, 0, -1, 1, 2, 0)
    inputs = {name: value[[0, 1, 2, 0, 1, 2]] for name, value in inputs.items()}
    streams = tuple(range(50, 56))
    with Bank(base, num_slots=4) as bank, torch.no_grad():
        for slot, spec in enumerate(specs):
            bank.put(moved(Adapter.new(base, spec, seed=slot), slot), slot=slot)
        with bank.route(rows, streams):
            mixed = base.model(**inputs).logits
        for row, slot in enumerate(rows):
            with bank.route((slot,), streams[row : row + 1]):
                alone = base.model(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
            torch.testing.assert_close(alone, mixed[row : row + 1], rtol=1e-4, atol=1e-4)


def test_dropout_reaches_the_low_rank_branch_only(base) -> None:
    """With B at zero nothing is left for dropout to change, whatever the magnitudes are."""
    adapter = Adapter.new(base, replace(SPEC, dropout=0.5))
    factors = {
        name: Factors(own.method, {**own.tensors, "magnitude": 1.1 * own.tensors["magnitude"]})
        for name, own in adapter.factors.items()
    }
    inputs = base.example(1)
    with Bank(base) as bank, torch.no_grad():
        bank.put(replace(adapter, factors=factors), slot=0)
        with bank.route((0,)):
            dry = base.model(**inputs).logits
        with bank.route((0,), (7,)):
            assert torch.equal(base.model(**inputs).logits, dry)


@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_a_merge_is_measured_and_small_in_float32(base, into: str, tmp_path) -> None:
    report = manylora.merge(base, moved(Adapter.new(base, SPEC)), into, output=tmp_path / into)
    assert report.passed
    if into == "fp32":
        assert report.losses.median_error < 1e-5


def test_what_a_product_alone_could_stand_for_is_refused_by_name(base, tmp_path) -> None:
    adapter = moved(Adapter.new(base, SPEC))
    with pytest.raises(AdapterBroken, match="method 'dora', whose change is more than their product"):
        manylora.compress(adapter, bits=8)
    with pytest.raises(AdapterBroken, match="of the method dora"):
        export(adapter, "mlx", tmp_path / "mlx")
    with pytest.raises(SpecError, match="not stored in few bits"):
        Adapter.new(base, replace(SPEC, quantize="int4"))
    with pytest.raises(BaseMismatch, match="only known beside the base"):
        combine([adapter, adapter])


def test_combining_beside_the_base_gives_the_mean_of_the_changes(base) -> None:
    one, two = (moved(Adapter.new(base, spec), seed) for seed, spec in enumerate((SPEC, AdapterSpec(rank=3))))
    made = combine([one, two], base=base).adapter
    name = next(iter(one.factors))
    site = base.sites[name]
    want = sum(
        METHODS.get(each.factors[name].method).delta(site, each.factors[name], each.spec)["weight"] / 2
        for each in (one, two)
    )
    found = METHODS.get("full").delta(site, made.factors[name], made.spec)["weight"]
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
