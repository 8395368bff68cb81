#!/bin/sh
# Fine-tune the builtin base on the bundled data and show text before and after.
. "$(dirname "$0")/env.sh"
environment
exec "$BIN/manylora" demo "$@"
