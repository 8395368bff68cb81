#!/bin/sh
# The checks, then the tests; --all runs the slow ones too. Further arguments go to pytest.
. "$(dirname "$0")/env.sh"
environment dev
chosen="not slow"
if [ "${1:-}" = "--all" ]; then
    chosen="slow or not slow"
    shift
fi
scripts/check.sh
exec "$BIN/python" -m pytest -m "$chosen" "$@"
