from __future__ import annotations

import pytest
import torch

from manylora.adapters.bank import Bank
from manylora.base.language import LanguageBase
from manylora.errors import ConfigError, DataError, RouteError, UserError
from manylora.generation import generate
from manylora.generation.decode import CachedStep, decodes_by_cache

NEW = 12


def by_hand(base, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache, a mask or a batch."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(base.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_decoding_with_a_cache_equals_decoding_by_hand(base, prompts):
    found = generate(base, prompts, slots=[-1] * len(prompts), max_new_tokens=NEW, stop_ids=())
    assert [list(one.tokens) for one in found] == [by_hand(base, prompt, NEW) for prompt in prompts]
    assert {one.finished for one in found} == {"length"}


@pytest.mark.parametrize("batch_rows", [2, 3, 64])
def test_ragged_prompts_together_equal_prompts_alone(base, prompts, batch_rows):
    stops = common_token(base, prompts)
    together = generate(
        base, prompts, slots=[-1] * len(prompts), max_new_tokens=NEW, stop_ids=stops, batch_rows=batch_rows
    )
    alone = [generate(base, [prompt], slots=[-1], max_new_tokens=NEW, stop_ids=stops)[0] for prompt in prompts]
    assert together == alone
    assert {one.finished for one in together} == {"stop", "length"}


def common_token(base, prompts) -> tuple[int]:
    """A token that some answers hold and others do not, so that rows leave the batch at different times."""
    answers = [set(by_hand(base, prompt, NEW)) for prompt in prompts]
    return (next(t for t in sorted(set.union(*answers)) if 0 < sum(t in answer for answer in answers) < len(answers)),)


def test_mixed_slots_in_one_batch_equal_slots_apart_while_rows_leave(base, prompts, adapters):
    with Bank(base, num_slots=2) as bank:
        for slot, adapter in enumerate(adapters):
            bank.put(adapter, slot=slot)
        repeated, slots = [p for p in prompts for _ in range(3)], [1, -1, 0] * len(prompts)
        free = generate(base, repeated, slots=slots, max_new_tokens=NEW, stop_ids=())
        stops = (free[0].tokens[4], free[1].tokens[2], free[2].tokens[6])
        mixed = generate(base, repeated, slots=slots, max_new_tokens=NEW, stop_ids=stops)
        apart = [
            generate(base, [prompt], slots=[slot], max_new_tokens=NEW, stop_ids=stops)[0]
            for prompt, slot in zip(repeated, slots, strict=True)
        ]
    assert mixed == apart
    assert len({len(one.tokens) for one in mixed}) > 2
    plain = [generate(base, [prompt], slots=[-1], max_new_tokens=NEW, stop_ids=stops)[0] for prompt in prompts]
    assert mixed[1::3] == plain
    assert mixed[0::3] != plain
    assert mixed[2::3] != plain


def test_a_draw_does_not_depend_on_its_neighbours_and_repeats(base, prompts):
    options = {"max_new_tokens": NEW, "temperature": 1.3, "top_k": 40, "top_p": 0.95}
    seeds = [11, 12, 13, 14, 15]
    together = generate(base, prompts, slots=[-1] * 5, seeds=seeds, **options)
    alone = [generate(base, [p], slots=[-1], seeds=[s], **options)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert together != generate(base, prompts, slots=[-1] * 5, seeds=[s + 1 for s in seeds], **options)
    assert generate(base, prompts, slots=[-1] * 5, **options) == generate(base, prompts, slots=[-1] * 5, **options)


def test_a_stop_token_is_left_out_of_tokens_text_and_stream(base, prompts):
    free = generate(base, prompts[:1], slots=[-1], max_new_tokens=NEW, stop_ids=())[0]
    seen: list[tuple[int, int]] = []
    found = generate(
        base, prompts[:1], slots=[-1], max_new_tokens=NEW, stop_ids=[free.tokens[5]],
        on_token=lambda row, token: seen.append((row, token)),
    )[0]  # fmt: skip
    length = free.tokens.index(free.tokens[5])
    assert found.finished == "stop"
    assert found.tokens == free.tokens[:length]
    assert seen == [(0, token) for token in found.tokens]
    assert found.text == base.tokenizer.decode(list(found.tokens), skip_special_tokens=True)


def test_the_stream_names_the_callers_rows(base, prompts):
    seen: dict[int, list[int]] = {row: [] for row in range(len(prompts))}
    found = generate(
        base, prompts, slots=[-1] * len(prompts), max_new_tokens=4, stop_ids=(), batch_rows=2,
        on_token=lambda row, token: seen[row].append(token),
    )  # fmt: skip
    assert [list(one.tokens) for one in found] == list(seen.values())


def test_special_tokens_are_no_part_of_the_text(base, prompts):
    head = base.model.lm_head.weight
    with torch.no_grad():
        head[259] = 50.0 * by_hidden(base, prompts[0])
    found = generate(base, prompts[:1], slots=[-1], max_new_tokens=1, stop_ids=())[0]
    assert found.tokens == (259,)
    assert found.text == ""


def by_hidden(base, prompt: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return base.model.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]


def test_generation_ends_at_the_last_position_of_the_base(base, prompts):
    long = (prompts[2] * 4)[:90]
    found = generate(base, [long, prompts[1]], slots=[-1, -1], max_new_tokens=20, stop_ids=())
    assert [len(one.tokens) for one in found] == [6, 20]
    assert found[0].finished == "length"


@pytest.mark.parametrize("length", [96, 120])
def test_a_prompt_without_room_for_an_answer_is_refused_with_its_length(base, prompts, length):
    with pytest.raises(DataError, match=rf"prompt 1 is {length} tokens long.*\n.*at most 95"):
        generate(base, [prompts[0], (prompts[2] * 5)[:length]], slots=[-1, -1], max_new_tokens=4)


def test_bad_arguments_are_refused_before_anything_runs(base, prompts):
    with pytest.raises(DataError, match="prompt 0 is empty"):
        generate(base, [[]], slots=[-1], max_new_tokens=4)
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        generate(base, prompts[:1], slots=[-1], max_new_tokens=0)
    with pytest.raises(UserError, match="temperature is -1"):
        generate(base, prompts[:1], slots=[-1], max_new_tokens=4, temperature=-1)
    with pytest.raises(RouteError, match="1 slots for 2 prompts"):
        generate(base, prompts[:2], slots=[-1], max_new_tokens=4)
    with pytest.raises(RouteError, match="slot 0 is asked for, and this base carries no bank"):
        generate(base, prompts[:1], slots=[0], max_new_tokens=4)


def test_no_prompts_give_no_generations(base):
    assert generate(base, [], slots=[], max_new_tokens=4) == []


def test_only_the_last_position_meets_the_head(base, prompts):
    assert decodes_by_cache(base)  # which is tried once
    seen: list[tuple[int, ...]] = []
    # Where it is passed by it gives logits of no token.
    handle = base.head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)) if out.numel() else 0)
    generate(base, prompts, slots=[-1] * len(prompts), max_new_tokens=3, stop_ids=())
    handle.remove()
    assert seen == [(5, base.vocabulary)] * 3


SIZES = {"vocab_size": 261, "initializer_range": 0.3, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
MISTRAL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "sliding_window": 8,
}  # fmt: skip


@pytest.mark.parametrize(("family", "sizes"), [("GPT2", GPT2), ("Bloom", BLOOM), ("Mistral", MISTRAL)])
def test_learned_absent_and_windowed_positions_decode_ragged_prompts(prompts, family, sizes):
    import transformers

    from manylora.base.language import LanguageBase

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    other = LanguageBase(getattr(transformers, kind)(config), tokenizer=Plain(), name=family).probed()
    wanted = [by_hand(other, prompt, NEW) for prompt in prompts]
    assert [list(one.tokens) for one in generate_all(other, prompts, ())] == wanted
    stop = wanted[0][4]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in wanted]
    assert [list(one.tokens) for one in generate_all(other, prompts, (stop,))] == cut


def generate_all(base, prompts, stops):
    return generate(base, prompts, slots=[-1] * len(prompts), max_new_tokens=NEW, stop_ids=stops)


class Plain:
    """A tokenizer that only writes numbers."""

    eos_token_id = 256
    pad_token_id = 257

    def decode(self, tokens, **options) -> str:
        return " ".join(map(str, tokens))


def test_text_stands_where_training_put_it(base):
    """A model that counts its positions from another number than 0: decoded from there too, padded beside others."""
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=base.vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=5, max_position_embeddings=64, is_decoder=True, bos_token_id=0, eos_token_id=96,
        initializer_range=0.6,
    )  # fmt: skip
    base = LanguageBase(RobertaForCausalLM(config).eval(), tokenizer=base.tokenizer, name="roberta").probed()
    assert base.rules.first_position == 6
    prompts = [[7, 8, 9, 10, 11, 12], [20, 21, 22]]
    found = generate(base, prompts, slots=[-1, -1], max_new_tokens=8, stop_ids=())
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                logits = base.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
        assert list(answer.tokens) == tokens[len(prompt) :]


SMALL = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
OTHERWISE = {
    "Mamba": {**SMALL, "state_size": 8},
    "Mamba2": {**SMALL, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "Rwkv": {**SMALL, "attention_hidden_size": 32, "context_length": 64},
    "FalconH1": {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "Lfm2": {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "layer_types": ["conv", "full_attention"]},
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERWISE)
def test_models_that_remember_otherwise_than_by_keys_and_values_write_their_own_text(prompts, family):
    """A cache of another name is silently not used, and recurrent states see the padding of a row."""
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**OTHERWISE[family], initializer_range=0.2)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    base = LanguageBase(model, tokenizer=Plain(), name=family).probed()
    asked = prompts[:3]
    found = generate(base, asked, slots=[-1] * len(asked), max_new_tokens=6, stop_ids=())
    assert [list(one.tokens) for one in found] == [by_hand(base, prompt, 6) for prompt in asked]


def test_a_cache_has_room_for_all_that_comes_and_is_written_in_place(base):
    step = CachedStep(base, [[5, 6, 7], [8, 9]])
    step.expect(9)
    places, chosen = set(), None
    with torch.no_grad():
        for _ in range(9):
            chosen = step(chosen).argmax(1)
            places.add(tuple(layer.keys.data_ptr() for layer in step.cache.layers))
        assert len(places) == 1
        step.keep(torch.tensor([1]))
        assert step.cache.layers[0].keys.shape[:3] == (1, step.cache.layers[0].keys.shape[1], 11)


def test_no_map_of_the_head_is_a_batched_product(base, prompts):
    """Rows of a slice of three dimensions would each have their own copy of the head's weight."""
    size = tuple(base.head.weight.shape)
    with torch.profiler.profile(record_shapes=True) as profile:
        generate(base, prompts, slots=[-1] * len(prompts), max_new_tokens=3, stop_ids=())
    products = [event for event in profile.events() if event.name == "aten::bmm"]
    shapes = [tuple(shape[-2:]) for event in products for shape in event.input_shapes if len(shape) == 3]
    assert not {size, size[::-1]} & set(shapes)
