from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.data.example import Example
from manylora.data.pieces import harmless, pieces_of


def example(tokens, first_trained=0, **further) -> Example:
    trained = np.arange(len(tokens)) >= first_trained
    return Example(np.array(tokens, np.int32), trained, first_trained, "", "", "", "f", 1, **further)


def test_pieces_are_the_text_and_hold_each_token_once(tokenizer):
    text = "The Eagle | food : Chinese"
    tokens = [*tokenizer.encode(text), 0]
    pieces = pieces_of(example(tokens, 3), tokenizer)
    assert "".join(piece.text for piece in pieces) == text + "<|endoftext|>"
    assert [token for piece in pieces for token in piece.tokens] == tokens
    assert [piece.trained for piece in pieces] == [False] * 3 + [True] * (len(tokens) - 3)
    assert [piece.special for piece in pieces] == [False] * (len(tokens) - 1) + [True]


def test_a_character_of_several_tokens_is_one_piece_and_trained_where_one_of_them_is(tokenizer):
    tokens = tokenizer.encode("a\N{GRINNING FACE}b")
    assert len(tokens) == 6
    pieces = pieces_of(example(tokens, 3), tokenizer)
    assert [piece.text for piece in pieces] == ["a", "\N{GRINNING FACE}", "b"]
    assert [piece.trained for piece in pieces] == [False, True, True]
    assert pieces[1].tokens == tuple(tokens[1:5])


def test_half_a_character_is_closed_by_a_special_token_and_by_the_end(tokenizer):
    face = tokenizer.encode("\N{GRINNING FACE}")
    pieces = pieces_of(example([*face[:2], 5, *face[:3]]), tokenizer)
    assert [len(piece.tokens) for piece in pieces] == [2, 1, 3]
    assert [piece.special for piece in pieces] == [False, True, False]
    assert pieces[1].text == "<|end|>"


def test_a_replacement_character_of_the_data_loses_no_token(tokenizer):
    text = "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    tokens = tokenizer.encode(text)
    pieces = pieces_of(example(tokens), tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    assert [token for piece in pieces for token in piece.tokens] == tokens


@given(st.text(max_size=40), st.integers(0, 20))
def test_any_text_comes_back_whole(tokenizer, text, first_trained):
    tokens = tokenizer.encode(text)
    if tokens:
        pieces = pieces_of(example(tokens, first_trained), tokenizer)
        assert [token for piece in pieces for token in piece.tokens] == tokens
        if not any(piece.special for piece in pieces):
            assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)


def test_tags_stand_at_their_own_token(tokenizer):
    tokens = tokenizer.encode("The Eagle")
    trained = np.zeros(len(tokens), np.bool_)
    trained[[0, -1]] = True
    made = Example(np.array(tokens, np.int32), trained, 0, "", "", "", "f", 1, tags=("O", "B-X"))
    pieces = pieces_of(made, tokenizer)
    assert pieces[0].tags == ("O",)
    assert pieces[-1].tags == ("B-X",)
    assert not any(piece.tags for piece in pieces[1:-1])


def test_spaces_that_a_decoder_drops_at_the_front_are_kept():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\N{LOWER ONE EIGHTH BLOCK}"
    core = Tokenizer(models.WordLevel({f"{space}Hello": 0, f"{space}world": 1, "<s>": 2, space: 3}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.add_special_tokens(["<s>"])
    pieces = pieces_of(example([0, 1, 1]), PreTrainedTokenizerFast(tokenizer_object=core))
    assert [piece.text for piece in pieces] == ["Hello", " world", " world"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \N{CYRILLIC SMALL LETTER A}\n\t", "plain \N{CYRILLIC SMALL LETTER A}\n\t"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b31m\r", "\\x9b31m\\x0d"),
        ("a\N{RIGHT-TO-LEFT OVERRIDE}b", "a\\u202eb"),
        ("\N{ZERO WIDTH JOINER}", "\N{ZERO WIDTH JOINER}"),
    ],
)
def test_what_a_terminal_would_obey_is_written_as_an_escape(text, shown):
    assert harmless(text) == shown
