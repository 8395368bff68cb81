"""`manylora chat`: a conversation with a base, or with an adapter on it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from manylora.cli.generate import MaxNewTokens, Seed, Temperature, TopK, TopP
from manylora.cli.opened import BaseName, Device, Dtype, Quantize, TrustRemoteCode, open_base
from manylora.cli.output import AsJson, Output, note
from manylora.runs.places import adapter_folder


def chat(
    base: BaseName = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter or a run.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the conversation is told first.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    quantize: Quantize = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Talk with a base or an adapter.

    /reset forgets what was said, /quit ends.
    """
    from manylora.generation.chat import Conversation
    from manylora.generation.stream import TextStream

    folders = [adapter_folder(adapter)] if adapter else []
    opened = open_base(
        base, folders, dtype=dtype, device=device, quantize=quantize, trust_remote_code=trust_remote_code
    )
    slot = max(opened.slots.values())
    talk = Conversation(opened.base, slot=slot, system=system)
    output, turns = Output(as_json), []
    note("/reset forgets what was said, /quit ends")
    while (text := _read_line()) is not None:
        if text == "/reset":
            talk = Conversation(opened.base, slot=slot, system=system)
            note("forgotten")
            continue
        if forgotten := talk.make_room(text, max_new_tokens=max_new_tokens):
            note(f"{forgotten} of the oldest exchanges are forgotten: the base has no room for more")
        stream = TextStream(opened.base.tokenizer)
        answer = talk.ask(
            text, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            on_token=lambda token, stream=stream: _print_piece(stream.push(token), as_json),
        )  # fmt: skip
        _print_piece(stream.close() + "\n", as_json)
        turns.append({"user": text, "assistant": answer.text})
    output.finish({"base": opened.base.name, "turns": turns})


def _read_line() -> str | None:
    """The next line that says something, None at /quit or the end of the input."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return None
        if line.strip():
            return line.strip()


def _print_piece(text: str, as_json: bool) -> None:
    if not as_json:
        print(text, end="", flush=True)
