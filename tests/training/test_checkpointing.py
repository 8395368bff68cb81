"""Layers that are computed again give the same gradients, keep less, and nothing is kept below the first adapter."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_bases import CONFIGS, VOCABULARY, fill, language_base, ragged_batch, taken
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.base.layers import repeated_layers
from manylora.base.load import load_base
from manylora.errors import ConfigError
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.objectives.classification import CLASSIFICATION
from manylora.objectives.objective import ALONE, Stateless
from manylora.spec import AdapterSpec
from manylora.training.checkpointing import MODES, checkpointed, choose_checkpointing
from manylora.training.footprint import saved_bytes
from manylora.types import Batch, Beside, Outputs, RowTotals


class Squares(Stateless):
    """An objective of another kind: squared nats."""

    def weight(self, batch: Batch) -> Tensor:
        return CAUSAL_LM.weight(batch)

    def __call__(self, outputs: Outputs, batch: Batch, beside: Beside = ALONE) -> RowTotals:
        return RowTotals(CAUSAL_LM(outputs, batch).total.square())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_gradients(base: FrozenModel, batch: Batch, objectives: dict[int, Any]) -> dict[str, int]:
    """The bytes that are kept, by mode."""
    plain = taken(base, batch, objectives)
    assert any(value.abs().max() > 0 for name, value in plain.items() if name != "losses")
    held = {}

    def forward() -> Tensor:
        with base.bank.route(batch.slots, batch.streams):
            return next(iter(objectives.values()))(base.outputs(batch), batch).total

    for mode in MODES:
        with checkpointed(base, mode):
            again = [taken(base, batch, objectives) for _ in range(2)]
            held[mode] = saved_bytes(base, forward)
        for found in again:
            assert found.keys() == plain.keys()
            for name, value in plain.items():
                assert torch.equal(found[name], value), f"{mode}: {name}"
    return held


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_are_those_without_checkpointing_to_the_bit(kind: str) -> None:
    base = language_base(kind)
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank)
        objectives = {-1: CAUSAL_LM, 0: CAUSAL_LM, 1: Squares(), 2: CAUSAL_LM}
        held = assert_same_gradients(base, ragged_batch(base), objectives)
    assert held["full"] < held["selective"] < held["none"]


def test_gradients_of_whole_copies_are_the_same() -> None:
    base = language_base()
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(method="full", sites=("everything",)), AdapterSpec(rank=4, dropout=0.1)))
        held = assert_same_gradients(base, ragged_batch(base, (0, 1, 1, 0)), {0: CAUSAL_LM, 1: CAUSAL_LM})
    assert held["full"] < held["none"]


def test_gradients_on_a_quantised_base_are_the_same(tiny_base_folder) -> None:
    base = load_base(str(tiny_base_folder), dtype="float32", quantize="nf4")
    with Bank(base, num_slots=3, dtype=torch.float32) as bank:
        fill(bank)
        held = assert_same_gradients(base, ragged_batch(base), dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM))
    assert held["full"] < held["selective"] < held["none"]


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(inplace=True))
        self.outer = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


class Staged(nn.Module):
    def __init__(self, *depths: int):
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block(16) for _ in range(depth))) for depth in depths)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def plain_base(model: nn.Module) -> FrozenModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    example = {"x": torch.randn(8, 16, dtype=torch.float64)}
    return FrozenModel(model.double(), example=lambda rows: {"x": example["x"][:rows]})


def test_a_product_that_is_written_to_in_place_is_done_again() -> None:
    base = plain_base(Staged(4))
    inputs = {"x": torch.randn(6, 16, dtype=torch.float64)}
    batch = Batch(
        inputs=inputs, targets={"labels": torch.arange(6) % 3}, slots=(0, 0, 1, 1, -1, 0), streams=tuple(range(6))
    )
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=3, dropout=0.1), AdapterSpec(rank=5)))
        assert_same_gradients(base, batch, dict.fromkeys((-1, 0, 1), CLASSIFICATION))


# -- which layers ------------------------------------------------------------------------------------------------------


def names_of(base: FrozenModel) -> list[str]:
    return [layer.name for layer in repeated_layers(base.model, base.sites)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_layers_of_a_model_are_found(kind: str) -> None:
    found = names_of(language_base(kind))
    assert [name.rsplit(".", 1)[1] for name in found] == ["0", "1", "2"]
    assert len({name.rsplit(".", 1)[0] for name in found}) == 1


def test_of_stages_of_blocks_the_blocks_are_the_layers() -> None:
    assert names_of(plain_base(Staged(2, 6, 2))) == [
        f"stages.{stage}.{block}" for stage, depth in enumerate((2, 6, 2)) for block in range(depth)
    ]


class Experts(nn.Module):
    """Layers, each with a list of experts beside other sites: a token passes through one of the experts."""

    def __init__(self, layers: int = 4, experts: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": Block(16), "experts": nn.ModuleList(Block(16) for _ in range(experts))})
            for _ in range(layers)
        )


def test_of_layers_of_experts_the_layers_are_the_layers() -> None:
    model = Experts()
    assert [layer.name for layer in repeated_layers(model, FrozenModel(model).sites)] == [
        f"layers.{n}" for n in range(4)
    ]


@pytest.mark.parametrize("model", [nn.Linear(16, 3), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))])
def test_a_base_without_layers_is_left_alone_unless_it_is_asked(model: nn.Module) -> None:
    base = plain_base(model)
    assert names_of(base) == []
    with checkpointed(base, "none") as found:
        assert found.stronger() is None
    with pytest.raises(ConfigError, match="no repeated layers"), checkpointed(base, "full"):
        pass


def test_the_base_is_given_back_as_it_was() -> None:
    base = language_base()
    before = {name: dict(module.__dict__) for name, module in base.model.named_modules()}
    with checkpointed(base, "full"), checkpointed(base, "selective"):
        assert any(dict(module.__dict__) != before[name] for name, module in base.model.named_modules())
    assert all(dict(module.__dict__) == before[name] for name, module in base.model.named_modules())


# -- what is kept ------------------------------------------------------------------------------------------------------


def kept(base: LanguageBase, spec: AdapterSpec, batch: Batch) -> int:
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (spec,))

        def forward() -> Tensor:
            with bank.route(batch.slots, batch.streams):
                return base.outputs(batch).hidden.sum()  # pyright: ignore[reportAttributeAccessIssue]

        return saved_bytes(base, forward)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_kept_below_the_first_adapted_layer(kind: str, mode: str) -> None:
    spec = AdapterSpec(rank=4, dropout=0.1, layers=(4, 5))
    of_six, of_twelve = language_base(kind, 6), language_base(kind, 12)
    batch = ragged_batch(of_six, (0, 0, 0))
    upper = AdapterSpec(rank=4, dropout=0.1, layers=(10, 11))
    with checkpointed(of_six, mode), checkpointed(of_twelve, mode):  # pyright: ignore[reportArgumentType]
        # As many adapted layers on top; six more below them.
        assert kept(of_six, spec, batch) == kept(of_twelve, upper, batch)
        everywhere = AdapterSpec(rank=4, dropout=0.1)
        half = AdapterSpec(rank=4, dropout=0.1, layers=(3, 4, 5))
        # The last layer keeps all that is inside it whatever the mode.
        share = {"none": 0.65, "selective": 0.75, "full": 1.0}[mode]
        assert kept(of_six, half, batch) < share * kept(of_six, everywhere, batch)


def test_no_gradient_is_computed_below_the_first_adapted_site() -> None:
    base = language_base("llama", 4)
    batch = ragged_batch(base, (0, 0, 0))
    reached: list[str] = []
    for layer in repeated_layers(base.model, base.sites):

        def note(module: nn.Module, args: tuple, output: Any, name: str = layer.name) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: reached.append(name))

        layer.module.register_forward_hook(note)
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=4, sites=("down_proj",), layers=(2, 3)),))
        for mode in MODES:
            reached.clear()
            with checkpointed(base, mode):
                taken(base, batch, {0: CAUSAL_LM})
            assert sorted(set(reached)) == ["model.layers.2", "model.layers.3"]


def test_a_head_that_is_adapted_alone_holds_no_logits() -> None:
    base = language_base("llama", 2)
    batch = ragged_batch(base, (0,) * 6)
    tokens = int(batch.targets["labels"].ge(0).sum())
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=4, sites=("lm_head",)),))

        def forward() -> Tensor:
            with bank.route(batch.slots, batch.streams):
                return CAUSAL_LM(base.outputs(batch), batch).total

        assert saved_bytes(base, forward) < tokens * VOCABULARY * 8


@pytest.mark.parametrize(("mode", "gone"), [("none", False), ("selective", True), ("full", True)])
def test_what_is_computed_again_is_really_freed(mode: str, gone: bool) -> None:
    base = language_base("llama", 4)
    batch = ragged_batch(base, (0, 0, 0))
    seen: list[StorageWeakRef] = []
    layers = repeated_layers(base.model, base.sites)[:-1]
    for layer in layers:
        down: nn.Module = layer.module.get_submodule("mlp.down_proj")
        down.register_forward_pre_hook(lambda module, args: seen.append(StorageWeakRef(args[0].untyped_storage())))
    with Bank(base, dtype=torch.float64) as bank:
        fill(bank, (AdapterSpec(rank=4, dropout=0.1),))
        with checkpointed(base, mode), bank.route(batch.slots, batch.streams):  # pyright: ignore[reportArgumentType]
            held: Any = base.outputs(batch)
            gc.collect()
            assert [one.expired() for one in seen] == [gone] * len(layers)
            assert held.hidden.requires_grad


# -- the choice --------------------------------------------------------------------------------------------------------

TOTALS = {"none": 100, "selective": 60, "full": 20}


@pytest.mark.parametrize(
    ("free", "mode"), [(100, "none"), (99, "selective"), (60, "selective"), (59, "full"), (20, "full"), (19, "full")]
)
def test_auto_is_the_fastest_that_fits(free: int, mode: str) -> None:
    chosen, reason = choose_checkpointing("auto", TOTALS, free)
    assert chosen == mode
    assert reason.startswith(f"checkpointing: {mode}, ")
    assert ("may not hold" in reason) == (free < 20)
    assert "\n" not in reason


@pytest.mark.parametrize("mode", MODES)
def test_what_is_asked_for_is_kept_and_doubted(mode: str) -> None:
    assert choose_checkpointing(mode, TOTALS, 1000)[0] == mode
    assert "may not hold" not in choose_checkpointing(mode, TOTALS, 1000)[1]
    chosen, reason = choose_checkpointing(mode, {mode: TOTALS[mode]}, 10)
    assert chosen == mode
    assert "may not hold" in reason
