#!/usr/bin/env bash
# Makes .venv with the tested set, or does nothing when the one that is there is current.
#
# Choices, all optional:
#   PYTHON=python3.12   the interpreter to use (3.11 or newer)
#   TORCH=torch==2.13.0 install this torch instead of the CPU build (on Linux: the CUDA build)
set -euo pipefail
cd "$(dirname "$0")/.."

fail() { echo "error: $*" >&2; exit 1; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; found none among: ${PYTHON:-python3 python3.14 ... python3.11}"
}

# The editable install points at this folder, so a moved checkout needs a new one too.
wanted=$( { pwd; echo "${TORCH:-cpu}"; cat infra/venv.sh pyproject.toml constraints.txt; } | cksum)
if [ -x .venv/bin/python ] && [ "$(cat .venv/.stamp 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

install() { .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"; }

# torch comes first and as its CPU build where pip finds one (PIP_EXTRA_INDEX_URL can name PyTorch's
# CPU index), because what needs torch would otherwise bring the CUDA build, ten times as large.
install_torch() {
    local version
    version=$(sed -n 's/^torch==//p' constraints.txt)
    if [ -n "${TORCH:-}" ]; then
        install "$TORCH"
    elif [ "$(uname -s)" = Darwin ] || ! install "torch==$version+cpu" 2>/dev/null; then
        install "torch==$version"
    fi
}

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(find_python)
    echo "venv: creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
        fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"
fi
echo "venv: installing torch (CPU build) and the tested set into .venv, about three minutes"
started=$SECONDS
install_torch
install -c constraints.txt -e '.[test]' || fail "the installation stopped; the lines above say where"
echo "$wanted" > .venv/.stamp
echo "venv: ready after $((SECONDS - started)) s"
