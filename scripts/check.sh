#!/bin/sh
# Lint, format, types, the import contract and the public names; changes nothing.
. "$(dirname "$0")/env.sh"
environment dev
"$BIN/ruff" check
"$BIN/ruff" format --check
"$BIN/pyright"
"$BIN/lint-imports" --no-cache
"$BIN/python" scripts/public_names.py
