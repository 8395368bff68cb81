"""How rows are shown to the model and what is learned of them; one file per format, one line in the table."""

from manylora.data.formats.format import Format
from manylora.table import Table

FORMATS: Table[Format] = Table(
    "data format",
    {
        "preference": "manylora.data.formats.preference:PREFERENCE",
        "unpaired": "manylora.data.formats.unpaired:UNPAIRED",
        "messages": "manylora.data.formats.messages:MESSAGES",
        "sharegpt": "manylora.data.formats.sharegpt:SHAREGPT",
        "segments": "manylora.data.formats.segments:SEGMENTS",
        "tagged": "manylora.data.formats.tagged:TAGGED",
        "prompt-completion": "manylora.data.formats.prompt_completion:PROMPT_COMPLETION",
        "alpaca": "manylora.data.formats.alpaca:ALPACA",
        "pairs": "manylora.data.formats.pairs:PAIRS",
        "label": "manylora.data.formats.label:LABEL",
        "text": "manylora.data.formats.text:TEXT",
    },
)
"""In the order in which `detect` prefers them where rows fit several: those that ask for more columns first."""
