"""Adapters are combined by their deltas; what a rank cannot hold is measured, and strangers are refused."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.combine.change import Dense, LowRank, Options, largest, truncated
from manylora.adapters.combine.combined import combine
from manylora.adapters.combine.ways import COMBININGS
from manylora.base.frozen import FrozenModel
from manylora.errors import AdapterBroken, BaseMismatch, SpecError, UnknownName
from manylora.methods import METHODS
from manylora.spec import AdapterSpec
from manylora.types import Factors

# Of PEFT itself; a warning about keys that it misses, or does not know, still fails a test.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.up = nn.Linear(12, 16)
        self.across = Conv1D(12, 16)
        self.head = nn.Linear(12, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.across(torch.relu(self.up(self.embed(x)))))


def tiny(seed: int = 0) -> FrozenModel:
    torch.manual_seed(seed)
    return FrozenModel(Tiny(), name="tiny")


SPEC = AdapterSpec(rank=3, alpha=6.0, sites=("up", "across", "embed"))


def filled(base: FrozenModel, spec: AdapterSpec = SPEC, seed: int = 1) -> Adapter:
    adapter = Adapter.new(base, spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, own in adapter.factors.items():
        drawn = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in own.tensors.items()}
        copied = own.method == "full"
        factors[name] = Factors(own.method, {k: own.tensors[k] + v if copied else v for k, v in drawn.items()})
    return replace(adapter, factors=factors)


def deltas(base: FrozenModel, adapter: Adapter) -> dict[str, Tensor]:
    """The dense change of each parameter, by its name in the model."""
    return {
        f"{name}.{key}": value
        for name, own in adapter.factors.items()
        for key, value in METHODS.get(own.method).delta(base.sites[name], own, adapter.spec).items()
    }


def pair(base: FrozenModel) -> list[Adapter]:
    two = replace(SPEC, rank=5, alpha=2.0, scale_rule="alpha/sqrt(rank)", rank_pattern={"up": 2})
    return [filled(base), filled(base, two, seed=2)]


def test_linear_is_the_weighted_sum_of_deltas_exactly():
    base = tiny()
    pieces = pair(base)
    made = combine(pieces, "linear", weights=[0.7, -0.3])
    one, two = (deltas(base, adapter) for adapter in pieces)
    for name, value in deltas(base, made.adapter).items():
        torch.testing.assert_close(value, 0.7 * one[name] - 0.3 * two[name], rtol=1e-5, atol=1e-6)
    assert all(site.lost == 0.0 for site in made.sites)
    assert made.adapter.spec.rank_at("up") == 5
    assert made.adapter.spec.rank_at("across") == 8


def test_linear_logits_equal_those_of_both_deltas_together():
    base, x = tiny(), torch.arange(12).view(2, 6)
    pieces = pair(base)
    made = combine(pieces, weights=[1.0, 1.0]).adapter
    with Bank(base) as bank, torch.no_grad():
        bank.put(made, slot=0)
        with bank.route((0, 0)):
            found = base.model(x)
    one, two = (deltas(base, adapter) for adapter in pieces)
    whole = {
        name: value + one[name] + two[name] if name in one else value for name, value in base.model.named_parameters()
    }
    torch.testing.assert_close(found, torch.func.functional_call(base.model, whole, (x,)), rtol=1e-4, atol=1e-4)


def test_ranks_above_what_a_site_holds_are_factored_again_without_loss():
    base = tiny()
    many = [filled(base, replace(SPEC, rank=8), seed=seed) for seed in range(3)]
    made = combine(many, "linear", weights=[1, 1, 1])
    assert made.adapter.spec.rank_at("up") == 12
    total = sum(deltas(base, adapter)["up.weight"] for adapter in many)
    torch.testing.assert_close(deltas(base, made.adapter)["up.weight"], total, rtol=1e-4, atol=1e-4)


def test_svd_is_the_best_of_its_rank_and_says_what_it_loses():
    base = tiny()
    pieces = pair(base)
    made = combine(pieces, "svd", weights=[1.0, 1.0], rank=2)
    total = sum(deltas(base, adapter)["up.weight"] for adapter in pieces)
    u, s, vh = torch.linalg.svd(total)
    torch.testing.assert_close(
        deltas(base, made.adapter)["up.weight"], u[:, :2] @ s[:2].diag() @ vh[:2], rtol=1e-4, atol=1e-5
    )
    lost = next(site.lost for site in made.sites if site.site == "up")
    assert lost == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)


def test_the_dense_matrix_is_never_made_of_low_rank_factors():
    """A change of 2^20 x 2^20 has 4 TiB: its factors are cut to a smaller rank all the same."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 1 << 20, generator=generator), torch.randn(1 << 20, 4, generator=generator)
    low, lost = truncated(LowRank(torch.cat([a, a]), torch.cat([b, b], dim=1)), 4)
    assert low.a.shape == (4, 1 << 20)
    assert lost < 1e-5


def test_truncation_of_factors_equals_that_of_their_product():
    generator = torch.Generator().manual_seed(0)
    low = LowRank(torch.randn(6, 20, generator=generator), torch.randn(15, 6, generator=generator))
    (one, first), (two, second) = truncated(low, 3), truncated(Dense(low.dense()), 3)
    torch.testing.assert_close(one.dense(), two.dense(), rtol=1e-4, atol=1e-4)
    assert first == pytest.approx(second, rel=1e-4)


def test_ties_trims_elects_and_takes_the_mean_of_those_that_agree():
    one = Dense(torch.tensor([[4.0, 0.1, 3.0, -2.0]]))
    two = Dense(torch.tensor([[2.0, 0.1, -5.0, 0.1]]))
    options = Options(density=0.75, seed=0, place="x")
    found = COMBININGS.get("ties")([one, two], [1.0, 1.0], [0, 1], options).dense()
    # The smallest entry of each is cut; at the third entry -5 outvotes 3; at the others who is there agrees.
    assert found.tolist()[0][0] == 3.0
    assert found.tolist()[0][2:] == [-5.0, -2.0]


def test_ties_weights_count_in_the_election_and_in_the_mean():
    one, two = Dense(torch.tensor([3.0, 4.0])), Dense(torch.tensor([-5.0, 1.0]))
    found = COMBININGS.get("ties")([one, two], [3.0, 1.0], [0, 1], Options(1.0, 0, "x")).dense()
    assert found.tolist() == [3.0, (3 * 4 + 1) / 4]


def test_dare_keeps_the_mean_and_the_asked_share():
    value = torch.ones(400, 500)
    way = COMBININGS.get("dare")
    found = way([Dense(value)], [1.0], [0], Options(0.2, 0, "x")).dense()
    assert found.mean() == pytest.approx(1.0, abs=0.02)
    assert (found != 0).double().mean() == pytest.approx(0.2, abs=0.005)
    assert set(found.unique().tolist()) == {0.0, 5.0}


def test_dare_draws_by_seed_adapter_and_place_alone():
    value = Dense(torch.ones(50, 50))
    way = COMBININGS.get("dare")

    def drawn(seed: int, member: int, place: str) -> Tensor:
        return way([value], [1.0], [member], Options(0.5, seed, place)).dense()

    assert torch.equal(drawn(1, 0, "a"), drawn(1, 0, "a"))
    others = [drawn(2, 0, "a"), drawn(1, 1, "a"), drawn(1, 0, "b")]
    assert not any(torch.equal(drawn(1, 0, "a"), other) for other in others)


def test_magnitude_keeps_the_largest_entries_of_each():
    found = COMBININGS.get("magnitude")([Dense(torch.tensor([1.0, -3.0, 2.0, 0.5]))], [2.0], [0], Options(0.5, 0, "x"))
    assert found.dense().tolist() == [0.0, -6.0, 4.0, 0.0]


def test_equal_entries_do_not_make_more_of_them_the_largest():
    assert int((largest(torch.ones(10, 10), 0.2) != 0).sum()) == 20


@pytest.mark.parametrize("method", list(COMBININGS))
def test_a_site_that_one_adapter_lacks_is_zero_there(method):
    base = tiny()
    whole, part = filled(base), filled(base, replace(SPEC, sites=("up",)), seed=2)
    given = {} if method in ("linear", "svd") else {"density": 1.0}
    made = combine([whole, part], method, weights=[1.0, 1.0], **given)
    torch.testing.assert_close(
        deltas(base, made.adapter)["across.weight"], deltas(base, whole)["across.weight"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("method", list(COMBININGS))
def test_whole_copies_are_combined_by_their_change_from_the_base(method):
    base = tiny()
    spec = replace(SPEC, full_sites=("head",))
    pieces = [filled(base, spec), filled(base, replace(SPEC, sites=("up", "head")), seed=2)]
    given = {} if method in ("linear", "svd") else {"density": 1.0}
    made = combine(pieces, method, weights=[0.5, 0.5], base=base, **given)
    one, two = (deltas(base, adapter) for adapter in pieces)
    found = deltas(base, made.adapter)
    assert made.adapter.spec.full_sites == ("head",)
    if method in ("linear", "svd", "magnitude"):
        torch.testing.assert_close(found["head.weight"], 0.5 * one["head.weight"] + 0.5 * two["head.weight"])
        torch.testing.assert_close(found["head.bias"], 0.5 * one["head.bias"])
    with pytest.raises(BaseMismatch, match="--base"):
        combine(pieces, method)


@pytest.mark.parametrize("method", list(COMBININGS))
def test_the_result_opens_in_peft_with_the_same_logits(method, tmp_path):
    base, x = tiny(), torch.arange(12).view(2, 6)
    made = combine(pair(base), method).adapter
    made.save(tmp_path / "made", base)
    with Bank(base) as bank, torch.no_grad():
        bank.put(Adapter.load(tmp_path / "made"), slot=0)
        with bank.route((0, 0)):
            expected = base.model(x)
        with bank.route((-1, -1)):
            bare = base.model(x)
    assert not torch.allclose(expected, bare, atol=1e-2)
    torch.manual_seed(0)
    opened = peft.PeftModel.from_pretrained(Tiny().eval(), str(tmp_path / "made"))
    with torch.no_grad():
        torch.testing.assert_close(opened(x), expected, rtol=1e-4, atol=1e-4)


def test_equal_weights_that_sum_to_one_are_the_default():
    base = tiny()
    adapter = filled(base)
    made = combine([adapter, adapter])
    torch.testing.assert_close(deltas(base, made.adapter)["up.weight"], deltas(base, adapter)["up.weight"])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_adapters_of_different_bases_are_refused():
    with pytest.raises(BaseMismatch, match="another base"):
        combine([filled(tiny()), filled(tiny(seed=5))])


def test_adapters_without_a_fingerprint_are_compared_by_the_name_of_their_base():
    one = replace(filled(tiny()), base_fingerprint=None)
    combine([one, filled(tiny())])
    with pytest.raises(BaseMismatch, match="another base"):
        combine([replace(one, base_name="other"), filled(tiny())])


def test_adapters_of_different_chat_templates_are_refused():
    one = filled(tiny())
    with pytest.raises(BaseMismatch, match="chat template"):
        combine(
            [replace(one, receipt={"chat_template": "sha256:1"}), replace(one, receipt={"chat_template": "sha256:2"})]
        )


def test_factors_of_other_shapes_are_refused():
    one = replace(filled(tiny()), base_fingerprint=None)
    factors = dict(one.factors) | {"up": Factors("lora", {"a": torch.zeros(3, 11), "b": torch.zeros(16, 3)})}
    with pytest.raises(AdapterBroken, match="16 x 12 in one adapter and 16 x 11"):
        combine([one, replace(one, factors=factors)])


@pytest.mark.parametrize(
    ("method", "given", "told"),
    [
        ("linear", {"rank": 4}, "rank is given"),
        ("svd", {"density": 0.2}, "density is given"),
        ("ties", {"seed": 1}, "seed is given"),
        ("ties", {"density": 0.0}, "density is 0"),
        ("ties", {"density": 1.5}, "density is 1.5"),
        ("svd", {"rank": 0}, "rank is 0"),
        ("linear", {"weights": [1.0]}, "for 2 adapters"),
        ("linear", {"weights": [0.0, 0.0]}, "not all zero"),
        ("linear", {"weights": [1.0, float("nan")]}, "nan"),
    ],
)
def test_an_option_that_says_nothing_or_cannot_be_is_refused(method, given, told):
    with pytest.raises(SpecError, match=told):
        combine(pair(tiny()), method, **given)


def test_one_adapter_is_nothing_to_combine():
    with pytest.raises(SpecError, match="1 adapters"):
        combine([filled(tiny())])


def test_a_way_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="nearest: ties"):
        combine(pair(tiny()), "tie")
