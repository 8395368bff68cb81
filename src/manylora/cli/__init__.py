"""The command line: thin verbs that parse, build, call and print. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run one command and leave with its exit code."""
    from manylora.cli.app import run

    sys.exit(run(sys.argv[1:]))
