"""EVA: the start follows the inputs that a site sees, and ranks follow what they vary in."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fleets import ragged
from starts import drawn_inputs, new_adapter
from torch import Tensor

import manylora
from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.base.load import load_base
from manylora.config import load_config
from manylora.data.batches import Epochs
from manylora.errors import SpecError
from manylora.methods.inits import INITS
from manylora.methods.inits.eva import MOST_RANK, InputGram, shared_ranks
from manylora.planning.planner import planned
from manylora.spec import AdapterSpec
from manylora.training import inputs as reading
from manylora.training import loop, prepare
from manylora.training.inputs import first_readers, read_inputs
from manylora.training.prepare import Stock

READS = [name for name in INITS if INITS.get(name).reads is not None]
SPEC = AdapterSpec(rank=4, alpha=8, init="eva")


def rows_in(path: Path, count: int = 24) -> Path:
    names = ("Aromi", "Blue Spice", "Cotto", "The Punter", "Zizzi")
    foods = ("Italian", "French", "Indian")
    lines = [
        {"prompt": f"{names[n % 5]}, {foods[n % 3]}, no. {n}:", "completion": f" {names[n % 5]} serves {foods[n % 3]}."}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def config_of(folder: Path, **settings: Any):
    values = {
        "base": "builtin:tiny-en", "dtype": "float32", "data": {"train": str(rows_in(folder / "rows.jsonl"))},
        "adapter": {"rank": 4, "alpha": 8, "init": "eva"}, "output": str(folder / "run"),
        "train": {"steps": 4, "rows_per_step": 4, "row_tokens": 64, "learning_rate": 1e-3},
        "checkpoint": {"every_steps": 1},
    }  # fmt: skip
    return load_config(values, settings)


@pytest.fixture(scope="module")
def base():
    return load_base("builtin:tiny-en", dtype="float32", device="cpu")


def seen_by(stock: Stock, config, names: list[str]) -> dict[str, Tensor]:
    """All inputs of some sites at the positions that are learned from, by a hook of the module's own."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in reading._batches(stock.base, stock._epochs_of(config, seed=0)):
        counted = batch.targets["labels"].ne(-100)
        handles = [
            stock.base.sites[name].module.register_forward_pre_hook(
                lambda module, args, name=name, counted=counted: seen[name].append(args[0][counted])
            )
            for name in names
        ]
        with torch.no_grad():
            stock.base.outputs(batch)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_a_is_the_singular_vectors_of_all_inputs_and_b_is_zero(tmp_path) -> None:
    config = config_of(tmp_path)
    stock = Stock(config, use_cache=False)
    adapter = stock.start(config)
    names = [next(iter(adapter.factors)), next(name for name in adapter.factors if name.endswith("down_proj"))]
    for name, inputs in seen_by(stock, config, names).items():
        a, b = (adapter.factors[name].tensors[key] for key in "ab")
        directions = np.linalg.svd(inputs.double().numpy(), full_matrices=False)[2]
        cosines = np.abs((a.double().numpy() * directions[: len(a)]).sum(1))
        assert cosines.min() > 0.999, (name, cosines)
        assert not b.any()


@pytest.mark.parametrize("rank", [2, 4, 16])
def test_ranks_add_up_to_what_was_asked_and_none_is_above_its_bound(base, rank: int) -> None:
    spec = replace(SPEC, rank=rank, rank_pattern={"down_proj": 3})
    asked = Adapter.check(base, spec)
    adapter = new_adapter(base, spec)
    ranks = {name: len(own.tensors["a"]) for name, own in adapter.factors.items()}
    assert sum(ranks.values()) == sum(asked.values())
    assert all(0 < got <= MOST_RANK * asked[name] for name, got in ranks.items())
    assert len(set(ranks.values())) > 1
    assert {adapter.spec.rank_at(name) for name in ranks} == set(ranks.values())
    assert all(adapter.spec.scale(name) == pytest.approx(spec.scale(name)) for name in ranks)


def test_ranks_go_to_the_largest_shares_and_a_site_without_any_is_left_out(base) -> None:
    spec = replace(SPEC, sites=("q_proj",))
    names = list(Adapter.check(base, spec))
    found = drawn_inputs(base, spec)
    shares = {name: found[name].shares.clone() for name in names}
    shares[names[0]].zero_()
    changed = {name: replace(one, shares=shares[name]) for name, one in found.items()}
    ranks = shared_ranks([base.sites[name] for name in names], changed, spec)
    assert ranks[names[0]] == 0
    bound = min(share for name in names for share in shares[name][: ranks[name]].tolist())
    left = [share for name in names for share in shares[name][ranks[name] : 8].tolist()]
    assert bound >= max(left)
    adapter = Adapter.new(base, spec, inputs=changed)
    assert names[0] not in adapter.factors
    assert names[0] not in adapter.spec.sites


def test_sites_that_read_one_tensor_are_read_once_and_alike(tmp_path, monkeypatch) -> None:
    config = config_of(tmp_path)
    stock = Stock(config, use_cache=False)
    made: list[str] = []
    monkeypatch.setattr(
        prepare,
        "read_inputs",
        lambda base, epochs, reader, ranks: made.extend(ranks) or read_inputs(base, epochs, reader, ranks),
    )
    adapter = stock.start(config)
    assert {name.rpartition(".")[2] for name in made} == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    for name, first in first_readers(stock.base).items():
        if name in adapter.factors and first in adapter.factors:
            a, of_first = adapter.factors[name].tensors["a"], adapter.factors[first].tensors["a"]
            shorter = min(len(a), len(of_first))
            assert torch.equal(a[:shorter], of_first[:shorter])
    # Another seed, alpha and rate: nothing is read. Another rank: it is.
    for changed, reads in (({"train.seed": 3, "adapter.alpha": 2}, 0), ({"adapter.rank": 6}, len(set(made)))):
        made.clear()
        again = stock.start(load_config(config.to_dict(), changed))
        assert len(made) == reads
        assert again.factors.keys() <= stock.base.sites.keys()
    made.clear()
    other = stock.start(load_config(config.to_dict(), {"adapter.sites": ["v_proj"]}))
    assert not made, "v_proj reads what q_proj reads"
    assert all(name.endswith("v_proj") for name in other.factors)


def test_turns_of_few_sites_find_the_same_as_all_at_once(tmp_path) -> None:
    config = config_of(tmp_path)
    stock = Stock(config, use_cache=False)
    reader = INITS.get("eva").reads
    ranks = {
        name: 4
        for name, first in first_readers(stock.base).items()
        if name == first and stock.base.sites[name].kind.product and not stock.base.sites[name].is_head
    }
    epochs = stock._epochs_of(config, seed=0)
    whole, turns = (read_inputs(stock.base, epochs, reader, ranks, held_bytes=held) for held in (1 << 30, 1))
    assert whole.keys() == turns.keys() == ranks.keys()
    for name in ranks:
        assert torch.equal(whole[name].vectors, turns[name].vectors)
        assert torch.equal(whole[name].shares, turns[name].shares)


def test_directions_settle_when_half_the_data_would_have_given_them(base) -> None:
    site = base.sites["model.layers.0.self_attn.q_proj"]
    generator = torch.Generator().manual_seed(0)
    spread = torch.arange(1, site.out_in[1] + 1).pow(-1.0)
    statistic = InputGram(site, 2)
    asked = []
    for count in range(1, 65):
        statistic.add(torch.randn(64, site.out_in[1], generator=generator) * spread)
        if count & (count - 1) == 0:
            asked.append(statistic.settled())
    assert not asked[0]
    assert asked[-1]
    same = InputGram(site, 2)
    for _ in range(2):
        same.add(torch.ones(1, site.out_in[1]))
        assert not same.settled(), "fewer inputs than directions"


def test_a_run_is_resumed_without_reading_and_ends_in_the_same_bytes(tmp_path, monkeypatch) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = manylora.train(config_of(tmp_path / "whole"))
    config = config_of(tmp_path / "cut")
    step = loop.Loop._after_step

    def stopping(self, member, result, seconds):
        step(self, member, result, seconds)
        if member.step == 2:
            self.save()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_after_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            manylora.train(config)
    state = json.loads(next((tmp_path / "cut" / "run" / "checkpoints").glob("step-*/state.json")).read_text())
    assert state["running"]["main"]["spec"]["rank_pattern"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("data was read again")

    monkeypatch.setattr(prepare, "read_inputs", refuse)
    resumed = manylora.train(config, resume=True)
    wanted, found = (Adapter.load(one.run / "adapters" / "main") for one in (whole, resumed))
    assert {name: own.tensors["a"].shape for name, own in wanted.factors.items()} == {
        name: own.tensors["a"].shape for name, own in found.factors.items()
    }
    for name, own in wanted.factors.items():
        for key, value in own.tensors.items():
            assert torch.equal(value, found.factors[name].tensors[key]), name
    ranks = {len(own.tensors["a"]) for own in found.factors.values()}
    assert len(ranks) > 1


@pytest.mark.parametrize("init", READS)
def test_what_cannot_be_read_is_refused_by_name(init: str, base) -> None:
    with pytest.raises(SpecError, match=f"init '{init}' reads data, and an adapter is made here without any"):
        Adapter.new(base, replace(SPEC, init=init))
    with pytest.raises(SpecError, match=r"'.*embed_tokens' is of the kind 'embedding'"):
        Adapter.check(base, replace(SPEC, init=init, sites=("embed_tokens",)))
    unused = copy.deepcopy(base.model)
    unused.spare = torch.nn.Linear(4, 4)
    wide = LanguageBase(unused).probed()
    epochs, reader = Epochs(ragged(4), row_tokens=32, seed=0, packs=True), INITS.get(init).reads
    assert read_inputs(wide, epochs, reader, {"lm_head": 4}), "the head is read as any other product"
    with pytest.raises(SpecError, match="'spare' is not called in a forward of the base"):
        read_inputs(wide, epochs, reader, {"spare": 2})


@pytest.mark.slow
@pytest.mark.parametrize("init", READS)
def test_a_plan_says_what_it_leaves_out(init: str, tmp_path) -> None:
    found = planned(config_of(tmp_path, **{"adapter.init": init}))
    assert any(f"adapter.init {init} is not in the plan: it reads data" in note for note in found.notes)


def test_a_member_that_comes_while_others_train_starts_as_alone(tmp_path) -> None:
    """A bank then stands on the base, and every forward needs a route."""
    config = config_of(tmp_path)
    alone = Stock(config, use_cache=False).start(config)
    stock = Stock(config, use_cache=False)
    with Bank(stock.base, num_slots=2) as bank:
        bank.put(Adapter.new(stock.base, AdapterSpec(rank=2)), slot=0)
        late = stock.start(config)
    assert alone.factors.keys() == late.factors.keys()
    for name, own in alone.factors.items():
        assert torch.equal(own.tensors["a"], late.factors[name].tensors["a"])
