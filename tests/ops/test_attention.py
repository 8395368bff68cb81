"""What attention inside sequences owes: autograd's numbers, sequences apart, few bytes kept, and transformers' call."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from drawn import examples
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from manylora.base.fast.attention import NAME, attention_fallbacks, register, use_attention
from manylora.base.language import LanguageBase
from manylora.base.probes import packed_inputs
from manylora.data.collate import collate
from manylora.data.example import Example
from manylora.ops import attention as module
from manylora.ops import attention_layout
from manylora.ops.attention import attention, reference
from manylora.ops.attention_layout import Layout, read_layout

BAND = 1e-2
"""How far bfloat16 may be from float32 on the same numbers, as a share of the norm: two and a half roundings."""


def layout_of(lengths: list[list[int]], *, causal: bool = True, tokens: int | None = None) -> Layout:
    """Rows of sequences of these lengths; what `tokens` has beyond them is padding."""
    width = tokens or max(map(sum, lengths))
    positions = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, sizes in zip(positions, lengths, strict=True):
        row[: sum(sizes)] = torch.tensor([place for size in sizes for place in range(size)])
    real = torch.arange(width) < torch.tensor([sum(sizes) for sizes in lengths])[:, None]
    return Layout.of_positions(positions, causal=causal, real=real)


def drawn(
    layout: Layout,
    heads: int = 4,
    shared: int = 2,
    width: int = 8,
    depth: int = 8,
    dtype=torch.float64,
    size: float = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient, laid out as projections and as rotations leave them."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    q = (size * normal(layout.rows, layout.tokens, heads, width)).transpose(1, 2).requires_grad_()
    k = normal(layout.rows, shared, layout.tokens, width).requires_grad_()
    v = normal(layout.rows, layout.tokens, shared, depth).transpose(1, 2).requires_grad_()
    return q, k, v, normal(layout.rows, heads, layout.tokens, depth)


def results(form, parts: tuple[Tensor, ...], layout: Layout, **more) -> list[Tensor]:
    """Values and the three gradients."""
    *inputs, grad = parts
    out = form(*inputs, layout, **more)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def assert_same(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for name, left, right in zip(("out", "q", "k", "v"), found, expected, strict=True):
        assert left.shape == right.shape, name
        assert (left - right).norm() <= share * right.norm() + 1e-300, name


LAYOUTS = {
    "one sequence of several tiles": layout_of([[200], [200]]),
    "a sequence above 512 tokens": layout_of([[530]]),
    "equal sequences": layout_of([[64] * 3, [64] * 3]),
    "ragged sequences": layout_of([[40, 100, 3, 57], [131, 69]]),
    "sequences of one token": layout_of([[1] * 9, [4, 1, 4]]),
    "padding": layout_of([[30, 20], [64], [1]]),
    "a row of padding only": layout_of([[30, 20], []], tokens=56),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients_are_those_of_the_reference(name, causal):
    layout = Layout(LAYOUTS[name].rows, LAYOUTS[name].tokens, LAYOUTS[name].spans, causal)
    parts = drawn(layout, width=8, depth=6)
    assert_same(results(attention, parts, layout), results(reference, parts, layout), 1e-10)


@settings(max_examples=examples(60), deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 90), max_size=5), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    causal=st.booleans(),
    extra=st.integers(0, 9),
    at_once=st.sampled_from([1, 1 << 12, 1 << 19]),
)
def test_any_layout_gives_the_references_numbers(lengths, heads, causal, extra, at_once):
    tokens = max(map(sum, lengths)) + extra
    layout = layout_of(lengths, causal=causal, tokens=max(tokens, 1))
    assume(layout.spans)
    parts = drawn(layout, *heads, width=4, depth=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SCORES_AT_ONCE", at_once)
        assert_same(results(attention, parts, layout), results(reference, parts, layout), 1e-10)


def test_the_reference_is_torchs_attention():
    layout = layout_of([[7, 20], [12, 9]], tokens=27)
    q, k, v, _ = drawn(layout)
    own = scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(), enable_gqa=True, scale=0.3)
    real = torch.zeros(2, 1, 27, 1, dtype=torch.bool)
    real[0], real[1, :, :21] = True, True
    torch.testing.assert_close(reference(q, k, v, layout, 0.3), own * real, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(q, k, v, layout, 0.3), own * real, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_a_packed_sequence_has_the_numbers_that_it_has_alone(causal):
    lengths = [[40, 100, 3, 57], [131, 69]]
    layout = layout_of(lengths, causal=causal)
    parts = drawn(layout, dtype=torch.float32)
    packed = results(attention, parts, layout)
    for row, sizes in enumerate(lengths):
        for size, stop in zip(sizes, itertools.accumulate(sizes), strict=True):
            own = tuple(
                part.detach()[row : row + 1, :, stop - size : stop].requires_grad_(part.requires_grad) for part in parts
            )
            alone = results(attention, own, layout_of([[size]], causal=causal))
            assert_same([part[row : row + 1, :, stop - size : stop] for part in packed], alone, 2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_of_nan_spoils_no_other(causal):
    layout = layout_of([[40, 44, 41, 70], [43, 39]], causal=causal)
    parts = drawn(layout)
    clean = results(attention, parts, layout)
    spoiled = tuple(part.detach().clone().requires_grad_(part.requires_grad) for part in parts)
    for part in spoiled:
        part.detach()[0, :, 40:84] = float("nan")
    for before, after in zip(clean, results(attention, spoiled, layout), strict=True):
        assert after[0, :, 40:84].isnan().any()
        after[0, :, 40:84] = before[0, :, 40:84]
        assert torch.equal(before, after)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_zero_whatever_stands_there(causal):
    layout = layout_of([[30, 20], [64]], causal=causal, tokens=70)
    parts = drawn(layout)
    for part in parts:
        part.detach()[0, :, 50:] = float("nan")
    for part in results(attention, parts, layout):
        assert (part[0, :, 50:] == 0).all()
        assert (part[1, :, 64:] == 0).all()
        assert part.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_stays_within_its_band_of_float32(size, width, causal):
    """Sizes of scores up to 100 are met in trained models; 20 has no exact 1 / sqrt(D)."""
    layout = layout_of([[150, 40, 7], [99, 98]], causal=causal)
    parts = drawn(layout, 6, 2, width, 16, torch.bfloat16, size)
    exact = tuple(part.detach().float().requires_grad_(part.requires_grad) for part in parts)
    found = results(attention, parts, layout)
    assert all(part.dtype == torch.bfloat16 for part in found)
    assert_same([part.float() for part in found], results(reference, exact, layout), BAND)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_read_from_memory_that_was_not_written(causal, dtype):
    layout = layout_of([[40, 100, 3, 57], [131, 50]], causal=causal)
    parts = drawn(layout, dtype=dtype)
    expected = results(attention, parts, layout)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        found = results(attention, parts, layout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


def test_sums_over_many_tiles_are_not_rounded_at_each(monkeypatch):
    monkeypatch.setattr(attention_layout, "SHORT_TILE", 8)
    layout = layout_of([[400]], causal=False)
    parts = drawn(layout, dtype=torch.bfloat16)
    exact = tuple(part.detach().float().requires_grad_(part.requires_grad) for part in parts)
    found = [part.float() for part in results(attention, parts, layout)]
    assert layout.groups[0].num_tiles == 50
    assert_same(found, results(reference, exact, layout), BAND)


def test_what_is_saved_is_q_k_v_the_output_and_a_number_for_each_softmax():
    layout = layout_of([[300], [150, 150]])
    q, k, v, _ = drawn(layout, 4, 2, 32, 32, torch.bfloat16)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(q, k, v, layout)
    assert {part.untyped_storage().data_ptr() for part in (q, k, v, out)} < set(kept)
    assert sum(kept.values()) == sum(part.nbytes for part in (q, k, v, out)) + 4 * 2 * 300 * 4
    assert out.transpose(1, 2).is_contiguous()


def test_no_scores_are_computed_across_sequences():
    counted = FlopCounterMode(display=False)
    layout = layout_of([[64] * 8])
    parts = drawn(layout, dtype=torch.float32)
    with counted:
        results(attention, parts, layout)
    per_score = 2 * 4 * (7 * 8 + 2 * 2)  # seven products of width 8 for 4 heads, two of them two columns wider
    assert counted.get_total_flops() == per_score * 8 * 64**2


def test_what_causality_hides_is_not_computed():
    counted = FlopCounterMode(display=False)
    layout = Layout.whole(1, 1024, causal=True)
    parts = drawn(layout, dtype=torch.float32)
    with counted:
        results(attention, parts, layout)
    assert counted.get_total_flops() < 0.6 * 2 * 4 * (7 * 8 + 2 * 2) * 1024**2


def test_many_lengths_make_few_groups_and_hold_each_token_once():
    lengths = [list(range(1, 60)), list(range(30, 60))]
    layout = layout_of(lengths)
    assert len(layout.groups) <= 8
    tokens = torch.cat([group.tokens[1] for group in layout.groups]).sort().values
    real = [number for start, stop in layout.spans for number in range(start, stop)]
    assert tokens.tolist() == real


@settings(max_examples=examples(40), deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 12), max_size=4), min_size=1, max_size=3),
    causal=st.booleans(),
    flip=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_a_layout_is_read_from_its_mask_and_from_no_other(lengths, causal, flip):
    tokens = max(1, *map(sum, lengths))
    rows = len(lengths)
    layout = layout_of(lengths, causal=causal, tokens=tokens)
    real = torch.arange(tokens) < torch.tensor([sum(sizes) for sizes in lengths])[:, None]
    mask = layout.mask().clone()
    if flip is not None:
        mask.view(-1)[flip % mask.numel()] ^= True
    found = read_layout(lambda row, q, k: mask[row, 0, q, k] & real[row, k], rows, tokens, real=real)
    if found is not None:
        seen = real[:, None, :, None] & real[:, None, None, :]
        assert torch.equal(found.mask() & seen, mask & seen)
    elif flip is None:
        pytest.fail("the layout was not found")


def test_padding_ends_a_span_where_positions_go_on():
    real = torch.tensor([[False, True, True, True, False, False]])
    layout = Layout.of_positions(torch.arange(6)[None], causal=True, real=real)
    assert layout.spans == ((1, 4),)
    assert not layout.covers


def test_shapes_that_do_not_fit_are_refused():
    layout = layout_of([[8]])
    q, k, v, _ = drawn(layout)
    with pytest.raises(ValueError, match="over 1 rows of 8 tokens"):
        attention(q[:, :, :7], k, v, layout)
    with pytest.raises(ValueError, match="over 1 rows"):
        attention(q[:, :3], k, v, layout)
    with pytest.raises(ValueError, match="k is"):
        attention(q, k[..., :4], v, layout)


# transformers' call


def examples(lengths: list[int], vocabulary: int = 200) -> list[Example]:
    draw = np.random.default_rng(3)
    return [
        Example(tokens=draw.integers(1, vocabulary, size).astype(np.int32), trained=np.arange(size) > 0,
                prompt_length=1, prompt="", reference="", group=str(line), file="made", line=line)
        for line, size in enumerate(lengths)
    ]  # fmt: skip


def packed_batch(base: LanguageBase, lengths: list[list[int]]):
    rows = [examples(sizes) for sizes in lengths]
    return collate(rows, width=64, pad_id=base.pad_id, packing=base.packing, causal=base.causal, slots=[-1] * len(rows))


@pytest.fixture
def base(base: LanguageBase) -> LanguageBase:
    """The small base of all tests, on torch's own attention again."""
    return with_torchs(base)


def with_torchs(base: LanguageBase) -> LanguageBase:
    base.model.set_attn_implementation("sdpa")
    return base


def packed_states(base: LanguageBase):
    """What a base may hand to `use_attention`: its states of a row of two sequences."""
    tokens = torch.arange(2, 18).reshape(1, 16)
    lengths = (7, 9) if base.packs else (16,)
    return lambda: base.states(base.found, packed_inputs(tokens, lengths, base.rules)).double()


def test_a_packed_batch_of_a_base_goes_through_the_op_in_every_layer(base):
    batch = packed_batch(base, [[10, 20, 5], [30], [3, 4]])
    assert base.packing == "positions"
    before = base.outputs(batch).hidden
    assert use_attention(base.model, packed_states(base)) == "attention is computed within each sequence of a row"
    with attention_fallbacks() as reasons, torch.profiler.profile() as seen:
        after = base.outputs(batch).hidden
    assert not reasons
    assert sum(event.name == "_Attention" for event in seen.events()) == base.config.num_hidden_layers
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_gradients_of_a_packed_batch_are_those_of_torchs_attention_checkpointed_too(base):
    from torch.utils.checkpoint import checkpoint

    inputs = dict(packed_batch(base, [[10, 20, 5], [30]]).inputs)
    embedded = base.model.get_input_embeddings()(inputs.pop("input_ids")).detach()

    def gradient(*, layers_again: bool = False) -> Tensor:
        start = embedded.clone().requires_grad_()
        if layers_again:
            base.backbone.layers[0].register_forward_hook(lambda *_: None)
            forward = type(base.backbone.layers[0]).forward
            for layer in base.backbone.layers:
                layer.forward = lambda *args, layer=layer, **more: checkpoint(
                    forward, layer, *args, use_reentrant=False, **more
                )
        hidden = base.backbone(inputs_embeds=start, use_cache=False, **inputs)[0]
        hidden.square().sum().backward()
        assert start.grad is not None
        return start.grad

    before = gradient()
    register()
    base.model.set_attn_implementation(NAME)
    torch.testing.assert_close(gradient(), before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gradient(layers_again=True), before, rtol=1e-3, atol=1e-4)


def encoder() -> LanguageBase:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    return with_torchs(LanguageBase(BertForMaskedLM(config)).probed())


def test_an_encoders_own_mask_is_read_once_for_all_layers(monkeypatch):
    from manylora.base.fast import attention as attention_model

    base = encoder()
    batch = packed_batch(base, [[10, 20, 5], [30]])
    assert base.packing == "mask"
    assert not base.causal
    before = base.outputs(batch).hidden
    use_attention(base.model, packed_states(base))
    read = []
    monkeypatch.setattr(attention_model, "read_layout", lambda *a, **k: read.append(1) or read_layout(*a, **k))
    with attention_fallbacks() as reasons:
        after = base.outputs(batch).hidden
        assert len(read) == 1
        batch.inputs["attention_mask"][0, 0, 0, 5] ^= True
        base.outputs(batch)
    assert len(read) == 2
    assert dict(reasons) == {"a mask that is not made of sequences": base.config.num_hidden_layers}
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_padded_rows_give_their_tokens_the_states_of_torchs_attention(base):
    tokens = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    for left in (False, True):
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[1, slice(0, 9) if left else slice(15, None)] = 0
        given = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        base.model.set_attn_implementation("sdpa")
        before = base.backbone(**given)[0]
        register()
        base.model.set_attn_implementation(NAME)
        with attention_fallbacks() as reasons:
            after = base.backbone(**given)[0]
        assert not reasons
        torch.testing.assert_close(after[mask.bool()], before[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generation_with_a_cache_gives_torchs_tokens(base):
    tokens = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens), "eos_token_id": None}
    before = base.model.generate(tokens, **asked)
    register()
    base.model.set_attn_implementation(NAME)
    with attention_fallbacks() as reasons:
        assert torch.equal(base.model.generate(tokens, **asked), before)
    assert not reasons, "a last token is attended to here as well"


def small(kind: str, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2, **more,
    )  # fmt: skip
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "more", "reasons"),
    [
        ("Qwen3Config", {}, {}),
        ("Gemma3TextConfig", {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}, {}),
        ("Gemma3TextConfig", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
         {"a mask that is not made of sequences": 1}),
        ("MistralConfig", {"sliding_window": 8}, {"a mask that is not made of sequences": 2}),
    ],
)  # fmt: skip
def test_a_window_that_hides_something_falls_back_with_the_reason(kind, more, reasons):
    model = small(kind, **more)
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    given = {"input_ids": torch.arange(3, 43)[None], "position_ids": positions, "use_cache": False}
    before = model(**given)[0]
    register()
    model.set_attn_implementation(NAME)
    with attention_fallbacks() as found:
        after = model(**given)[0]
    assert dict(found) == reasons
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_dropout_of_weights_falls_back_with_the_reason(base):
    register()
    base.model.set_attn_implementation(NAME)
    for layer in base.backbone.layers:
        layer.self_attn.attention_dropout = 0.5
    base.model.train()
    with attention_fallbacks() as found:
        base.backbone(input_ids=torch.arange(9)[None], use_cache=False)
    assert dict(found) == {"dropout of attention weights": 2}


def test_a_model_that_gives_other_states_keeps_torchs_attention(base, monkeypatch):
    from manylora.base.fast import attention as attention_model

    monkeypatch.setattr(attention_model, "attention", lambda q, *_: q * 0)
    note = use_attention(base.model, packed_states(base))
    assert note == "attention is torch's own: another gives other states"
    assert base.config._attn_implementation == "sdpa"


def test_a_model_whose_code_fails_keeps_torchs_attention(base, monkeypatch):
    from manylora.base.fast import attention as attention_model

    def fails(*_):
        raise TypeError("'Layout' object is not subscriptable")

    monkeypatch.setattr(attention_model, "attention", fails)
    note = use_attention(base.model, packed_states(base))
    assert note == "attention is torch's own: TypeError: 'Layout' object is not subscriptable"
    assert base.config._attn_implementation == "sdpa"


def test_a_model_that_attends_its_own_way_is_left_alone():
    model = small("Gemma2Config")
    note = use_attention(model, lambda: pytest.fail("it was run"))
    assert note == "attention is the model's own (eager)"
