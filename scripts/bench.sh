#!/bin/sh
# Run every script of bench/ that measures a claim, or only those that are named. Those that need data sets find them in
# the folder MANYLORA_TEST_DATA, and are left out with a line where it is not set. All run in turn, even where one ends
# with an error; the exit code says whether any did.
. "$(dirname "$0")/env.sh"
environment bench
scripts/peers.sh
failed=""

measure() {
    echo "== $*"
    "$BIN/python" "$@" || failed="$failed $1"
}

with_data() {
    if [ -n "${MANYLORA_TEST_DATA:-}" ]; then
        measure "$@"
    else
        echo "== $1 is left out: MANYLORA_TEST_DATA names no folder with data sets"
    fi
}

[ "$#" -gt 0 ] || set -- bench/*.py
for script in "$@"; do
    [ -e "$script" ] || { echo "Error: no benchmark at $script; see bench/" >&2; exit 2; }
    data=${MANYLORA_TEST_DATA:-}
    case $script in
        bench/readme.py | bench/results.py | bench/workers.py | bench/ways_*.py) ;; # parts of the others
        bench/versions.py) ;; # wants another checkout
        bench/sft.py) with_data "$script" ;;
        bench/data.py) with_data "$script" "$data/gsm8k/train.jsonl" --columns prompt=question,completion=answer ;;
        bench/e2e.py)
            with_data "$script" "$data/e2e/dev.txt" --only lora
            with_data "$script" "$data/e2e/dev.txt" --only full
            ;;
        bench/qlora.py) with_data "$script" --e2e "$data/e2e/dev.txt" ;;
        *) measure "$script" ;;
    esac
done
[ -z "$failed" ] || { echo "ended with an error:$failed" >&2; exit 1; }
