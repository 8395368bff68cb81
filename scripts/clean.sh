#!/bin/sh
# Remove what tools leave behind; the environment and the runs stay.
set -eu
cd "$(dirname "$0")/.."
rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
find src tests scripts bench tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
