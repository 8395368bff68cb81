from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from manylora.adapters.adapter import Adapter
from manylora.base.frozen import FrozenModel
from manylora.base.load import load_base
from manylora.config import load_config
from manylora.errors import ConfigError
from manylora.memory.hollow import hollow_of, without_weights
from manylora.memory.trace import Trace
from manylora.ops.attention import attention
from manylora.ops.attention_layout import Layout
from manylora.planning.advice import changes
from manylora.planning.devices import Device, parse_device
from manylora.planning.heap import Heap, grown
from manylora.planning.hollow import hollow_base
from manylora.planning.planner import CATEGORIES, Planner
from manylora.spec import AdapterSpec

GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def planned(folder):
    """A planner of the builtin base, made once, and the plan of the configuration as it is."""
    planner = Planner(config_of(folder), Device("cpu", "cpu", 8 * GB, 1e11, 1e10, "of a test"))
    return planner, planner.plan(config_of(folder))


def config_of(tmp_path, **overrides):
    rows = tmp_path / "rows.jsonl"
    if not rows.exists():
        rows.write_text('{"prompt": "name : The Eagle", "completion": "The Eagle is a pub ."}\n' * 24)
    given = {"base": "builtin:tiny-en", "data": {"train": str(rows)}, "output": str(tmp_path / "run")}
    base = {"train.row_tokens": 64, "train.rows_per_step": 4, "train.checkpointing": "none", "train.steps": 2}
    return load_config(given, {**base, **overrides})


@pytest.fixture
def device():
    return Device("cpu", "cpu", 8 * GB, 1e11, 1e10, "of a test")


def test_a_trace_counts_what_is_alive_and_forgets_what_is_freed():
    trace = Trace()
    with trace.running():
        kept = torch.empty(100)
        torch.empty(1000)
        view = kept.view(10, 10)
        view.add_(1)
    assert trace.peak() == (4400, trace.peak()[1])
    assert sum(block.num_bytes for block in trace.blocks if block.died is None) == 400


def test_whole_numbers_are_real_and_all_others_take_no_memory():
    with Trace().running():
        assert torch.arange(5).sum().tolist() == 10
        assert torch.tensor([True, False]).any().item()
        huge = torch.empty(1 << 50)
        assert (huge * 2).shape == huge.shape


def test_what_autograd_keeps_is_what_the_real_thing_keeps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    trace = Trace()
    with without_weights(hollow_of(FrozenModel(model)), trace), trace.running():
        x = torch.empty(8, 16).requires_grad_()
        before = len(trace.blocks)
        y = model(x)
        held = [block.num_bytes for block in trace.blocks[before:] if block.died is None]
    # The input of the last layer is not kept: its weight is frozen.
    assert sorted(held) == [8 * 4 * 4, 8 * 64 * 4]
    assert y.shape == (8, 4)


def test_a_part_that_repeats_is_counted_like_one_that_is_run():
    layout = Layout(2, 32, ((0, 12), (12, 32), (32, 64)), True)

    def run(times: int) -> Trace:
        trace = Trace()
        with trace.running():
            for _ in range(times):
                q, k, v = (torch.empty(2, heads, 32, 8).requires_grad_() for heads in (4, 2, 2))
                attention(q, k, v, layout).sum().backward()
        return trace

    one, three = run(1), run(3)
    assert three.work[""].flops == 3 * one.work[""].flops > 0
    assert three.peak()[0] == pytest.approx(one.peak()[0], rel=0.05)


def test_a_heap_that_frees_all_it_took_is_one_hole_again():
    heap = Heap(pinned_share=0.0)
    blocks = [heap.take(size) for size in (1000, 5000, 200)]
    for block in blocks:
        heap.give(block)
    most = heap.most
    heap.take(5600)
    assert heap.most == most


def test_a_heap_with_pins_grows_over_rounds_and_never_below_what_is_alive():
    events = [event for block in range(50) for event in ((block, 1000 + 64 * block),)]
    events += [(block, 0) for block in range(50)]
    alive = sum(count for _, count in events)
    assert alive <= grown(events, pinned_share=0.0) <= 1.2 * alive
    assert grown(events, rounds=3, pinned_share=0.5) > grown(events, rounds=1, pinned_share=0.5)


def test_how_far_a_heap_of_few_large_blocks_grows_does_not_hang_on_small_ones():
    def head(others: int) -> list[tuple[int, int]]:
        """Small blocks, then tiles of a trained head: casts and gradients of its weight, the sum of which is kept."""
        events, names, kept = [(-1 - other, 1000) for other in range(others)], iter(range(10**6)), None
        for _ in range(16):
            cast, scratch, grad, whole, total = (next(names) for _ in range(5))
            events += [(cast, 144 << 20), (scratch, 144 << 20), (scratch, 0), (grad, 144 << 20), (cast, 0)]
            events += [(whole, 288 << 20), (grad, 0), (total, 288 << 20), (whole, 0)]
            events += [] if kept is None else [(kept, 0)]
            kept = total
        return events

    found = [grown(head(others), rounds=3) for others in range(6)]
    assert max(found) < 1.1 * min(found)


def test_a_hollow_base_is_found_to_behave_as_the_real_one(tmp_path):
    base = load_base("builtin:tiny-en")
    found = hollow_base("builtin:tiny-en", auto="AutoModelForCausalLM", dtype="bfloat16").base
    assert found.rules == base.rules
    assert (found.post_head, found.causal, found.eos_ids) == (base.post_head, base.causal, base.eos_ids)
    assert list(found.sites) == list(base.sites)
    stored = {parameter.untyped_storage().nbytes() for parameter in found.model.parameters()}
    assert max(stored) < 100_000


def test_weights_adapters_and_states_are_counted_to_the_byte(planned):
    base = load_base("builtin:tiny-en")
    _, plan = planned
    weights = {id(parameter): parameter.nbytes for parameter in base.model.parameters()}
    assert plan.categories["weights"] == sum(weights.values())
    # A fresh adapter and its place in the bank; two states as large, and a byte beside each tensor: has it moved.
    num_tensors = sum(len(factors.tensors) for factors in Adapter.new(base, AdapterSpec()).factors.values())
    assert plan.categories["optimizer"] == plan.categories["adapters"] + num_tensors
    assert tuple(plan.categories) == CATEGORIES
    assert sum(plan.categories.values()) == plan.total_bytes == max(plan.phases.values())
    assert plan.fits


@pytest.mark.parametrize(
    ("key", "value"),
    [("train.accumulate", 4), ("train.rows_per_step", 1), ("train.row_tokens", 32), ("train.checkpointing", "full")],
)
def test_less_at_once_is_planned_to_take_less(planned, folder, key, value):
    planner, whole = planned
    less = planner.plan(config_of(folder, **{key: value}))
    held = [plan.categories["activations"] + plan.categories["loss"] for plan in (less, whole)]
    assert held[0] < held[1]
    assert less.total_bytes < whole.total_bytes


def test_a_packed_base_is_planned_by_the_bytes_of_its_codes(planned, folder):
    planner, dense = planned
    packed = planner.plan(config_of(folder).model_copy(update={"quantize": "nf4"}))
    assert packed.categories["weights"] < 0.6 * dense.categories["weights"]


@pytest.mark.slow
def test_what_is_proposed_fits(tmp_path, device):
    config = config_of(tmp_path, **{"train.row_tokens": 512, "train.rows_per_step": 8})
    planner = Planner(config, device)
    plan = planner.plan(config)
    planner.device = Device("cpu", "cpu", round(0.97 * plan.total_bytes), 1e11, 1e10, "of a test")
    tight = planner.plan(config)
    assert not tight.fits
    found, _ = changes(planner, config, tight)
    assert found
    for change in found:
        again = planner.plan(config_of(tmp_path, **{"train.row_tokens": 512, "train.rows_per_step": 8},
                                       **change.settings))  # fmt: skip
        assert again.fits
        assert again.total_bytes == change.plan.total_bytes


def test_a_module_of_classes_is_planned_too(tmp_path, device):
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 3))
    data = TensorDataset(torch.randn(16, 32), torch.randint(0, 3, (16,)))
    config = config_of(tmp_path).model_copy(update={"base": "python:base", "task": "module"})
    places = load_config({"base": "x", "data": {"train": "python:rows"}, "output": "x"}, {"task": "module"}).data
    config = config.model_copy(update={"data": places})
    plan = Planner(config, device, objects={"python:base": FrozenModel(model), "python:rows": data}).plan(config)
    assert plan.categories["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert model[0].weight.sum().isfinite()  # and the module has its weights again


@pytest.mark.parametrize("text", ["cuda:80GB", "cpu:16gib", "h100", "a100:40GB", "mps:8.5GB"])
def test_devices_that_are_not_here_have_a_size(text):
    assert parse_device(text).free_bytes > GB


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cudaa:80GB", "cuda"),
        ("cuda", "without a size"),
        ("cuda:80", "no size"),
        ("h10", "h100"),
        ("cpu:0GB", "no size"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(text, told):
    with pytest.raises(ConfigError, match="--device") as caught:
        parse_device(text)
    assert told in str(caught.value)
