#!/bin/sh
# Make .venv-peers: the libraries that the benchmarks compare with, away from the package's own environment.
. "$(dirname "$0")/env.sh"
PEERS=.venv-peers
if [ ! -x "$PEERS/bin/python" ]; then
    python=$(find_python)
    echo "creating $PEERS with $python"
    "$python" -m venv "$PEERS"
fi
echo '*' > "$PEERS/.gitignore" # no file of it belongs to the repository
stamp=$PEERS/.installed
now=$(cat bench/peers.txt constraints.txt | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$now" ]; then
    echo "installing what bench/peers.txt names into $PEERS"
    "$PEERS/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -r bench/peers.txt
    echo "$now" > "$stamp"
fi
