# Sourced by the other scripts: `environment [extras]` makes .venv with the package and the named extras.
# PYTHON names the interpreter that makes it (3.11 or newer).

set -eu
cd "$(dirname "$0")/.."
VENV=.venv
BIN=$VENV/bin

# The interpreter to build with: $PYTHON, or the first of the usual names that is new enough.
find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "Error: no Python 3.11 or newer was found; name one: make $(basename "$0" .sh) PYTHON=/path/to/python3.11" >&2
    exit 2
}

environment() {
    extras=${1:-}
    if [ ! -x "$BIN/python" ]; then
        python=$(find_python)
        echo "creating $VENV with $python"
        "$python" -m venv "$VENV"
    fi
    # The stamp holds what was installed: another pyproject.toml or constraints.txt installs again.
    stamp=$VENV/.installed-${extras:-plain}
    now=$(cat pyproject.toml constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$now" ]; then
        echo "installing manylora${extras:+[$extras]} into $VENV (constraints.txt names the versions)"
        "$BIN/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
        echo "$now" > "$stamp"
    fi
}
