#!/bin/sh
# The tests, two at a time, with the checks beside them; then, by themselves, the tests that measure time or memory.
# --all runs the slow ones too, and every example of the tests that draw theirs. Further arguments go to pytest, which
# then runs once and without workers.
. "$(dirname "$0")/env.sh"
environment dev
slow="not slow and "
if [ "${1:-}" = "--all" ]; then
    slow=""
    export MANYLORA_HYPOTHESIS=all
    shift
fi
if [ "$#" -gt 0 ]; then
    scripts/check.sh
    exec "$BIN/python" -m pytest -m "${slow}(alone or not alone)" "$@"
fi
checked=$(mktemp)
scripts/check.sh > "$checked" 2>&1 &
check=$!
failed=""
"$BIN/python" -m pytest -n 2 --dist worksteal -m "${slow}not alone" || failed="$failed tests"
wait "$check" || failed="$failed checks"
cat "$checked"
rm -f "$checked"
"$BIN/python" -m pytest -m "${slow}alone" || failed="$failed measuring-tests"
[ -z "$failed" ] || { echo "Error: failed:$failed" >&2; exit 1; }
