#!/usr/bin/env bash
# Install, then run the study: four experiments, one after another, and the table that compares them.
#   launch/study.sh [FLAGS FOR ALL RUNS]
# Start it again to go on where it stopped.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}

"$root/launch/install.sh"
export PATH="$venv/bin:$PATH"
exec python -m toolkit sweep run "$root/configs/sweeps/study.yaml" "$@"
