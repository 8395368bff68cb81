"""Text from a base and its adapters: one decoder, used by evaluation, `generate`, `chat` and serving alike."""

from manylora.adapters.route import route_rows
from manylora.generation.chat import Conversation, encode_prompt, render_conversation
from manylora.generation.decode import Generation, generate
from manylora.generation.sampling import Sampling
from manylora.generation.stream import TextStream

__all__ = [
    "Conversation",
    "Generation",
    "Sampling",
    "TextStream",
    "encode_prompt",
    "generate",
    "render_conversation",
    "route_rows",
]
