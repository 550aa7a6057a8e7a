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
# what is there needs no package index: scripts that install first can be started again without one
wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root ${1:-}"
stamp=$venv/.bert-heads-toolkit
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "Installed already in $venv (to install again: rm $stamp)"
    exit 0
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
rm -f "$stamp"
echo "Installing into $venv (pip prints nothing; the packages take 1.5 GB, with CUDA more) ..."
"$venv/bin/python" -m pip install --quiet --constraint "$root/constraints.txt" --editable "$root${1:+[$1]}"
echo "$wanted" >"$stamp"
