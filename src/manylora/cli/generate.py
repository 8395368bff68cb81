"""`manylora generate`: text from a base and from adapters on it, side by side in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from manylora.cli.opened import BaseName, Device, Dtype, Opened, Quantize, TrustRemoteCode, open_base
from manylora.cli.output import AsJson, Output
from manylora.errors import DataError, UserError
from manylora.runs.places import adapter_folder

Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="An adapter or a run; repeat it to compare several side by side.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length limit of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the fewest tokens that have this share, above 0 to 1.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw from so many of the likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws; the same seed gives the same text.")]


def generate(
    text: Annotated[list[str] | None, typer.Argument(help="What is continued.", show_default=False)] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What is continued; may be repeated.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file: .txt holds one prompt a line, others a column `prompt`.")
    ] = None,
    base: BaseName = None,
    adapter: Adapters = None,
    with_base: Annotated[bool, typer.Option("--with-base", help="Show the bare base's text too.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Give each prompt as a user's turn of the chat template.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
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
    """Continue prompts."""
    texts = [*(text or ()), *(prompt or ()), *(read_prompts(prompts) if prompts is not None else ())]
    if not texts:
        raise UserError("no prompt is given", next_step="manylora generate TEXT, or --prompts FILE")
    folders = [adapter_folder(name) for name in adapter or ()]
    opened = open_base(
        base, folders, dtype=dtype, device=device, quantize=quantize, trust_remote_code=trust_remote_code
    )
    chosen = {name: slot for name, slot in opened.slots.items() if slot >= 0 or with_base or not folders}
    answers = _answers(
        opened, texts, list(chosen.values()), chat=chat, seed=seed, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k,
    )  # fmt: skip
    results = [
        {"prompt": one, "answers": dict(zip(chosen, row, strict=True))} for one, row in zip(texts, answers, strict=True)
    ]
    output = Output(as_json)
    for result in results:
        _show(output, result, alone=len(results) == 1 and len(chosen) == 1)
    output.finish({"base": opened.base.name, "results": results})


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file.

    Raises:
        DataNotFound: no such file. DataError: the file is empty, or a row has no text in its column `prompt`.
    """
    from manylora.data.readers import read_rows

    if path.suffix == ".txt" and path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{path} is empty", allowed="one prompt a line")
        return lines
    rows = read_rows(path)
    for row in rows:
        if not isinstance(row.values.get("prompt"), str):
            raise DataError(
                f"{row.where} has no text in the column 'prompt'", allowed=f"columns: {', '.join(row.values)}"
            )
    return [str(row.values["prompt"]) for row in rows]


def prompt_tokens(base: Any, text: str, *, chat: bool) -> list[int]:
    """A prompt as training shows it: after the tokenizer's BOS where it puts one, or as a turn of the chat template."""
    from manylora.generation.chat import encode_prompt, render_conversation

    if chat:
        return render_conversation(base.tokenizer, [{"role": "user", "content": text}])
    return encode_prompt(base, text)


def _answers(
    opened: Opened, texts: list[str], slots: list[int], *, chat: bool, seed: int, **settings: Any
) -> list[list[str]]:
    """For each prompt the text of each slot, all in one batch; a prompt's slots share its random stream."""
    from manylora.generation.decode import generate as decode

    encoded = [prompt_tokens(opened.base, text, chat=chat) for text in texts]
    found = decode(
        opened.base,
        [tokens for tokens in encoded for _ in slots],
        slots=slots * len(texts),
        seeds=[(seed << 32) + place for place in range(len(texts)) for _ in slots],
        **settings,
    )
    answers = [generation.text for generation in found]
    return [answers[place : place + len(slots)] for place in range(0, len(answers), len(slots))]


def _show(output: Output, result: dict[str, Any], *, alone: bool) -> None:
    if alone:
        output.line(next(iter(result["answers"].values())).strip("\n"))
        return
    output.line(f"prompt: {json.dumps(result['prompt'], ensure_ascii=False)}")
    width = max(len(name) for name in result["answers"])
    for name, text in result["answers"].items():
        output.line(f"  {name:>{width}}: {text.strip()}")
    output.line()
