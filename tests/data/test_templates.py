"""Every style of chat template: what is learned is what generation writes, after exactly what generation is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from drawn import examples
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from manylora.data import chat
from manylora.data.faults import RowFault
from manylora.data.tokens import TokenRules
from manylora.generation import chat as use
from manylora.generation.decode import Generation

FOLDER = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Style:
    """One template in its file, the special tokens it needs, and what it makes of an answer."""

    name: str
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    kind: str = "bytes"  # of the tokenizer: bytes, gpt2 (older bytes), metaspace (a space first), prepend (before all)
    writes: str = "{}"  # what stands where an answer stood, before its end token
    trims: bool = False
    system: bool = True
    stops: tuple[str, ...] = ()
    stable: bool = True  # earlier turns stay as they are when more follow

    def answer(self, text: str) -> str:
        return self.writes.format(text.strip() if self.trims else text) + self.end


CHATML = {"special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "eos": "<|im_end|>", "end": "<|im_end|>"}
HEADS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
STYLES = {
    style.name: style
    for style in (
        Style("chatml", **CHATML),
        Style("marked", **CHATML),
        Style("hermes", **CHATML),
        Style("qwen3", **CHATML, writes="<think>\n\n</think>\n\n{}", stable=False),
        Style("llama3", HEADS, "<|end_of_text|>", "<|eot_id|>", HEADS[0], trims=True, stops=("<|eot_id|>",)),
        Style(
            "gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", "<bos>",
            "metaspace", trims=True, system=False, stops=("<end_of_turn>",),
        ),
        Style("mistral", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "</s>", "<s>", "metaspace", " {}"),
        Style("llama2", ("<s>", "</s>"), "</s>", "</s>", "<s>", "prepend", " {} ", trims=True),
        Style(
            "phi", ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "<|end|>",
            stops=("<|end|>",),
        ),
        Style("alpaca", ("<s>", "</s>"), "</s>", "</s>", "<s>", "gpt2"),
        Style("spaced", ("<s>", "</s>"), "</s>", "</s>", stable=False),
        Style(
            "deepseek", ("<|begin|>", "<|finish|>", "<|User|>", "<|Assistant|>"), "<|finish|>", "<|finish|>",
            "<|begin|>",
        ),
        Style("zephyr", ("<s>", "</s>"), "</s>", "</s>", "<s>", "metaspace"),
    )
}  # fmt: skip
STABLE = [name for name, style in STYLES.items() if style.stable]
WORDS = (  # as Llama 3 and Qwen cut: line ends stay together, whatever follows
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LINES = [
    "You are helpful. What is 2 + 2 ? It is 4. user: assistant: system: ### Response:\n\n",
    "  indented\n\n\nlines [INST] What time is it ? [/INST] It is noon.",
] * 4
SYSTEM = {"role": "system", "content": "You are helpful."}
FIRST = [{"role": "user", "content": "What is 2 + 2 ?"}, {"role": "assistant", "content": "It is 4."}]
SECOND = [{"role": "user", "content": "What time is it ?"}, {"role": "assistant", "content": "It is noon.\nBye"}]


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of the kind that models with this style have."""
    style = STYLES[name]
    core = byte_level(style) if style.kind in ("bytes", "gpt2") else sentence_piece(style)
    names = {"eos_token": style.eos, "additional_special_tokens": list(style.special)}
    if style.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{style.bos} $A", special_tokens=[(style.bos, core.token_to_id(style.bos))]
        )
        names["bos_token"] = style.bos
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def byte_level(style: Style) -> Tokenizer:
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    newer = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    older = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    core.pre_tokenizer = pre_tokenizers.Sequence(newer if style.kind == "bytes" else older)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(style.special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(LINES, trainer)
    return core


def sentence_piece(style: Style) -> Tokenizer:
    """BPE over spaces shown as a sign, as SentencePiece does, with bytes for what its vocabulary lacks."""
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    draft.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(draft.to_str())["model"]
    signs = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    merges = [tuple(pair) for pair in learned["merges"]]
    vocabulary = {sign: place for place, sign in enumerate(signs)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.add_special_tokens(list(style.special))
    if style.kind == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def rules_of(name: str) -> TokenRules:
    style, tokenizer = STYLES[name], tokenizer_of(name)
    return TokenRules.of(tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in (style.eos, *style.stops)])


def marked(messages, rules, **options):
    conversation, _ = chat.render(messages, rules, **options)
    return conversation, conversation.mark(rules.encode(conversation.texts))


def written(tokens, span, tokenizer) -> str:
    """The text of a span, where it stands."""
    before = tokenizer.decode(tokens[: span[0]], clean_up_tokenization_spaces=False)
    return tokenizer.decode(tokens[: span[1]], clean_up_tokenization_spaces=False)[len(before) :]


def check(name, messages, **options):
    """What is learned is each answer and its end, after exactly the tokens that generation is given."""
    style, rules = STYLES[name], rules_of(name)
    conversation, made = marked(messages, rules, **options)
    assert len(made.spans) == len(conversation.turns)
    for turn, span in zip(conversation.turns, made.spans, strict=True):
        assert written(made.tokens, span, rules.tokenizer) == style.answer(messages[turn.index]["content"])
        assert made.tokens[: span[0]] == use.render_conversation(rules.tokenizer, messages[: turn.index])
        assert made.tokens[span[1] - 1] == rules.tokenizer.convert_tokens_to_ids(style.end)
    assert made.spans[-1][1] == len(made.tokens)
    return conversation, made


def system_of(name):
    return [SYSTEM] if STYLES[name].system else []


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_and_its_end_are_learned_after_what_generation_is_given(name):
    check(name, [*system_of(name), *FIRST])


@pytest.mark.parametrize("name", STABLE)
def test_each_turn_of_a_longer_conversation_is_learned(name):
    _, made = check(name, [*system_of(name), *FIRST, *SECOND, *FIRST])
    assert len(made.spans) == 3


@pytest.mark.parametrize("name", STYLES)
def test_the_last_turn_alone_can_be_learned_whatever_the_style(name):
    _, made = check(name, [*system_of(name), *FIRST, *SECOND], turns="last")
    assert len(made.spans) == 1


@pytest.mark.parametrize("name", [name for name in STYLES if name not in STABLE])
def test_a_style_that_rewrites_earlier_turns_says_to_learn_the_last(name):
    with pytest.raises(RowFault, match="in another way when more follows") as caught:
        marked([*FIRST, *SECOND], rules_of(name))
    assert caught.value.kind == "unstable template"
    assert "data.turns: last" in caught.value.next_step


@pytest.mark.parametrize("name", STYLES)
def test_no_row_begins_with_two_bos_and_the_template_alone_decides(name):
    _, made = marked([*system_of(name), *FIRST], rules_of(name))
    bos = tokenizer_of(name).bos_token_id
    writes_one = "bos_token" in tokenizer_of(name).chat_template
    assert made.tokens[:2].count(bos) == int(writes_one)


@pytest.mark.parametrize("name", STABLE)
def test_a_chat_gives_generation_what_the_row_of_the_same_turns_trains(name, monkeypatch):
    messages = [*system_of(name), *FIRST, *SECOND, *FIRST]
    rules = rules_of(name)
    _, made = marked(messages, rules)
    prompts, answers = [], iter(made.spans)

    def answer(_base, prompt, **_settings):
        prompts.extend(prompt)
        span = next(answers)
        tokens = made.tokens[span[0] : span[1] - 1]
        return [Generation(tuple(tokens), written(made.tokens, (span[0], span[1] - 1), rules.tokenizer), "stop")]

    monkeypatch.setattr(use, "generate", answer)
    base = SimpleNamespace(tokenizer=rules.tokenizer)
    talk = use.Conversation(base, system=messages[0]["content"] if STYLES[name].system else None)
    for message in messages:
        if message["role"] == "user":
            talk.ask(message["content"], max_new_tokens=9)
    assert prompts == [made.tokens[:start] for start, _ in made.spans]


def test_a_header_that_merges_with_the_answer_is_joined_as_generation_goes_on():
    rules = rules_of("spaced")
    _, made = check("spaced", FIRST)
    alone = rules.encode(["assistant: "])[0]
    assert made.tokens[: made.spans[0][0]][-len(alone) :] == alone
    (whole,) = rules.encode([rules.tokenizer.decode(made.tokens)])
    assert whole != made.tokens


def test_the_thinking_of_the_last_turn_is_learned_and_of_earlier_ones_forgotten():
    rules = rules_of("qwen3")
    thought = {**SECOND[1], "reasoning": "Look at the clock."}
    earlier = {**FIRST[1], "content": "<think>\nAdd them.\n</think>\n\nIt is 4."}
    _, made = marked([FIRST[0], earlier, SECOND[0], thought], rules, turns="last")
    assert written(made.tokens, made.spans[0], rules.tokenizer) == (
        "<think>\nLook at the clock.\n</think>\n\nIt is noon.\nBye<|im_end|>"
    )
    assert "Add them" not in rules.tokenizer.decode(made.tokens)


def is_changed(said: str, style: Style) -> bool:
    """Whether the template takes an answer apart, or the tokenizer does not give it back as it was."""
    if style.name == "qwen3":
        return "think>" in said or said.startswith("\n")
    inside = style.kind == "prepend" and any(token in said for token in style.special)
    return inside or (style.kind in ("metaspace", "prepend") and "▁" in said)


PIECES = (
    "It is 4.", " ", "  ", "\n", "\n\n", "\t", "user", "assistant: ", "user:\n", "### Response:\n", "[INST]", "[/INST]",
    "</s>", "<s>", "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\n", "<|end|>", "<end_of_turn>", "<|eot_id|>",
    "<think>", "</think>", "<think>\nhm\n</think>\n\n", "\u00e9", "e\u0301", "\U0001f469\u200d\U0001f680",
    "\u0645\u0631\u062d", "\u4f60\u597d", "\u2581", "\u00a0", "\\n", "{{ x }}", "\x00",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=5).map("".join)
ANSWER = TEXT.map(lambda text: text if text.strip() else f"{text}It is 4.")
TALKS = st.tuples(st.none() | TEXT, st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4))
REASONS = {"unstable template", "end token inside", "template refuses", "template drops"}


@pytest.mark.parametrize("name", STYLES)
@settings(deadline=None, max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])
@given(talk=TALKS, turns=st.sampled_from(["all", "last"]))
@example(talk=(None, [("\u2581", "\nIt is 4.")]), turns="all")
def test_any_conversation_is_refused_with_a_reason_or_learned_exactly(name, talk, turns):
    system, exchanges = talk
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in exchanges:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    rules = rules_of(name)
    try:
        conversation, made = marked(messages, rules, turns=turns)
    except RowFault as fault:
        found = fault
    else:
        found = None
    if found is not None:
        event(found.kind)
        assert found.kind in REASONS
        assert found.what
        return
    event("learned")
    if not any(is_changed(said, STYLES[name]) for _, said in exchanges):
        check(name, messages, turns=turns)
    (whole,) = rules.encode([conversation.turns[-1].after])
    if whole[: len(made.tokens)] != made.tokens:  # joined, so the text is the same and the header stays whole
        start, stop = made.spans[-1]
        assert rules.encode([conversation.turns[-1].before])[0] == made.tokens[:start]
        # A piece that writes a space as the sign for it cannot tell the two apart when it is read back.
        after, read = (
            text.replace("\u2581", " ")
            for text in (conversation.turns[-1].after, rules.tokenizer.decode(made.tokens[:stop]))
        )
        assert after.startswith(read)
