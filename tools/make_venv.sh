#!/bin/sh
# Make the development environment: make_venv.sh VENV [PYTHON]
set -eu
venv=$1
asked=${2:-}

suits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${asked:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no suitable Python${asked:+ ($asked)}: version 3.11 or later with the venv module is needed." >&2
    echo "       Debian and Ubuntu have it in the packages python3 and python3-venv;" >&2
    echo "       an interpreter elsewhere is named with: make PYTHON=/path/to/python3 ..." >&2
    exit 1
}

# An environment that runs is kept, whoever made it; one whose Python is gone, or is another one than asked, is made anew.
if [ -n "$asked" ] || ! suits "$venv/bin/python"; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
# The pip that comes with Python 3.11 is too old for dependency groups (25.1).
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
echo "installing the package and its tools into $venv (a minute or two, once)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[all]" --group dev
