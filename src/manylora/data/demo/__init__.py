"""The bundled sample: attributes of a restaurant to a sentence (E2E NLG Challenge); see e2e/ATTRIBUTION.md."""

from pathlib import Path


def demo_data_folder() -> Path:
    """The folder that holds the sample's `train.jsonl` and `eval.jsonl` (columns prompt, completion)."""
    return Path(__file__).parent / "e2e"
