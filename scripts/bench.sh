#!/bin/sh
# Run every script of bench/, one for each measured claim; or only those that are named.
. "$(dirname "$0")/env.sh"
environment bench
[ "$#" -gt 0 ] || set -- bench/*.py
for script in "$@"; do
    [ -e "$script" ] || { echo "no benchmark at $script"; exit 0; }
    echo "== $script"
    "$BIN/python" "$script"
done
