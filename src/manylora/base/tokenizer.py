"""What makes two tokenizers the same: the digest of all that decides which tokens a text becomes."""

from __future__ import annotations

import hashlib
from typing import Any


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the vocabulary, merges, normalisation and special tokens; None without a tokenizer.

    How the last call padded or truncated is left out: that is state, and no part of the tokenizer.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr(sorted(tokenizer.get_vocab().items()))
    else:
        if backend.truncation is not None or backend.padding is not None:
            backend = type(backend).from_str(backend.to_str())
            backend.no_truncation()
            backend.no_padding()
        text = backend.to_str()
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def template_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else "sha256:" + hashlib.sha256(str(template).encode()).hexdigest()
