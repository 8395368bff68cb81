"""Compressed adapters: what is lost is measured, and what is written is what was measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.compress import bits, spectrum, split
from manylora.adapters.compress.balance import balanced
from manylora.adapters.compress.compressed import compress
from manylora.adapters.compress.file import COMPRESSED_FILE
from manylora.adapters.compress.reduce import Recipe, reduced
from manylora.adapters.compress.scheme import Part
from manylora.adapters.compress.schemes import SCHEMES
from manylora.errors import AdapterBroken, BaseMismatch, CompressRefused, ConfigError, OutputExists
from manylora.ops.rounding import INT4, Grid, fake_quantised
from manylora.spec import AdapterSpec
from manylora.types import Factors

if TYPE_CHECKING:
    from pathlib import Path

    from manylora.base.frozen import FrozenModel
    from manylora.base.language import LanguageBase

BITS = {"int8": 8, "int4": 4, "split": 2}


def random_adapter(base: FrozenModel, spec: AdapterSpec, *, decay: float = 0.0, size: float = 0.1) -> Adapter:
    """Factors whose later components are smaller, as training leaves them, mixed by an invertible matrix."""
    adapter = Adapter.new(base, spec, seed=1)
    generator = torch.Generator().manual_seed(2)
    factors = {}
    for name, own in adapter.factors.items():
        drawn = {key: size * torch.randn(value.shape, generator=generator) for key, value in own.tensors.items()}
        if own.method == "lora" and decay:
            rank = drawn["a"].shape[0]
            drawn["b"] = drawn["b"] * torch.logspace(0, -decay, rank)
            mix = torch.randn(rank, rank, generator=generator)
            drawn = {"a": torch.linalg.solve(mix, drawn["a"]), "b": drawn["b"] @ mix}
        factors[name] = Factors(own.method, drawn)
    return replace(adapter, factors=factors)


SPEC = AdapterSpec(
    rank=6, alpha=9.0, sites=("q_proj", "up_proj", "embed_tokens"), full_sites=("lm_head",),
    rank_pattern={r"model\.layers\.1\.self_attn\.q_proj": 3},
)  # fmt: skip


@pytest.fixture
def adapter(base: LanguageBase) -> Adapter:
    return random_adapter(base, SPEC, decay=1.0)


@pytest.fixture
def folder(adapter: Adapter, base: LanguageBase, tmp_path: Path) -> Path:
    return adapter.save(tmp_path / "adapter", base)


def logits(base: FrozenModel, adapter: Adapter) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12)
    with Bank(base) as bank, torch.no_grad():
        bank.put(adapter, slot=0)
        with bank.route([0, 0]):
            return base.model(input_ids=tokens).logits


# -- what a scheme is worth --------------------------------------------------------------------------------------------


def relative_error(a, b, kept_a, kept_b) -> float:
    return spectrum.difference_norm(a, b, kept_a, kept_b) / spectrum.product_norm(a, b)


def kept_by(scheme: str, a: torch.Tensor, b: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = SCHEMES.get(scheme)
    parts = chosen.encode(a, b, options)
    rows = [
        chosen.decode(Part("a factor", a.shape[0], size, dict(part)), chosen.settings(options))
        for part, size in zip(parts, (a.shape[1], b.shape[0]), strict=True)
    ]
    return rows[0], rows[1].t()


def test_gaussian_factors_of_256_by_8_lose_what_is_known_of_them():
    torch.manual_seed(0)
    found = {127: [], 7: []}
    for _ in range(20):
        a, b = torch.randn(8, 256), torch.randn(256, 8)
        for largest, errors in found.items():
            grid = Grid(largest)
            errors.append(relative_error(a, b, grid.rounded(a), grid.rounded(b.t()).t()))
    assert sum(found[127]) / 20 == pytest.approx(0.0105, rel=0.1)
    assert sum(found[7]) / 20 == pytest.approx(0.191, rel=0.1)


def test_the_scales_of_int8_fold_into_one_number_for_each_component():
    a, b = drawn_factors("mixed decay", 3)
    part_a, part_b = SCHEMES.get("int8").encode(a, b, {})
    kept_a, kept_b = kept_by("int8", a, b)
    folded = part_a["step"].double().flatten() * part_b["step"].double().flatten()
    whole = part_b["codes"].double().t() * folded @ part_a["codes"].double()
    assert torch.allclose(whole, kept_b.double() @ kept_a.double(), rtol=1e-12, atol=1e-15)


def drawn_factors(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rank = (4, 8, 12, 16)[seed % 4]
    a, b = torch.randn(rank, 96, generator=generator), torch.randn(160, rank, generator=generator)
    if "decay" in kind:
        b = b * torch.logspace(0, -1.5, rank)
    if "mixed" in kind:
        mix = torch.randn(rank, rank, generator=generator)
        a, b = torch.linalg.solve(mix, a), b @ mix
    return a, b


def errors_of(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float, float]:
    """What four bits lose of the factors as they are, of U sqrt(S) and sqrt(S) V, and of the levelled ones."""
    u, sigma, v = spectrum.components(a, b)
    pairs = ((a, b), tuple(half.float() for half in spectrum.halves(u, sigma, v)), balanced(a, b))
    as_is, by_svd, level = (relative_error(a, b, *fake_quantised(*pair, "int4")) for pair in pairs)
    return as_is, by_svd, level


def test_balanced_factors_lose_less_wherever_components_differ_in_size_or_are_mixed():
    for kind in ("decay", "mixed", "mixed decay"):
        errors = [errors_of(*drawn_factors(kind, seed)) for seed in range(40)]
        assert all(level <= as_is for as_is, _, level in errors), kind
    # Of independent Gaussian components of one size neither is better on average; singular components alone never are.
    even = [errors_of(*drawn_factors("", seed)) for seed in range(40)]
    assert 0.6 < sum(level <= as_is for as_is, _, level in even) / 40 < 0.95
    assert 0.3 < sum(by_svd <= as_is for as_is, by_svd, _ in even) / 40 < 0.8


def test_a_product_of_low_effective_rank_gains_most_from_levelling():
    errors = torch.tensor([errors_of(*drawn_factors("decay", 4 * seed + 3)) for seed in range(10)])
    as_is, by_svd, level = errors.mean(0)
    assert level < 0.75 * by_svd
    assert level < 0.75 * as_is


def test_int4_loses_no_more_than_the_factors_as_they_are():
    for kind in ("", "decay", "mixed", "mixed decay"):
        for seed in range(10):
            a, b = drawn_factors(kind, seed)
            as_is, _, level = errors_of(a, b)
            assert relative_error(a, b, *kept_by("int4", a, b)) == pytest.approx(min(as_is, level), rel=1e-6)


def test_mixed_factors_lose_little_in_int8():
    for seed in range(10):
        a, b = drawn_factors("mixed", seed)
        assert relative_error(a, b, *kept_by("int8", a, b)) < 0.012


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_factors_that_were_trained_on_the_grid_lose_nothing(scheme):
    a, b = fake_quantised(*drawn_factors("decay", 3), scheme)
    kept_a, kept_b = kept_by(scheme, a, b)
    assert torch.equal(kept_a, a)
    assert torch.equal(kept_b, b)


def test_levelling_keeps_the_product_and_evens_out_its_components():
    a, b = drawn_factors("decay", 3)
    new_a, new_b = balanced(a, b)
    assert relative_error(a, b, new_a, new_b) < 1e-6
    sizes = torch.cat([new_a.norm(dim=1), new_b.norm(dim=0)])
    assert float(sizes.max() / sizes.min()) < 1.0001


def test_split_keeps_as_many_components_in_two_bits_as_the_share_needs():
    u, v = torch.linalg.qr(torch.randn(40, 5))[0], torch.linalg.qr(torch.randn(30, 5))[0]
    sigma = torch.tensor([10.0, 5.0, 4.0, 3.0, 1.0]).sqrt()  # sigma^2: shares of 10, 15, 19, 22, 23 in 23
    a, b = v.t() * sigma.sqrt()[:, None], u * sigma.sqrt()
    for rho, count in ((0.4, 1), (0.5, 2), (0.8, 3), (0.9, 4), (0.99, 5), (1.0, 5)):
        part = SCHEMES.get("split").encode(a, b, {"rho": rho})[0]
        assert len(part["high.codes"]) == count, rho
        assert ("low.codes" in part) == (count < 5)
    assert len(SCHEMES.get("split").encode(a, b, {"rho": 10.001 / 23})[0]["high.codes"]) == 2


def test_four_levels_lose_less_than_a_range_from_least_to_largest():
    torch.manual_seed(0)
    x = torch.randn(500, 128)
    part = split._four_levels(x)
    kept = (bits.from_bytes(part["high.codes"], 2, 128).float() - 1.5) * part["high.step"].float()
    low, step = x.amin(1, keepdim=True), (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 3
    ranged = ((x - low) / step).round() * step + low
    assert float((x - kept).square().mean().sqrt()) == pytest.approx(0.34, abs=0.01)
    assert float((x - ranged).square().mean().sqrt()) == pytest.approx(0.50, abs=0.01)


def test_signs_are_multiplied_by_the_mean_magnitude_of_their_group():
    rows = torch.tensor([[1.0, -3.0, 0.0, 4.0]])
    part = split._signs(rows)
    assert float(part["low.mean"]) == 2.0
    assert bits.from_bytes(part["low.codes"], 1, 4).tolist() == [[1, 0, 1, 1]]


def test_more_bits_lose_less(adapter):
    errors = [reduced(adapter, Recipe(scheme=scheme)).error for scheme in ("int8", "int4", "split")]
    errors.append(reduced(adapter, Recipe(scheme="split", rho=0.3)).error)
    assert errors == sorted(errors)
    assert errors[0] < 0.01


@given(st.integers(1, 4).map(lambda power: 2 ** (power - 1)).filter(lambda size: size < 8), st.integers(1, 70))
@settings(max_examples=examples(60), deadline=None)
def test_codes_come_back_from_their_bytes(num_bits, columns):
    codes = torch.randint(0, 2**num_bits, (3, columns), dtype=torch.uint8)
    packed = bits.to_bytes(codes, num_bits)
    assert packed.shape == (3, bits.num_bytes(columns, num_bits))
    assert torch.equal(bits.from_bytes(packed, num_bits, columns), codes)


def test_the_first_code_of_a_byte_lies_in_its_highest_bits():
    assert bits.to_bytes(torch.tensor([[1, 2, 3]]), 4).tolist() == [[0x12, 0x30]]


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(BITS))
def test_every_byte_of_codes_and_scales_is_counted(scheme, folder, base, tmp_path):
    report = compress(folder, bits=BITS[scheme], output=tmp_path / "small")
    stored = load_file(tmp_path / "small" / COMPRESSED_FILE)
    coded = sum(value.nbytes for key, value in stored.items() if "lora_" in key)
    copies = sum(value.nbytes for key, value in stored.items() if "lora_" not in key)
    numbers = sum(
        value.numel() for key, value in load_file(folder / "adapter_model.safetensors").items() if "lora_" in key
    )
    assert report.num_parameters == numbers
    assert report.bits == 8 * coded / numbers
    assert (report.bytes_after, report.copies_bytes) == (coded + copies, copies)
    before = sum(value.nbytes for value in load_file(folder / "adapter_model.safetensors").values())
    assert report.bytes_before == before == 2 * report.bytes_bf16


def test_bits_are_what_the_format_says():
    torch.manual_seed(0)
    a, b = torch.randn(16, 256), torch.randn(512, 16)

    def measured(scheme: str, **options: float) -> float:
        parts = SCHEMES.get(scheme).encode(a, b, options)
        return 8 * sum(v.nbytes for part in parts for v in part.values()) / (a.numel() + b.numel())

    assert measured("int8") == 8 + 16 * 2 / (256 + 512)
    assert measured("int4") == 4 + 16 / 64
    assert measured("split", rho=1.0) == 2 + 16 / 128
    count = len(SCHEMES.get("split").encode(a, b, {"rho": 0.6})[0]["high.codes"])
    assert measured("split", rho=0.6) == (count * 2 + (16 - count)) / 16 + 16 / 128


def test_int8_takes_half_the_bytes_of_bf16_and_changes_next_to_nothing(tmp_path):
    import manylora

    base = manylora.load_base("builtin:tiny-en", dtype="float32")
    adapter = random_adapter(base, AdapterSpec(rank=8), decay=1.0, size=0.05)
    adapter.save(tmp_path / "adapter", base)
    report = compress(tmp_path / "adapter", base=base, output=tmp_path / "small")
    assert report.recipe.scheme == "int8"
    assert report.base_logits.kl > 1e-2  # the adapter does something
    assert report.kl < 1e-4
    assert report.bytes_after < 0.51 * report.bytes_bf16
    file_bytes = (tmp_path / "small" / COMPRESSED_FILE).stat().st_size
    assert file_bytes < 0.6 * report.bytes_bf16  # with the names of tensors, which weigh more in a small adapter


# -- disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", sorted(BITS))
def test_codes_come_back_from_disk_bit_by_bit(scheme, adapter, base, folder, tmp_path):
    small = tmp_path / "small"
    report = compress(folder, bits=BITS[scheme], base=base, output=small)
    made = reduced(Adapter.load(folder), Recipe(scheme=scheme))
    stored = load_file(small / COMPRESSED_FILE)
    for site, (part_a, part_b) in made.coded.items():
        embedding = adapter.kinds.get(site) == "embedding"
        for letter, part in (("A", part_a), ("B", part_b)):
            ending = f"lora_embedding_{letter}" if embedding else f"lora_{letter}.weight"
            key = f"base_model.model.{site}.{ending}"
            for name, value in part.items():
                assert stored[f"{key}.{name}"].dtype == value.dtype
                assert torch.equal(stored[f"{key}.{name}"], value)
    loaded = Adapter.load(small)
    for site, own in made.adapter.factors.items():
        for name, value in own.tensors.items():
            assert loaded.factors[site].tensors[name].dtype == torch.float32
            assert torch.equal(loaded.factors[site].tensors[name], value)
            if own.method == "full":
                assert torch.equal(value, adapter.factors[site].tensors[name])
        assert loaded.spec.scale(site) == pytest.approx(adapter.spec.scale(site), rel=1e-12)
    assert torch.equal(logits(base, loaded), logits(base, made.adapter))
    assert json.loads((small / "compress_report.json").read_text())["kl"] == report.kl
    assert json.loads((small / "receipt.json").read_text())["compression"]["scheme"] == scheme


def test_a_compressed_adapter_becomes_an_ordinary_one_again(folder, base, tmp_path):
    compress(folder, bits=4, output=tmp_path / "small")
    loaded = Adapter.load(tmp_path / "small")
    loaded.save(tmp_path / "again", base)
    again = Adapter.load(tmp_path / "again")
    assert "compression" not in again.receipt
    assert torch.equal(logits(base, again), logits(base, loaded))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_does_not_take_a_compressed_folder_for_an_adapter(folder, base, tmp_path):
    peft = pytest.importorskip("peft")
    small = tmp_path / "small"
    compress(folder, bits=8, output=small)
    assert not (small / "adapter_model.safetensors").exists()
    with pytest.raises((ValueError, OSError)):
        peft.PeftModel.from_pretrained(base.model, small)


def test_the_tokenizer_and_the_configuration_go_along(folder, tmp_path):
    (folder / "config.yaml").write_text("base: tiny\n")
    (folder / "optimizer.pt").write_bytes(b"left behind")
    compress(folder, bits=8, output=tmp_path / "small")
    held = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.yaml", "compress_report.json"} <= held
    assert "optimizer.pt" not in held
    assert "manylora.Adapter.load" in (tmp_path / "small" / "README.md").read_text()


def test_the_receipt_still_says_how_the_base_was_stored_in_training(folder, base, tmp_path):
    path = folder / "receipt.json"
    receipt = json.loads(path.read_text())
    receipt["base"]["storage"] = "nf4"
    path.write_text(json.dumps(receipt))
    compress(folder, bits=8, base=base, output=tmp_path / "small")
    assert Adapter.load(tmp_path / "small").receipt["base"] == receipt["base"]


def test_compressing_again_as_before_changes_nothing(folder, tmp_path):
    compress(folder, bits=8, output=tmp_path / "one")
    report = compress(tmp_path / "one", bits=8, output=tmp_path / "two")
    assert report.error == 0.0
    one, two = ((tmp_path / name / COMPRESSED_FILE).read_bytes() for name in ("one", "two"))
    assert one == two


def test_an_occupied_folder_is_left_alone(folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match="already holds"):
        compress(folder, bits=8, output=tmp_path / "taken")
    assert (tmp_path / "taken" / "mine.txt").read_text() == "mine"


def edited(folder: Path, change) -> Path:
    """A compressed folder whose tensors were changed by one who means it: without the receipt that would tell."""
    path = folder / COMPRESSED_FILE
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    (folder / "receipt.json").unlink(missing_ok=True)
    return folder


A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def drop_header(tensors, metadata):
    del metadata["compression"]


def header(**changes):
    def change(tensors, metadata):
        metadata["compression"] = json.dumps(json.loads(metadata["compression"]) | changes)

    return change


def drop(name):
    return lambda tensors, metadata: tensors.pop(f"{A_KEY}.{name}")


def put(name, make):
    def change(tensors, metadata):
        tensors[f"{A_KEY}.{name}"] = make(tensors.get(f"{A_KEY}.{name}"))

    return change


@pytest.mark.parametrize(
    ("scheme", "change", "told"),
    [
        ("int8", drop_header, "does not say how its codes"),
        ("int8", header(scheme="int9"), "int9"),
        ("int8", header(version=2), "version 2"),
        ("int8", header(shapes={A_KEY: [6, -1]}), "shapes that cannot be read"),
        ("int8", header(shapes={}), "unexpected tensor"),
        ("int8", drop("codes"), "lacks its 'codes'"),
        ("int8", drop("step"), "lacks its 'step'"),
        ("int8", put("codes", lambda codes: codes[:, :-1].clone()), "'codes' of"),
        ("int8", put("codes", lambda codes: codes.short()), "int16"),
        ("int8", put("codes", lambda codes: codes.fill_(-128)), "the code -128"),
        ("int8", put("step", lambda step: step.fill_(float("nan"))), "not finite"),
        ("int8", put("step", torch.neg), "negative"),
        ("int8", put("more", lambda _: torch.zeros(1)), "unexpected 'more'"),
        ("int8", lambda tensors, _: tensors.update({A_KEY: torch.zeros(6, 32)}), "both coded and plain"),
        ("int4", header(settings={"group": 32}), "groups of 32"),
        ("int4", put("codes", lambda codes: codes.fill_(0)), "the code -8"),
        ("int4", put("codes", lambda codes: codes[:3].clone()), "'codes' of"),
        ("split", header(settings={"group": 64, "rho": 0.8}), "groups of 64"),
        ("split", drop("high.step"), "lacks its 'high.step'"),
        ("split", drop("low.mean"), "lacks its 'low.mean'"),
        ("split", put("high.codes", lambda codes: codes[:1].clone()), "high.step"),
    ],
)
def test_a_changed_file_is_told_by_name(scheme, change, told, folder, tmp_path):
    compress(folder, bits=BITS[scheme], output=tmp_path / "small")
    broken = edited(tmp_path / "small", change)
    with pytest.raises(AdapterBroken) as caught:
        Adapter.load(broken)
    assert told in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 300, -1])
def test_a_truncated_file_is_told(kept, folder, tmp_path):
    compress(folder, bits=8, output=tmp_path / "small")
    path = tmp_path / "small" / COMPRESSED_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(AdapterBroken, match="receipt"):
        Adapter.load(tmp_path / "small")
    (tmp_path / "small" / "receipt.json").unlink()
    with pytest.raises(AdapterBroken, match="truncated"):
        Adapter.load(tmp_path / "small")


def test_one_changed_bit_is_told_by_the_receipt(folder, tmp_path):
    compress(folder, bits=8, output=tmp_path / "small")
    path = tmp_path / "small" / COMPRESSED_FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(AdapterBroken, match="SHA-256"):
        Adapter.load(tmp_path / "small")


def test_two_files_of_tensors_are_one_too_many(folder, tmp_path):
    compress(folder, bits=8, output=tmp_path / "small")
    shutil.copy(folder / "adapter_model.safetensors", tmp_path / "small")
    with pytest.raises(AdapterBroken, match="both"):
        Adapter.load(tmp_path / "small")


# -- fewer components --------------------------------------------------------------------------------------------------


def test_a_cut_is_the_best_of_its_rank_and_keeps_the_scale(adapter, base, folder, tmp_path):
    compress(folder, rank=2, output=tmp_path / "small")
    loaded = Adapter.load(tmp_path / "small")
    assert {own.tensors["a"].shape[0] for own in loaded.factors.values() if own.method == "lora"} == {2}
    for site in adapter.spec.sites:
        own, cut = adapter.factors[site].tensors, loaded.factors[site].tensors
        assert loaded.spec.scale(site) == pytest.approx(adapter.spec.scale(site), rel=1e-12)
        u, sigma, v = torch.linalg.svd(own["b"] @ own["a"])
        best = u[:, :2] * sigma[:2] @ v[:2]
        assert torch.allclose(cut["b"] @ cut["a"], best, atol=1e-5 * float(sigma[0]))


@pytest.mark.parametrize("scale_rule", ["alpha/rank", "alpha/sqrt(rank)"])
def test_energy_gives_each_site_a_rank_of_its_own(base, scale_rule, tmp_path):
    spec = AdapterSpec(rank=8, alpha=12.0, scale_rule=scale_rule, sites=("q_proj", "k_proj", "up_proj"))
    adapter = random_adapter(base, spec, decay=1.0)
    made = reduced(adapter, Recipe(energy=0.99))
    ranks = {site.site: site.rank for site in made.sites}
    assert len(set(ranks.values())) > 1
    for site in made.sites:
        own = adapter.factors[site.site].tensors
        sigma = torch.linalg.svdvals((own["b"] @ own["a"]).double())
        energy = sigma.square().cumsum(0) / sigma.square().sum()
        assert energy[site.rank - 1] >= 0.99 > (energy[site.rank - 2] if site.rank > 1 else 0.0)
        assert site.error == pytest.approx(float((1 - energy[site.rank - 1]).sqrt()), rel=1e-3)
        assert made.adapter.spec.scale(site.site) == pytest.approx(adapter.spec.scale(site.site), rel=1e-12)
    made.adapter.save(tmp_path / "small", base)
    assert torch.equal(logits(base, Adapter.load(tmp_path / "small")), logits(base, made.adapter))


def test_ranks_are_right_where_one_sites_name_ends_another(base):
    from torch import nn

    from manylora.base.frozen import FrozenModel

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["down"](self.inner["up"](self.up(x)))

    torch.manual_seed(0)
    frozen = FrozenModel(Outer())
    adapter = Adapter.new(frozen, AdapterSpec(rank=4, sites=("up", "down")))
    factors = {name: Factors("lora", {"a": torch.randn(4, 8), "b": torch.randn(8, 4)}) for name in adapter.spec.sites}
    small = factors["up"].tensors
    factors["up"] = Factors("lora", {"a": small["a"], "b": small["b"] * torch.tensor([1.0, 1e-4, 1e-4, 1e-4])})
    made = reduced(replace(adapter, factors=factors), Recipe(energy=0.9999))
    found = {name: own.tensors["a"].shape[0] for name, own in made.adapter.factors.items()}
    assert found == {"up": 1, "inner.up": 4, "inner.down": 4}
    assert {name: made.adapter.spec.rank_at(name) for name in found} == found


def test_a_cut_of_nothing_leaves_the_factors_as_they_are(adapter):
    for recipe in (Recipe(rank=6), Recipe(rank=100), Recipe(energy=1.0)):
        made = reduced(adapter, recipe)
        assert made.error == 0.0
        assert made.adapter.spec == adapter.spec


def test_a_cut_and_few_bits_go_together(folder, base, tmp_path):
    report = compress(folder, rank=2, bits=4, base=base, output=tmp_path / "small")
    loaded = Adapter.load(tmp_path / "small")
    assert {site.rank for site in report.sites} == {2}
    assert loaded.factors["model.embed_tokens"].tensors["a"].shape[0] == 2
    assert report.bits < 5


def test_an_adapter_that_learned_nothing_is_compressed_without_an_error(base, tmp_path):
    fresh = Adapter.new(base, AdapterSpec(rank=4))
    for scheme in SCHEMES:
        made = reduced(fresh, Recipe(scheme=scheme))
        assert made.error is None
        assert all(not own.tensors["b"].any() or not own.tensors["a"].any() for own in made.adapter.factors.values())
    assert {site.rank for site in reduced(fresh, Recipe(energy=0.9)).sites} == {1}


def test_a_rank_above_what_a_site_allows_is_compressed_too():
    torch.manual_seed(0)
    a, b = torch.randn(12, 9), torch.randn(200, 12)  # as other tools may write it
    for scheme, most in (("int8", 0.02), ("int4", 0.2), ("split", 0.8)):
        assert relative_error(a, b, *kept_by(scheme, a, b)) < most


def test_the_adapter_that_is_given_stays_as_it_is(adapter):
    before = {name: own.tensors["b"].clone() for name, own in adapter.factors.items() if own.method == "lora"}
    for recipe in (Recipe(scheme="int4"), Recipe(scheme="split"), Recipe(rank=1)):
        reduced(adapter, recipe)
    assert all(torch.equal(adapter.factors[name].tensors["b"], value) for name, value in before.items())


# -- what is measured and refused --------------------------------------------------------------------------------------


def test_the_errors_are_those_of_the_dense_deltas(adapter):
    made = reduced(adapter, Recipe(scheme="int4"))
    squares = [0.0, 0.0]
    for site in made.sites:
        scale = adapter.spec.scale(site.site)
        own, kept = adapter.factors[site.site].tensors, made.adapter.factors[site.site].tensors
        delta = scale * own["b"].double() @ own["a"].double()
        off = scale * kept["b"].double() @ kept["a"].double() - delta
        assert site.error == pytest.approx(float(off.norm() / delta.norm()), rel=1e-9)
        squares = [squares[0] + float(off.square().sum()), squares[1] + float(delta.square().sum())]
    assert made.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-9)
    errors = [site.error for site in made.sites]
    assert errors == sorted(errors, reverse=True)


def test_logits_are_compared_with_those_of_the_adapter_as_it_came(folder, base):
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (1, 20))
    report = compress(folder, bits=2, base=base, probes=tokens.tolist())
    drawn = compress(folder, bits=2, base=base)
    assert report.num_positions == drawn.num_positions + 20
    assert drawn.to_dict() == compress(folder, bits=2, base=base).to_dict()  # the same rows every time
    assert 0 < report.kl < report.logits.max_kl
    assert report.kl < report.base_logits.kl
    assert 0 < report.logits.top1 <= 1


def test_too_large_a_loss_is_refused_and_the_refusal_says_what_would_do(folder, base, tmp_path):
    eight = compress(folder, bits=8, base=base)
    with pytest.raises(CompressRefused) as caught:
        compress(folder, bits=2, base=base, max_kl=2 * eight.kl, output=tmp_path / "small")
    assert not (tmp_path / "small").exists()
    assert "--bits 8 passes" in caught.value.next_step
    report = caught.value.report
    assert not report.passed
    assert report.kl > 2 * eight.kl
    trial = next(one for one in report.others if one.recipe == Recipe(scheme="int8"))
    assert (trial.kl, trial.num_bytes) == (eight.kl, eight.bytes_after)
    assert [one.num_bytes for one in report.others] == sorted(one.num_bytes for one in report.others)


def test_a_refused_cut_names_what_keeps_more(folder, base):
    bound = compress(folder, energy=0.999, base=base).kl * 1.01
    with pytest.raises(CompressRefused) as caught:
        compress(folder, rank=1, base=base, max_kl=bound)
    assert "passes" in caught.value.next_step
    assert {one.recipe for one in caught.value.report.others} >= {Recipe(energy=0.999), Recipe(scheme="int8")}


def test_where_nothing_passes_the_refusal_says_so(folder, base):
    with pytest.raises(CompressRefused, match="nothing that was tried passes"):
        compress(folder, bits=8, base=base, max_kl=0.0)


def test_what_is_within_the_bound_is_written(folder, base, tmp_path):
    report = compress(folder, bits=8, base=base, max_kl=1e-2, output=tmp_path / "small")
    assert report.passed
    assert json.loads((tmp_path / "small" / "compress_report.json").read_text())["max_kl"] == 1e-2


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": 2, "energy": 0.9}, "both given"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"bits": 2, "rho": 0.0}, "rho is 0.0"),
        ({"bits": 2, "rho": 1.2}, "rho is 1.2"),
        ({"bits": 8, "max_kl": 1e-3}, "no base"),
        ({"bits": 8, "max_kl": -1.0}, "max_kl is -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(asked, told, adapter):
    with pytest.raises(ConfigError, match=told):
        compress(adapter, **asked)


def test_an_adapter_of_whole_copies_alone_has_nothing_to_compress(base):
    copies = Adapter.new(base, AdapterSpec(method="full", sites=("lm_head",)))
    with pytest.raises(AdapterBroken, match="no low-rank factors"):
        compress(copies, bits=8)


def test_another_base_is_refused(folder, base, tiny_base_folder):
    import manylora

    other = manylora.load_base(str(tiny_base_folder), dtype="float32")
    with pytest.raises(BaseMismatch):
        compress(folder, bits=8, base=other)


def test_int4_groups_are_as_wide_as_the_format_says():
    assert INT4.group == SCHEMES.get("int4").settings({})["group"] == 64
