"""What is known of a tokenizer before any row is read: BOS at the front, tokens that end a text or a turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from manylora.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Marked:
    """Tokens, and which of them are targets: `spans` of (start, stop), in order, none empty.

    `tags` are the classes of the target tokens, in order, where a target is a class and not the token itself.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenRules:
    """`front_bos` is the BOS that the tokenizer itself puts before a text (None: it puts none); `eos_id` is appended to
    what is learned; generation stops at `stop_ids`; `end_ids` (these and the other special tokens) may end a turn; of a
    conversation all assistant turns are learned, or the last."""

    tokenizer: PreTrainedTokenizerBase
    front_bos: int | None
    eos_id: int
    stop_ids: frozenset[int]
    end_ids: frozenset[int]
    turns: Literal["all", "last"] = "all"

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        eos_id: int | Sequence[int] | None,
        *,
        turns: Literal["all", "last"] = "all",
        learns_end: bool = True,
    ) -> TokenRules:
        """The rules of one tokenizer; the first of several `eos_id` is the one appended.

        `learns_end`: whether an end is learned at all; where classes are, a tokenizer needs none.

        Raises:
            DataError: there is no end-of-text token, so a model could never learn to stop.
        """
        eos_ids = [eos_id] if isinstance(eos_id, int) else list(eos_id or ())
        if not eos_ids and not learns_end:
            eos_ids = [NO_TOKEN]
        if not eos_ids:
            raise DataError(
                "the tokenizer of this base has no end-of-text token, so the end of a completion cannot be learned",
                next_step="set eos_token in the base's tokenizer_config.json",
            )
        added = tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special}
        ends = frozenset({*eos_ids, *special})
        return cls(tokenizer, _front_bos(tokenizer), eos_ids[0], frozenset(eos_ids), ends, turns)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, with nothing added.

        Semantics: tokenizer(texts, add_special_tokens=False)["input_ids"]; where nothing of that call is overridden,
        the library below it is asked directly, which saves the lists that nobody reads.
        """
        backend = _plain_backend(self.tokenizer)
        if backend is None:
            # verbose=False: a text above the model's own limit is judged by `overflow`, not by a warning
            encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
            return [list(one) for one in encoded["input_ids"]] if texts else []
        return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def is_plain(self) -> bool:
        """Whether the library below the tokenizer encodes, and nothing of the tokenizer's own."""
        return _plain_backend(self.tokenizer) is not None

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


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The `tokenizers.Tokenizer` that encodes exactly as the tokenizer itself does; None where that is not sure."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    kind, fast = type(tokenizer), PreTrainedTokenizerFast
    plain = kind.__call__ is PreTrainedTokenizerBase.__call__ and kind._encode_plus is fast._encode_plus
    backend = tokenizer.backend_tokenizer
    if not plain or backend.truncation is not None or backend.padding is not None:
        return None
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    return backend if backend.encode_special_tokens == split else None
