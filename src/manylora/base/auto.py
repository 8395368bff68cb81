"""Which of transformers' Auto classes a model is opened by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CAUSAL = "AutoModelForCausalLM"
MAPPINGS = {
    CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
"""Auto classes and transformers' own tables of the classes that each makes."""


def auto_class_named(architecture: str) -> str | None:
    """The Auto class that makes an architecture, by the name of its class; None: it is none of transformers' own."""
    from transformers.models.auto import modeling_auto

    for auto, table in MAPPINGS.items():
        for names in getattr(modeling_auto, table, {}).values():
            if architecture == names or (not isinstance(names, str) and architecture in names):
                return auto
    return None


def auto_class_of(folder: Path) -> str:
    """The Auto class that opens a folder's model; that of causal language models where its configuration names none."""
    config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = str((config.get("architectures") or [""])[0])
    known = auto_class_named(architecture)
    if known is not None:
        return known
    by_code = [auto for auto in config.get("auto_map", {}) if auto in MAPPINGS]  # a model with code of its own
    return CAUSAL if not by_code or CAUSAL in by_code else by_code[0]
