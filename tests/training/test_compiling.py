"""Compiled layers give the gradients of the layers as they are, whoever trains and however rows are routed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from random_bases import fill, language_base, ragged_batch, taken
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.frozen import FrozenModel
from manylora.base.load import load_base
from manylora.config import TrainConfig, load_config
from manylora.errors import ConfigError
from manylora.objectives.causal_lm import CAUSAL_LM
from manylora.spec import AdapterSpec
from manylora.training import compiling, loop
from manylora.training.checkpointing import checkpointed
from manylora.training.compiling import choose_compiling, compiled
from manylora.training.member import Member
from manylora.training.prepare import Stock
from manylora.training.run import train

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch compiles for a CPU with a C++ compiler"
)
OBJECTIVES = dict.fromkeys((-1, 0, 1, 2), CAUSAL_LM)
NARROWED = 1e-5
"""The norms of transformers compute in float32 whatever they are given; the ones that stand in for them do not."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_like(found: dict[str, Tensor], plain: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        known = ~value.isnan()  # a slot that the batch does not reach has no loss
        assert torch.equal(~found[name].isnan(), known), name
        assert (found[name] - value)[known].norm() <= tolerance * value[known].norm(), name


@pytest.mark.parametrize(
    ("kind", "num_batches"),
    [("llama", 1), pytest.param("llama", 3, marks=pytest.mark.slow), pytest.param("gpt2", 1, marks=pytest.mark.slow)],
)
def test_gradients_are_those_of_the_layers_as_they_are(kind: str, num_batches: int) -> None:
    """Dropout of 0.1 and 0.2, ragged rows, three ranks, trained norms, rows of the bare base; also rows few or many,
    and members that come while it is open."""
    base = language_base(kind)
    batches = [ragged_batch(base), ragged_batch(base, (1,)), ragged_batch(base, (2, 0, 1), longest=12)]
    batches = batches[:num_batches]  # each further kind of shape costs seconds
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank)
        plain = [taken(base, batch, OBJECTIVES) for batch in batches]
        assert any(value.abs().max() > 0 for name, value in plain[0].items() if name != "losses")
        with compiled(base) as found:
            assert found is not None
            for batch, want in zip(batches, plain, strict=True):
                assert_like(taken(base, batch, OBJECTIVES), want)
            assert found.seconds > 0.0
            before = graphs()
            again = [taken(base, batch, OBJECTIVES) for batch in reversed(batches)]
            assert graphs() == before, "a batch that was seen is compiled again"
            assert_like(again[-1], plain[0])
        assert_like(taken(base, batches[0], OBJECTIVES), plain[0], 0.0)


def test_who_comes_later_is_not_left_out() -> None:
    """A norm that nobody adapted is part of what is compiled; a member that trains it comes, and goes."""
    base = language_base()
    batch = ragged_batch(base, (0, 1, -1))
    norms = AdapterSpec(rank=4, full_sites=("re:.*layernorm",))
    with Bank(base, num_slots=2, dtype=torch.float64) as bank:
        bank.put(Adapter.new(base, AdapterSpec(rank=4), seed=0), slot=0)
        bank.put(Adapter.new(base, norms, seed=1), slot=1)
        plain = taken(base, batch, OBJECTIVES)
        bank.clear(1)
        alone = ragged_batch(base, (0, 0))
        plain_alone = taken(base, alone, OBJECTIVES)
        with compiled(base):
            assert_like(taken(base, alone, OBJECTIVES), plain_alone, NARROWED)
            bank.put(Adapter.new(base, norms, seed=1), slot=1)
            with_norms = taken(base, batch, OBJECTIVES)
            bank.clear(1)
            assert_like(taken(base, alone, OBJECTIVES), plain_alone, NARROWED)
    assert any("layernorm" in name for name in with_norms)
    assert_like(with_norms, plain, NARROWED)


def test_layers_that_are_compiled_are_computed_again_too() -> None:
    base = language_base()
    batch = ragged_batch(base)
    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank)
        plain = taken(base, batch, OBJECTIVES)
        with compiled(base), checkpointed(base, "full"):
            assert_like(taken(base, batch, OBJECTIVES), plain)
        assert_like(taken(base, batch, OBJECTIVES), plain, 0.0)


@pytest.mark.slow
def test_a_quantised_base_is_unpacked_by_its_own_code(tiny_base_folder) -> None:
    base = load_base(str(tiny_base_folder), dtype="float32", quantize="nf4")
    batch = ragged_batch(base)
    with Bank(base, num_slots=3) as bank:
        fill(bank, (AdapterSpec(rank=2, sites=("q_proj",)),) * 3)
        plain = taken(base, batch, OBJECTIVES)
        with compiled(base):
            assert_like(taken(base, batch, OBJECTIVES), plain, 1e-4)


def test_an_evaluation_compiles_nothing_and_the_base_is_given_back() -> None:
    base = language_base()
    batch = ragged_batch(base)

    def states() -> Tensor:
        with torch.no_grad(), base.bank.route(batch.slots):
            return CAUSAL_LM(base.outputs(batch), batch).total

    with Bank(base, num_slots=3, dtype=torch.float64) as bank:
        fill(bank)
        held = {name: dict(site.module.__dict__) for name, site in base.sites.items()}
        plain, before = states(), graphs()
        with compiled(base):
            assert torch.equal(states(), plain)
            assert graphs() == before
        assert {name: dict(site.module.__dict__) for name, site in base.sites.items()} == held
        assert not any("forward" in layer.__dict__ for layer in base.model.model.layers)


def test_a_base_without_layers_is_refused() -> None:
    base = FrozenModel(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with Bank(base), pytest.raises(ConfigError, match="no repeated layers"), compiled(base):
        pass
    with Bank(base), compiled(base, on=False) as found:
        assert found is None


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match="selective"):
        TrainConfig(compile="layers", checkpointing="selective")
    TrainConfig(compile="layers", checkpointing="full")
    TrainConfig(compile="auto", checkpointing="selective")


class TestChoice:
    """What `train.compile` comes to before the first step."""

    @pytest.fixture
    def made(self, tiny_base_folder, tmp_path) -> tuple[FrozenModel, Member, Adapter]:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "a b c", "completion": "d e f"}\n' * 8, encoding="utf-8")
        config = load_config(
            {"base": str(tiny_base_folder), "dtype": "float32", "data": {"train": str(rows)},
             "train": {"epochs": 200, "rows_per_step": 2, "row_tokens": 16}, "output": str(tmp_path / "run")}
        )  # fmt: skip
        stock = Stock(config, use_cache=False)
        return stock.base, *stock.member(config, "main")

    def test_off_and_what_auto_does_not_try(self, made, monkeypatch: pytest.MonkeyPatch) -> None:
        base, member, adapter = made
        monkeypatch.setattr(compiling, "compiled", None)  # whoever tries fails
        assert choose_compiling(base, member, adapter, "off", "none") == (False, "compile: off, train.compile")
        monkeypatch.setattr(compiling, "LEAST_STEPS", member.recipe.last_step + 1)
        on, why = choose_compiling(base, member, adapter, "auto", "none")
        assert not on
        assert "steps are too few" in why
        monkeypatch.setattr(compiling, "LEAST_STEPS", 1)
        on, why = choose_compiling(base, member, adapter, "auto", "none")
        assert not on
        assert "minutes are too few" in why
        on, why = choose_compiling(base, member, adapter, "auto", "selective")
        assert not on
        assert "selective" in why
        assert member.slot == -1
        assert base.bank is None

    def test_auto_keeps_what_is_faster(self, made, monkeypatch: pytest.MonkeyPatch) -> None:
        base, member, adapter = made
        monkeypatch.setattr(compiling, "LEAST_STEPS", 1)
        for seconds, expected in (([9.0, 8.0, 30.0, 7.0, 6.0], True), ([9.0, 8.0, 30.0, 7.9, 9.0], False)):
            told = iter([each * 1000 for each in seconds])
            monkeypatch.setattr(compiling, "_seconds", lambda *_, told=told: next(told))
            on, why = choose_compiling(base, member, adapter, "auto", "none")
            assert on is expected
            assert f"a batch takes {0.75 if expected else 0.99:.2f} of its time" in why

    def test_layers_compile_before_the_first_step(self, made) -> None:
        base, member, adapter = made
        on, why = choose_compiling(base, member, adapter, "layers", "none")
        assert on
        assert "compiling them and the first batch took" in why

    def test_what_is_tried_is_checkpointed_as_the_run_will_be(self, made, monkeypatch: pytest.MonkeyPatch) -> None:
        base, member, adapter = made
        seen: list[str] = []

        def probed(base: FrozenModel, *_: object) -> None:
            layer = base.model.model.layers[0].__dict__["forward"]
            seen.append(f"{layer.run.owner.mode} around {type(layer.beneath.run).__name__}")

        monkeypatch.setattr(compiling, "probe_step", probed)
        choose_compiling(base, member, adapter, "layers", "full")
        assert seen == ["full around _CompiledForward"]

    def test_a_compiler_that_fails_is_told(self, made, monkeypatch: pytest.MonkeyPatch) -> None:
        base, member, adapter = made

        def fails(*_) -> float:
            raise InvalidCxxCompiler

        monkeypatch.setattr(compiling, "_seconds", fails)
        with pytest.raises(ConfigError, match="compiler fails") as raised:
            choose_compiling(base, member, adapter, "layers", "none")
        assert "train.compile to off" in str(raised.value)
        assert base.bank is None


def test_a_run_with_compiled_layers_is_the_run_without(tiny_base_folder, tmp_path) -> None:
    """The same adapter to rounding, and one that is stopped and resumed is the same to the bit."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"word {n}", "completion": "an answer " * (1 + n % 3)}) + "\n" for n in range(16)
        ),
        encoding="utf-8",
    )

    base = load_base(str(tiny_base_folder), dtype="float32")  # one for all: each is compiled anew

    def run(name: str, resume: bool = False, **settings: Any) -> dict[str, Tensor]:
        config = load_config(
            {"base": str(tiny_base_folder), "dtype": "float32", "data": {"train": str(rows)}, "track": [],
             "adapter": {"rank": 4, "dropout": 0.1}, "checkpoint": {"every_steps": 2}, "output": str(tmp_path / name),
             "train": {"steps": 6, "rows_per_step": 2, "row_tokens": 64, **settings}}
        ).model_copy(update={"base": "python:base"})  # fmt: skip
        summary = train(config, resume=resume, objects={"python:base": base}).summary
        return load_file(Path(summary["adapters"]["main"]) / "adapter_model.safetensors")

    plain = run("plain", compile="off")
    whole = run("whole", compile="layers")
    assert_like(whole, plain, 1e-3)
    events = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert next(event for event in events if event["event"] == "checkpointing")["compiled"] is True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_after_step", stopped_after(3, loop.Loop._after_step))
        with pytest.raises(RuntimeError, match="killed"):
            run("killed", compile="layers")
    again = run("killed", resume=True, compile="layers")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def stopped_after(step: int, own: Callable[..., None]) -> Callable[..., None]:
    def after(self: Any, member: Member, *rest: Any) -> None:
        own(self, member, *rest)
        if member.step == step:
            raise RuntimeError("killed")

    return after
