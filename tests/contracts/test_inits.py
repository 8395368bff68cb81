"""Where factors start: what each init promises of them, and that anchors hold through training, resuming and saving."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleets
import peft
import pytest
import torch
from fleets import Running, killed_after
from safetensors.torch import load_file, save_file
from starts import new_adapter
from torch import Tensor, nn

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.packing.linear import pack_module, put_module
from manylora.errors import AdapterBroken, BaseMismatch, BaseNotFound, SiteNotFound, SpecError
from manylora.methods import METHODS
from manylora.methods.inits import INITS
from manylora.methods.inits.loftq import LoftqPacking, loftq_pack
from manylora.methods.inits.svd import leading_directions, leading_factors
from manylora.quant import pack
from manylora.spec import AdapterSpec
from manylora.training import checkpoint as checkpoint_module
from manylora.training.checkpoint import Checkpoints
from manylora.training.member import Member
from manylora.training.optim import OPTIMIZERS
from manylora.types import Factors, Site

ANYWHERE = [name for name in INITS if not INITS.get(name).needs_packed]
ANCHORED = [name for name in INITS if INITS.get(name).anchored]


class One(nn.Module):
    """A model of one site."""

    def __init__(self, site: nn.Module):
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x)


def with_spectrum(rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix whose singular values fall as k^-0.5."""
    generator = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, side, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, side, generator=generator))[0]
    return (left * torch.arange(1, side + 1).pow(-0.5)) @ right.t()


def only_site(module: nn.Module) -> FrozenModel:
    return FrozenModel(One(module), name="one", example=lambda rows: {"x": torch.randn(rows, 2, 12)})


def start(base: FrozenModel, init: str, rank: int, alpha: float = 6.0, seed: int = 1) -> tuple[Factors, Site, float]:
    adapter = new_adapter(base, AdapterSpec(rank=rank, alpha=alpha, init=init, sites=("site",)), seed=seed)
    return adapter.factors["site"], base.sites["site"], adapter.spec.scale("site")


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(10, 12)


@pytest.mark.parametrize("made", [lambda: nn.Linear(12, 10), conv1d, lambda: nn.Embedding(17, 10)])
@pytest.mark.parametrize("rank", [3, 10])
def test_pissa_is_the_leading_part_of_the_weight_at_any_scale(made: Any, rank: int) -> None:
    torch.manual_seed(2)
    base = only_site(made())
    factors, site, scale = start(base, "pissa", rank)
    a, b = factors.tensors["a"], factors.tensors["b"]
    left, values, right = torch.linalg.svd(site.weight().double(), full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    torch.testing.assert_close(scale * (b @ a).double(), best, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # each carries half of every direction
    assert scale != 1.0


def test_pissa_of_a_packed_site_is_that_of_the_weight_in_use() -> None:
    weight = with_spectrum(64, 64)
    linear = nn.Linear(64, 64, bias=False)
    linear.weight.data.copy_(weight)
    base = only_site(pack_module(linear, pack(weight, "nf4"), torch.float32))
    factors, site, scale = start(base, "pissa", 8)
    assert not torch.equal(site.weight(), weight)
    left, values, right = torch.linalg.svd(site.weight(), full_matrices=False)
    got = scale * factors.tensors["b"] @ factors.tensors["a"]
    torch.testing.assert_close(got, (left[:, :8] * values[:8]) @ right[:8], rtol=0, atol=1e-5)


def test_olora_starts_from_the_first_columns_of_q() -> None:
    torch.manual_seed(2)
    base = only_site(nn.Linear(12, 10))
    factors, site, _ = start(base, "olora", 4)
    orthonormal, triangular = torch.linalg.qr(site.weight())
    torch.testing.assert_close(factors.tensors["b"], orthonormal[:, :4])
    torch.testing.assert_close(factors.tensors["a"], triangular[:4])
    torch.testing.assert_close(factors.tensors["b"].t() @ factors.tensors["b"], torch.eye(4))


@pytest.mark.parametrize("shape", [(700, 400), (400, 700)])
def test_the_randomised_decomposition_is_near_the_exact_one_and_repeats(shape: tuple[int, int]) -> None:
    matrix, state = with_spectrum(*shape), torch.get_rng_state()
    rank = 16
    values = torch.linalg.svdvals(matrix)
    left, found, right = leading_directions(matrix, rank, torch.Generator().manual_seed(4))
    # The best error of rank R is that of what is left of the spectrum; the slowly falling one here is a hard case.
    best = values[rank:].square().sum().sqrt()
    assert (matrix - (left * found) @ right).norm() <= 1.01 * best
    torch.testing.assert_close(found, values[:rank], rtol=2e-2, atol=0)
    again = leading_directions(matrix, rank, torch.Generator().manual_seed(4))
    assert all(torch.equal(one, other) for one, other in zip((left, found, right), again, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "the process's own random stream was used"


def test_directions_that_a_weight_does_not_have_can_be_learned() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.outer(torch.arange(1.0, 11.0), torch.ones(12))  # of rank 1
    for weight, known in ((matrix, 1), (torch.zeros(10, 12), 0)):
        a, b = leading_factors(weight, 4, 0.5, generator)
        torch.testing.assert_close(0.5 * b @ a, weight)
        assert not b[:, known:].any()
        assert (a.norm(dim=1) > 0.1).all(), "a row and its column at zero get no gradient ever"


@pytest.mark.parametrize("init", ANYWHERE)
def test_a_start_is_a_function_of_seed_and_site(init: str) -> None:
    torch.manual_seed(2)
    base = only_site(nn.Linear(12, 10))
    first, second = start(base, init, 4)[0], start(base, init, 4)[0]
    assert all(torch.equal(value, second.tensors[name]) for name, value in first.tensors.items())
    assert all(torch.equal(value, first.tensors[name]) for name, value in first.anchors.items())
    assert bool(first.anchors) == INITS.get(init).anchored
    assert first.num_parameters() == 4 * (12 + 10), "anchors are not trained"


def test_a_rank_above_what_a_site_allows_is_capped_with_its_scale(make_base) -> None:
    base = make_base()
    adapter = Adapter.new(base, AdapterSpec(rank=24, alpha=12, init="pissa"))
    narrow = next(name for name in adapter.factors if name.endswith("k_proj"))
    assert adapter.factors[narrow].tensors["a"].shape[0] == adapter.factors[narrow].anchors["a"].shape[0] == 16
    assert adapter.spec.scale(narrow) == 0.5
    with pytest.raises(SpecError, match="above what every one"):
        Adapter.new(base, AdapterSpec(rank=64, init="pissa"))


def test_what_is_learned_in_bfloat16_is_not_lost_in_the_difference_of_two_large_products() -> None:
    """A change of one part in ten thousand, where B A - B0 A0 of bfloat16 products would be noise."""
    weight = with_spectrum(48, 64)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data.copy_(weight)
    base = only_site(linear)
    adapter = Adapter.new(base, AdapterSpec(rank=16, alpha=16, init="pissa", sites=("site",)))
    own, generator = adapter.factors["site"], torch.Generator().manual_seed(1)
    moved = {key: value + 1e-4 * torch.randn(value.shape, generator=generator) for key, value in own.tensors.items()}
    adapter = replace(adapter, factors={"site": replace(own, tensors=moved)})
    x = torch.randn(3, 5, 64, generator=generator)
    site = base.sites["site"]
    change = METHODS.get("lora").delta(site, adapter.factors["site"], adapter.spec)["weight"]
    exact = x.double() @ change.double().t()
    bank = Bank(base)
    bank.put(adapter, slot=0)
    with bank.route((0, 0, 0)), torch.no_grad():
        uses = [use for _, found in bank.uses(site, x) for use in found]
        from manylora.ops.low_rank import low_rank

        got = low_rank(x.bfloat16(), site, uses, with_base=False)
    assert (got.double() - exact).norm() < 0.02 * exact.norm()


# -- training ----------------------------------------------------------------------------------------------------------


def member(init: str, examples: list, **changes: Any) -> Member:
    sites = ("all-linear",) if INITS.get(init).reads else ("all-linear", "embed_tokens")
    spec = AdapterSpec(rank=4, dropout=0.1, init=init, sites=sites)
    return fleets.member(init, examples, spec=spec, seed=3, **changes)


@pytest.mark.parametrize("init", ANYWHERE)
def test_within_two_steps_every_factor_moves_and_no_anchor_does(init: str, make_base, make_examples) -> None:
    base = make_base()
    weights = copy.deepcopy(base.model.state_dict())
    run = Running(base, [member(init, make_examples(20), total_steps=2)], torch.float32).run()
    assert not run.recorder.notes
    before = checkpoint_module.flatten(new_adapter(base, run.members[0].spec, seed=3).factors)
    for name, value in run.final(init).items():
        assert torch.equal(value, before[name]) == name.endswith("|anchor"), name
    assert all(torch.equal(value, weights[name]) for name, value in base.model.state_dict().items())


def test_members_of_different_starts_at_the_same_sites_equal_each_alone(make_base, make_examples) -> None:
    members = [member(init, make_examples(20, seed=slot)) for slot, init in enumerate(ANYWHERE)]
    together = Running(make_base(dtype=torch.float64), members, torch.float64).run()
    for slot, init in enumerate(ANYWHERE):
        own = member(init, make_examples(20, seed=slot))
        alone = Running(make_base(dtype=torch.float64), [own], torch.float64).run()
        assert together.recorder.losses(init) == pytest.approx(alone.recorder.losses(init), rel=1e-9)
        for name, value in alone.final(init).items():
            assert (together.final(init)[name] - value).norm() <= 1e-9 * (1 + value.norm()), name


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("init", ANCHORED)
def test_a_killed_run_resumes_to_the_same_bytes_with_anchors(
    init: str, optimizer: str, tmp_path: Path, make_base, make_examples
) -> None:
    def other(name: str, adapter: Adapter) -> Adapter:  # as if the decomposition had come out otherwise here
        factors = {
            site: replace(own, anchors={key: torch.zeros_like(t) for key, t in own.anchors.items()})
            for site, own in adapter.factors.items()
        }
        return replace(adapter, factors=factors)

    def fresh(folder: Path, spoil: Any = None) -> Running:
        own = member(init, make_examples(20), optimizer=optimizer, held_out=make_examples(4, seed=9), evaluate_every=2)
        checkpoints, settings = Checkpoints(folder, keep=2), {"checkpoint_every": 1}
        return Running(make_base(), [own], torch.float32, checkpoints=checkpoints, settings=settings, spoil=spoil)

    whole = fresh(tmp_path / "whole").run()
    killed_after(4, fresh(tmp_path / "killed"))
    resumed = fresh(tmp_path / "killed", other)
    assert resumed.loop.resume() == 4
    resumed.run()
    wanted, found = whole.final(init), resumed.final(init)
    assert wanted.keys() == found.keys()
    assert any(name.endswith("|anchor") for name in wanted)
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_a_slot_that_held_anchors_serves_a_plain_adapter_and_back(make_base) -> None:
    base = make_base()
    tokens = torch.arange(12).view(2, 6)
    bank = Bank(base)
    pissa, default = (moved(Adapter.new(base, AdapterSpec(rank=4, init=init), seed=1)) for init in ("pissa", "default"))
    wanted = []
    for adapter in (pissa, default, pissa, default):
        bank.put(adapter, slot=0)
        with bank.route((0, 0)), torch.no_grad():
            wanted.append(base.model(input_ids=tokens).logits)
    assert torch.equal(wanted[0], wanted[2])
    assert torch.equal(wanted[1], wanted[3])
    assert not torch.equal(wanted[0], wanted[1])
    bank.clear(0)
    assert not any(t.any() for s in bank.stacks.values() for t in (*s.tensors.values(), *s.anchors.values()))


def test_anchors_of_other_shapes_than_the_factors_are_refused(make_base) -> None:
    base = make_base()
    adapter = Adapter.new(base, AdapterSpec(rank=4, init="pissa", sites=("q_proj",)))
    factors = {
        name: replace(own, anchors={key: value[:2] for key, value in own.anchors.items()})
        for name, own in adapter.factors.items()
    }
    with pytest.raises(AdapterBroken, match="anchors at"):
        Bank(base).put(replace(adapter, factors=factors), slot=0)


# -- saving ------------------------------------------------------------------------------------------------------------


def moved(adapter: Adapter, share: float = 0.1) -> Adapter:
    """The same adapter as if trained: factors away from their start, anchors where they were."""
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: replace(
            own,
            tensors={k: v + share * torch.randn(v.shape, generator=generator) for k, v in own.tensors.items()},
        )
        for name, own in adapter.factors.items()
    }
    return replace(adapter, factors=factors)


def logits(base: FrozenModel, adapter: Adapter, tokens: Tensor) -> Tensor:
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        with bank.route((0,) * len(tokens)), torch.no_grad():
            return base.model(input_ids=tokens).logits


SAVED = {
    "one rank": ("llama", {"rank": 4, "alpha": 6}),
    "patterns": (
        "llama",
        {
            "rank": 4,
            "alpha": 6,
            "rank_pattern": {"q_proj": 7, r"layers\.0\..*": 3},
            "alpha_pattern": {"q_proj": 20},
        },
    ),
    "rank stabilised": (
        "llama",
        {"rank": 6, "alpha": 5, "scale_rule": "alpha/sqrt(rank)", "rank_pattern": {"q_proj": 4}},
    ),
    "capped, above half of what a site holds": ("llama", {"rank": 24, "alpha": 12}),
    "embedding": ("llama", {"rank": 4, "alpha": 6, "sites": ("embed_tokens", "q_proj")}),
    "beside a whole copy": ("llama", {"rank": 4, "alpha": 6, "full_sites": ("norm",)}),
    "conv1d": ("gpt2", {"rank": 4, "alpha": 6, "sites": ("all-linear", "wte")}),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("init", ANCHORED)
@pytest.mark.parametrize("case", SAVED)
def test_an_anchored_adapter_opens_in_peft_as_plain_lora_with_the_same_logits(
    case: str, init: str, tmp_path: Path, make_base
) -> None:
    kind, settings = SAVED[case]
    base = make_base(kind)
    tokens = torch.arange(24).view(3, 8)
    with torch.no_grad():
        bare = base.model(input_ids=tokens).logits
    adapter = moved(Adapter.new(base, AdapterSpec(init=init, **settings), seed=1))
    wanted = logits(base, adapter, tokens)
    assert (wanted - bare).abs().max() > 0.05, "an adapter that changes nothing proves nothing"

    folder = adapter.save(tmp_path / "adapter", base)
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval()
    with torch.no_grad():
        assert (opened(input_ids=tokens).logits - wanted).abs().max() < 1e-4

    again = Adapter.load(folder)
    assert torch.equal(logits(base, again, tokens), wanted)
    for name in adapter.spec.sites:
        own = adapter.factors[name].tensors["a"].shape[0]
        assert again.factors[name].tensors["a"].shape[0] == again.spec.rank_at(name) == 2 * own
        assert not again.factors[name].anchors
        assert again.spec.scale(name) == pytest.approx(adapter.spec.scale(name), rel=1e-12)
    twice = again.save(tmp_path / "twice", base)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (twice / path.name).read_bytes(), path.name


@pytest.mark.parametrize("init", ANCHORED)
def test_an_anchored_adapter_that_was_never_trained_is_saved_as_nothing_at_all(
    init: str, tmp_path: Path, make_base
) -> None:
    base = make_base()
    tokens = torch.arange(24).view(3, 8)
    with torch.no_grad():
        bare = base.model(input_ids=tokens).logits
    again = Adapter.load(Adapter.new(base, AdapterSpec(rank=4, init=init)).save(tmp_path / "new", base))
    assert torch.equal(logits(base, again, tokens), bare)


def test_the_scale_can_be_folded_into_an_anchored_adapter(make_base) -> None:
    from manylora.adapters.peft.store import fold_scale

    base, tokens = make_base(), torch.arange(24).view(3, 8)
    adapter = moved(Adapter.new(base, AdapterSpec(rank=4, alpha=6, init="pissa")))
    folded = fold_scale(adapter)
    assert {folded.spec.scale(name) for name in folded.factors} == {1.0}
    torch.testing.assert_close(logits(base, folded, tokens), logits(base, adapter, tokens), rtol=0, atol=1e-4)


# -- loftq -------------------------------------------------------------------------------------------------------------


def packed_linear(form: str = "nf4", folder: Any = None) -> tuple[FrozenModel, Tensor]:
    """A model of one packed site, and the weight before packing."""
    weight = with_spectrum(48, 64)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data.copy_(weight)
    return only_site(pack_module(linear, pack(weight, form), torch.float32)), weight


def tiny(quantize: str | None = "nf4") -> Any:
    from manylora.base.load import load_base

    return load_base("builtin:tiny-en", dtype="float32", device="cpu", quantize=quantize)


TEXT = "Once upon a time a small fox lived near the river. The fox was hungry, so it went to look for fish."


def divergence(base: Any, adapter: Adapter | None, wanted: Tensor) -> float:
    """KL of the full-precision base's next-token distributions from those of `base` with the adapter."""
    tokens = base.tokenizer(TEXT, return_tensors="pt").input_ids
    if adapter is None:
        with torch.no_grad():
            got = base.model(input_ids=tokens).logits
    else:
        got = logits(base, adapter, tokens)
    want = wanted.log_softmax(-1)
    return (want.exp() * (want - got.log_softmax(-1))).sum(-1).mean().item()


@pytest.fixture(scope="module")
def exact_logits() -> Tensor:
    base = tiny(None)
    with torch.no_grad():
        return base.model(input_ids=base.tokenizer(TEXT, return_tensors="pt").input_ids).logits


def test_loftq_brings_a_packed_base_nearer_to_the_original_at_any_scale(exact_logits: Tensor) -> None:
    base = tiny()
    without = divergence(base, None, exact_logits)
    found = {}
    for alpha in (2.0, 8.0, 64.0):
        adapter = Adapter.new(base, AdapterSpec(rank=16, alpha=alpha, init="loftq"))
        found[alpha] = divergence(base, adapter, exact_logits)
    print(f"KL to the original: {without:.3e} packed, {found} with loftq of rank 16 by alpha")
    assert all(value < 0.9 * without for value in found.values())
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-3)
    more = divergence(base, Adapter.new(base, AdapterSpec(rank=64, alpha=8, init="loftq")), exact_logits)
    assert more < 0.6 * without


def test_loftq_fits_what_packing_lost_and_leaves_the_base_alone() -> None:
    base = tiny()
    dense = tiny(None)
    adapter = Adapter.new(base, AdapterSpec(rank=8, alpha=4, init="loftq"), seed=1)
    for name, own in adapter.factors.items():
        lost = dense.sites[name].weight() - base.sites[name].weight()
        left = lost - adapter.spec.scale(name) * own.tensors["b"] @ own.tensors["a"]
        values = torch.linalg.svdvals(lost)
        assert left.norm().item() == pytest.approx(values[8:].square().sum().sqrt().item(), rel=1e-3), name
        assert not own.anchors
    assert not INITS.get("loftq").starts_at_base


def test_a_site_that_was_left_dense_starts_by_default_under_loftq() -> None:
    base = tiny()
    adapter = Adapter.new(base, AdapterSpec(rank=4, init="loftq", sites=("all-linear", "embed_tokens")), seed=1)
    name = next(name for name, site in base.sites.items() if site.kind.name == "embedding")
    default = Adapter.new(base, AdapterSpec(rank=4, sites=("embed_tokens",)), seed=1)
    assert all(
        torch.equal(value, default.factors[name].tensors[key]) for key, value in adapter.factors[name].tensors.items()
    )


def test_loftq_on_a_base_that_is_not_packed_is_refused(make_base) -> None:
    with pytest.raises(SpecError, match="none of the 14 sites is packed") as caught:
        Adapter.new(make_base(), AdapterSpec(rank=4, init="loftq"))
    assert "pissa" in str(caught.value.allowed)


def test_loftq_without_the_original_weights_says_what_is_missing() -> None:
    base, _ = packed_linear()
    with pytest.raises(BaseNotFound, match="weights before packing are needed, and one was not read from a folder"):
        Adapter.new(base, AdapterSpec(rank=4, init="loftq", sites=("site",)))


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_loftq_packing_keeps_its_best_turn_at_any_scale(scale: float) -> None:
    weight = with_spectrum(256, 256)
    for rank, turns in ((8, 5), (64, 8)):
        packed, a, b, errors = loftq_pack(weight, "nf4", rank, scale, turns)
        assert len(errors) == turns + 1
        assert errors[0] == pytest.approx((weight - pack(weight, "nf4").dense(torch.float32)).norm().item())
        got = (weight - packed.dense(torch.float32) - scale * b @ a).norm().item()
        assert got == pytest.approx(min(errors[1:]), rel=1e-4)
        assert got < 0.9 * errors[0]
    assert errors[-1] > min(errors), "the turns of this case are not monotone, which is why the best is kept"


@pytest.mark.parametrize(("rank", "turns"), [(0, 5), (257, 5), (8, 0)])
def test_loftq_packing_refuses_what_it_cannot_do(rank: int, turns: int) -> None:
    with pytest.raises(SpecError):
        loftq_pack(with_spectrum(256, 256), "nf4", rank, 1.0, turns)


def test_a_base_packed_by_loftq_and_its_factors_are_nearer_than_factors_on_plain_packing(exact_logits: Tensor) -> None:
    base, dense = tiny(), tiny(None)
    spec = AdapterSpec(rank=8, alpha=4)
    fixed = divergence(base, Adapter.new(base, replace(spec, init="loftq")), exact_logits)
    packing = LoftqPacking("nf4", spec)
    for name, site in list(base.sites.items()):
        if site.packed is not None:
            own = dense.sites[name]
            put_module(dense.model, name, pack_module(own.module, packing(name, own.weight()), torch.float32))
    turned = FrozenModel(dense.model, name="loftq", tokenizer=dense.tokenizer, head=dense.head)
    turned.tokenizer = dense.tokenizer
    adapter = Adapter.of(turned, spec, packing.factors)
    assert set(adapter.factors) == {name for name, site in turned.sites.items() if site.packed is not None}
    found = divergence(turned, adapter, exact_logits)
    print(f"KL to the original: {fixed:.3e} factors alone, {found:.3e} packed by turns")
    assert found < fixed
    again = Adapter.of(turned, replace(spec, rank=5), packing.factors)
    assert {again.spec.rank_at(name) for name in again.factors} == {8}


def test_the_original_of_a_packed_folder_is_found_and_another_base_is_refused(tmp_path: Path) -> None:
    from manylora.base.load import find_base, load_base
    from manylora.base.original import Originals
    from manylora.base.packing.folder import quantise_folder

    original = shutil.copytree(find_base("builtin:tiny-en"), tmp_path / "original")
    quantise_folder(str(original), tmp_path / "packed", "nf4")
    base = load_base(str(tmp_path / "packed"), dtype="float32", device="cpu")
    spec = AdapterSpec(rank=4, init="loftq", sites=("q_proj",))
    adapter = Adapter.new(base, spec, seed=1)
    at_load = Adapter.new(tiny(), spec, seed=1)
    assert all(
        torch.equal(value, at_load.factors[name].tensors[key])
        for name, own in adapter.factors.items()
        for key, value in own.tensors.items()
    )
    site = base.sites[next(iter(adapter.factors))]
    weights = load_file(original / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatch, match="is not what"):
        Originals(base).weight(site)
    shutil.rmtree(original)
    with pytest.raises(BaseNotFound, match="which is not there"):
        Adapter.new(base, spec)


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_matches_no_adapted_site_is_refused_with_near_names(key: str, make_base) -> None:
    base = make_base()
    with pytest.raises(SiteNotFound, match=rf"{key}: 'q_porj' matches none of the \d+ low-rank sites") as caught:
        Adapter.new(base, AdapterSpec(rank=2, **{key: {"q_porj": 8}}))
    assert "q_proj" in str(caught.value)
    with pytest.raises(SiteNotFound, match=f"{key}: 'v_proj' matches none of the"):
        Adapter.new(base, AdapterSpec(rank=2, sites=("q_proj",), **{key: {"v_proj": 8}}))
