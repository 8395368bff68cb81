#!/bin/sh
# Mend what ruff can mend by itself, and format.
. "$(dirname "$0")/env.sh"
environment dev
"$BIN/ruff" check --fix
"$BIN/ruff" format
