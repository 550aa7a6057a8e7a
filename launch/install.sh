#!/usr/bin/env bash
# Make the virtual environment .venv in the repository and install the toolkit into it.
#   launch/install.sh [EXTRA]        EXTRA: deepspeed (for launch/zero*.yaml), search (Optuna), or dev (all)
# PYTHON chooses the interpreter (3.11 or newer), VENV another place.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) is too old; Python 3.11 or newer is needed (set PYTHON=...)" >&2
    exit 2
}
# what is there needs no package index: scripts that install first can be started again without one.
# The stamp's first line says with which pins; then each line names an extra, of which dev has all
pins="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
stamp=$venv/.bert-heads-toolkit
[ "$(head -n 1 "$stamp" 2>/dev/null)" = "$pins" ] || rm -f "$stamp"
if [ -f "$stamp" ] && { [ -z "${1:-}" ] || grep -qx -e dev -e "$1" "$stamp"; }; then
    echo "Installed already in $venv (to install again: rm $stamp)"
    exit 0
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "Installing into $venv (pip prints nothing; the packages take 1.5 GB, with CUDA more) ..."
"$venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" --editable "$root${1:+[$1]}"
[ -f "$stamp" ] || echo "$pins" >"$stamp"
echo "${1:-}" >>"$stamp"
