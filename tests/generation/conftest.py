"""Prompts of different lengths."""

from __future__ import annotations

import pytest

from manylora.base.language import LanguageBase


@pytest.fixture
def prompts(base: LanguageBase) -> list[list[int]]:
    texts = ["name : The Eagle", "a", "Once upon a time there was", "food : Chinese | area", "Hi there"]
    return [base.tokenizer.encode(text) for text in texts]
