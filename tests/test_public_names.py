"""What `import manylora` offers."""

from __future__ import annotations

import pytest

import manylora


def test_every_public_name_exists_and_says_what_it_gives():
    for name in manylora.__all__:
        value = getattr(manylora, name)
        assert name in dir(manylora)
        assert isinstance(value, str) or value.__doc__


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Adpater'"):
        _ = manylora.Adpater
