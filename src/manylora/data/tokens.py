"""What is known of a tokenizer before any row is read: BOS at the front, tokens that end a text or a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE = 2048  # the fast tokenizers work on a whole list in parallel; this bounds the memory of one call


@dataclass(frozen=True, slots=True)
class Marked:
    """Tokens and, beside each, whether it is learned."""

    tokens: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """`front_bos` is the BOS that the tokenizer itself puts before a text (None: it puts none); `eos_id` is appended to
    what is learned; generation stops at `stop_ids`; `end_ids` (these and the other special tokens) may end a turn."""

    tokenizer: PreTrainedTokenizerBase
    front_bos: int | None
    eos_id: int
    stop_ids: frozenset[int]
    end_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, eos_id: int | Sequence[int] | None) -> TokenRules:
        """The rules of one tokenizer; the first of several `eos_id` is the one appended.

        Raises:
            DataError: there is no end-of-text token, so a model could never learn to stop.
        """
        eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
        if not eos_ids:
            raise DataError(
                "the tokenizer of this base has no end-of-text token, so the end of a completion cannot be learned",
                next_step="set eos_token in the base's tokenizer_config.json",
            )
        added = tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        return cls(tokenizer, _front_bos(tokenizer), eos_ids[0], frozenset(eos_ids), frozenset({*eos_ids, *special}))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with nothing added."""
        tokens: list[list[int]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = list(texts[start : start + TEXTS_AT_ONCE])
            # verbose=False: a text above the model's own limit is judged by `overflow`, not by a warning
            encoded = self.tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
            tokens += encoded["input_ids"]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return str(self.tokenizer.decode(list(tokens)))

    def name(self, token: int) -> str:
        """A token as the vocabulary writes it."""
        return str(self.tokenizer.convert_ids_to_tokens(token))

    @property
    def front(self) -> list[int]:
        """What stands before every bare text: the BOS, or nothing."""
        return [] if self.front_bos is None else [self.front_bos]


def _front_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    bos = tokenizer.bos_token_id
    if not isinstance(bos, int):
        return None
    # Asked of the tokenizer itself: `add_bos_token` is missing, or not obeyed, in many configurations.
    with_special, without = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    return bos if with_special[:1] == [bos] and without[:1] != [bos] else None
