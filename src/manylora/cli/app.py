"""The command: its verbs, and what a failure looks like.

Exit codes: 0 done; 2 the user's mistake; 1 a fault of ours or of the machine; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from manylora.errors import ManyloraError, UserError
from manylora.table import Table

VERBS: Table[Callable[..., None]] = Table(
    "verb",
    {
        "demo": "manylora.cli.demo:demo",
        "train": "manylora.cli.train:train",
        "sweep": "manylora.cli.sweep:sweep",
        "plan": "manylora.cli.plan:plan",
        "evaluate": "manylora.cli.evaluate:evaluate",
        "generate": "manylora.cli.generate:generate",
        "chat": "manylora.cli.chat:chat",
        "compress": "manylora.cli.compress:compress",
        "inspect": "manylora.cli.inspect:inspect",
        "merge": "manylora.cli.merge:merge",
        "combine": "manylora.cli.combine:combine",
        "export": "manylora.cli.export:export",
        "quantize": "manylora.cli.quantize:quantize",
        "doctor": "manylora.cli.doctor:doctor",
    },
)

DONE, FAULT, MISTAKE, INTERRUPTED = 0, 1, 2, 130


def build() -> Any:
    """The command with all its verbs, for `run` and for the tests."""
    app = typer.Typer(
        name="manylora",
        help="One frozen base, many adapters: train, evaluate and use low-rank adapters.",
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name in VERBS:
        app.command(name)(VERBS.get(name))
    return typer.main.get_command(app)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also MANYLORA_DEBUG=1.")] = False,
) -> None:
    if version:
        from manylora import __version__

        typer.echo(f"manylora {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; failures are one block on stderr."""
    debug = "--debug" in arguments or os.environ.get("MANYLORA_DEBUG", "") not in ("", "0")
    words = [word for word in arguments if word != "--debug"]
    try:
        code = build().main(args=words, prog_name="manylora", standalone_mode=False)
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:  # noqa: BLE001 - the one place where every failure becomes an exit code
        if debug:
            traceback.print_exc()
        return _explain(error, words)
    return _interrupted() if code == INTERRUPTED else code if isinstance(code, int) else DONE


def _interrupted() -> int:
    print("\nInterrupted.", file=sys.stderr)
    return INTERRUPTED


def _explain(error: Exception, words: Sequence[str]) -> int:
    """Print the block for an error and return its exit code."""
    name = type(error).__name__
    if isinstance(error, UserError):
        _print_block(f"{name}: {error}")
        return MISTAKE
    if isinstance(error, ManyloraError):
        _print_block(f"{name}: {error}")
        return FAULT
    usage: Any = getattr(error, "format_message", None)
    if usage is not None:  # of typer's or click's errors, whichever of the two brings the parser
        verb = next((f" {word}" for word in words if word in VERBS), "")
        _print_block(f"{name}: {usage()}\n  help: manylora{verb} --help")
        return MISTAKE
    if name == "Abort":
        return _interrupted()
    _print_block(
        f"{name}: {error}\n"
        "  this is a fault of manylora or of the machine\n"
        "  next: run it again with --debug for the traceback, and report it with `manylora doctor`"
    )
    return FAULT


def _print_block(text: str) -> None:
    print(f"Error: {text}", file=sys.stderr)
