"""Check that every name in `manylora.__all__` exists and says in a docstring what the caller gets.

Run by `make check`: python scripts/public_names.py
"""

from __future__ import annotations

import inspect
import sys

import manylora


def complaints() -> list[str]:
    """One line for each public name that is missing or undocumented."""
    found = []
    for name in manylora.__all__:
        if name.startswith("__"):
            continue
        try:
            value = getattr(manylora, name)
        except (AttributeError, ImportError) as error:
            found.append(f"manylora.{name}: {error}")
            continue
        if (inspect.isclass(value) or inspect.isroutine(value)) and not (value.__doc__ or "").strip():
            found.append(f"manylora.{name} has no docstring")
    return found


if __name__ == "__main__":
    lines = complaints()
    print("\n".join(lines) or f"public names: {len(manylora.__all__)} exist and are documented")
    sys.exit(1 if lines else 0)
