"""What makes two tokenizers the same: the digest of all that decides which tokens a text becomes."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def tokenizer_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the vocabulary, merges, normalisation and special tokens; None without a tokenizer.

    How the last call padded or truncated is left out: that is state, and no part of the tokenizer.
    """
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())))
    else:
        held = json.loads(backend.to_str())
        text = json.dumps({key: value for key, value in held.items() if key not in ("truncation", "padding")})
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def template_digest(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if not template else "sha256:" + hashlib.sha256(str(template).encode()).hexdigest()
